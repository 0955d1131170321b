"""What the experiments with hyper-representations share: a zoo, a model of it, sampled networks, and what they do.

A zoo of tanh networks is made and put in one order of neurons; an autoencoder learns it; networks are sampled from its
codes as the paper describes it (`independent`) and as its code was released (`reference`), and from the weights
themselves. Each set is measured at epoch 0 and after training, beside networks trained from scratch, and judged by its
distance to the training networks. Whatever is there already is kept, so that the same command goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from fastws.downstream import evaluate
from fastws.downstream.judging import compare as compare_zoos
from fastws.downstream.sampling import sample
from fastws.files.atomic import write_json
from fastws.train.ae import train as ae
from fastws.train.sane import train as sane
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import ALIGNMENT
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import config_of

ALIKE = {  # a recipe of digits networks from which something can be learned: signs, and weight decay
    "activations": ("tanh",),
    "inits": ("xavier_uniform",),
    "optimizers": ("momentum",),
    "lrs": (0.1,),
    "weight_decays": (1e-2,),
}
SETS = {  # name: how it is sampled; those with "model" from the autoencoder's codes
    "reconstructed": {"method": "direct", "model": True},
    "kde-independent": {"method": "kde", "best": 0.3, "model": True},
    "kde-reference": {"method": "kde", "best": 0.3, "mode": "reference", "model": True},
    "flow": {"method": "flow", "components": 64},
    "gan": {"method": "gan", "components": 64},
    "pca64": {"method": "pca", "components": 64},
    "behaviour64": {"method": "pca", "components": 64, "behaviour": 200},
    "behaviour256": {"method": "pca", "components": 256, "behaviour": 400},
    "noise": {"method": "noise", "noise": 0.4},
    "average": {"method": "average", "together": 2},
}
SMOKE = ("reconstructed", "kde-independent", "noise")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done."""

    zoo: MakeConfig
    out: Path  # folder of everything but the zoo
    states: tuple[int, int]  # first and last epoch that is learned from
    sets: Sequence[str] = tuple(SETS)
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: SETS)  # how each set is sampled
    learner: Literal["ae", "sane"] = "ae"  # what learns the zoo
    count: int = 200  # networks of each set
    more: tuple[int, ...] = (1,)  # epochs of training after which samples are measured again
    model: dict[str, Any] = field(default_factory=dict)  # options of the learner
    other_data: str | None = None  # a data set, or its folder, that samples are trained on as well
    other_limit: int | None = None  # images of each part of it
    judged: bool = True  # whether distances to training networks are measured as well
    baselines: bool = True  # of zoo compare
    device: str | None = None


def describe_given(folder: str) -> MakeConfig:
    """The configuration of a zoo that is there already."""
    zoo = Zoo.open(folder)
    return replace(config_of(zoo.path, zoo.provenance), out=folder)


def run(plan: Plan) -> dict[str, Any]:
    """Does it, and writes and prints what was found."""
    begin = perf_counter()
    zoo = make(plan.zoo)
    if not (zoo.path / ALIGNMENT).exists():
        align(AlignConfig(zoo=str(zoo.path)))
    common = {"zoo": str(zoo.path), "epochs": plan.states, "device": plan.device}
    learn = {"out": str(plan.out / plan.learner), "aligned": True, "seed": plan.zoo.seed} | common | plan.model
    if plan.learner == "ae":
        ae.run(ae.Config(**learn))
    else:
        # whole networks where a loss of behaviour wants them, and here where they are short
        learn = {"window": zoo.layout.with_tokens(None, "skip").num_tokens} | learn
        sane.run(sane.Config(**learn))
    sets = {name: measure_set(plan, name, common) for name in plan.sets}
    judged = judge(plan, zoo) if plan.judged else {"sets": [], "verdicts": {}, "recall": None}
    for one in judged["sets"]:
        sets.setdefault(one["name"], {}).update(
            {name: one[name][0] for name in ("accuracy", "novelty", "spread", "apart")}
        )
    found = {
        "seed": plan.zoo.seed,
        "networks": plan.zoo.networks,
        "sets": sets,
        "zoo": accuracy_of(zoo, plan.zoo.epochs),
        "scratch": {f"epoch {epoch}": accuracy_of(zoo, epoch) for epoch in plan.more},
        "verdicts": judged["verdicts"],
        "recall": judged["recall"],
        "seconds": perf_counter() - begin,
    }
    write_json(plan.out / "results.json", found)
    print_table(found, plan.more)
    return found


def judge(plan: Plan, zoo: Zoo) -> dict[str, Any]:
    """How new the sets are, and whether they are better than cheap baselines."""
    return compare_zoos.compare(
        compare_zoos.Config(
            samples=tuple(str(plan.out / name) for name in plan.sets),
            out=str(plan.out / "compare"),
            count=plan.count,
            baselines=plan.baselines,
            train=str(zoo.path),
            epochs=plan.states,
            device=plan.device,
        )
    )


def measure_set(plan: Plan, name: str, common: dict[str, Any]) -> dict[str, float]:
    """Samples a set, measures it, trains it on and measures it again, on other images as well if there are any."""
    options, out = dict(plan.methods[name]), plan.out / name
    if options.pop("model", False):
        options["model"] = str(plan.out / plan.learner / "checkpoint.pt")
    if not (out / "zoo.json").exists():
        sample.sample(
            sample.Config(out=str(out), count=plan.count, seed=plan.zoo.seed, aligned=True, **common, **options)
        )
    evaluate.evaluate(evaluate.Config(zoo=str(out), device=plan.device))
    training = MakeConfig(
        out=f"{out}-trained", start=str(out), epochs=max(plan.more), device=plan.zoo.device, threads=plan.zoo.threads
    )
    trained = make(training)
    found = {f"epoch {epoch}": accuracy_of(trained, epoch) for epoch in (0, *plan.more)}
    if plan.other_data is not None:
        name = Path(plan.other_data).name
        other = replace(training, out=f"{out}-{name}", data=plan.other_data, validation=0, limit=plan.other_limit)
        trained = make(other)
        found |= {f"{name} epoch {epoch}": accuracy_of(trained, epoch) for epoch in (0, *plan.more)}
    return found


def accuracy_of(zoo: Zoo, epoch: int) -> float:
    return float(zoo.numbers("test_accuracy")[zoo.numbers("epoch") == epoch].mean())


def print_table(found: dict[str, Any], more: Sequence[int]) -> None:
    scratch = ", ".join(f"{name} {value:.3f}" for name, value in found["scratch"].items())
    print(f"\nnetworks of the zoo {found['zoo']:.3f}; from scratch: {scratch}")
    columns = ["epoch 0", *(f"epoch {epoch}" for epoch in more), "novelty", "spread", "apart"]
    print(f"{'':36}" + "".join(f"{column:>9}" for column in columns))
    for name, row in found["sets"].items():
        row = {"epoch 0": row.get("accuracy")} | row
        cells = ("" if row.get(column) is None else f"{row[column]:.3f}" for column in columns)
        print(f"{name:36}" + "".join(f"{cell:>9}" for cell in cells))
    for sentence in found["verdicts"].values():
        print(sentence)
