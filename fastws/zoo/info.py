"""What is in a zoo."""

from dataclasses import dataclass

import numpy

from fastws.zoo.format import Zoo


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints what is in a zoo."""

    zoo: str  # folder


def run(config: Config) -> None:
    zoo = Zoo.open(config.zoo)
    table = zoo.properties
    models = table["model"].unique()
    print(zoo)
    print(f"models: {len(models):,}, states: {len(zoo):,}, left out as not finite: {zoo.dropped:,}")
    print(f"weights: {zoo.dtype}, {len(zoo.shards)} file(s); symmetry: {zoo.symmetry or 'unknown'}")
    sizes = {name: f"{len(members):,} models, {len(zoo.split(name)):,} states" for name, members in zoo.splits.items()}
    print("splits: " + "; ".join(f"{name} {size}" for name, size in sizes.items()))
    print(f"{'property':<18} {'min':>10} {'25 %':>10} {'50 %':>10} {'75 %':>10} {'max':>10}")
    for name in table.column_names:
        values = table[name].to_numpy()
        if numpy.issubdtype(values.dtype, numpy.number):
            values = values[numpy.isfinite(values)]
            quantiles = numpy.quantile(values, [0, 0.25, 0.5, 0.75, 1]) if len(values) else numpy.full(5, numpy.nan)
            print(f"{name:<18} " + " ".join(f"{value:>10.4g}" for value in quantiles))
        elif name != "model":
            print(f"{name:<18} {', '.join(sorted(map(str, table[name].unique().to_pylist())))}")
    print("tensors:")
    print(zoo.layout.describe())
