"""Zoos that begin with the networks of another: what was sampled or trained before is trained on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.small_cnn.table import ACTIVATIONS
from fastws.zoo.format.manifest import read_manifest
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.recipes import Plan, Recipe, check_choices

# what a zoo does not hand on: where it lies, which networks it has, and how they were drawn
OWN = (
    "zoo",
    "preset",
    "explain",
    "start",
    "networks",
    "sampling",
    "seed",
    "order",
    "device",
    "threads",
    "wave",
    "dtype",
)
ONE = ("optimizers", "lrs", "weight_decays")  # of which all networks that begin so have the same


def options(start: str, config: object) -> dict[str, Any]:
    """Values for the options of ``zoo make`` that are not given: those with which the zoo ``start`` was made.

    Raises:
        FileNotFoundError: If there is no such zoo.
        ValueError: If another program made it.
    """
    if all(value is not None for name, value in vars(config).items() if name != "limit"):
        return {}  # a configuration that was filled before, when a finished zoo is opened
    provenance = read_manifest(Path(start))["provenance"]
    made = provenance.get("config") if isinstance(provenance, dict) else None
    if not isinstance(made, dict) or not {"architecture", "data", *ONE} <= set(made):
        what = "made by fastws zoo make, or sampled from such a zoo, so that it says what its networks are"
        raise ValueError(f"zoo make: start must be {what}, got {start}")
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in made.items()}
    count = len(last_rows(Zoo.open(start)))
    return {name: value for name, value in found.items() if name not in OWN} | {
        "networks": count,
        "limit": made["limit"],
    }


def networks(config: Any, plan: Plan) -> tuple[list[Recipe], dict[str, Tensor]]:
    """The recipes of the networks of ``config.start``, and the weights that each begins with.

    A network keeps its id, its activation and its dropout; how it is trained is as the options say.

    Raises:
        ValueError: If the networks are of another architecture, or an option names several choices.
    """
    zoo = Zoo.open(config.start)
    for name in ONE:
        if len(getattr(config, name)) != 1:
            what = f"one choice for the networks of start, got {getattr(config, name)}"
            raise ValueError(f"zoo make: {name} must name {what}; give --{name.replace('_', '-')}")
    with torch.device("meta"):
        Layout.from_checkpoint(plan.build()).require_same(zoo.layout, f"zoo make: start {zoo.path}")
    last = last_rows(zoo)
    chosen = dict(list(last.items())[: config.networks])
    rows, known = list(chosen.values()), zoo.properties.column_names
    own = {
        name: zoo.properties[name].take(rows).to_pylist() if name in known else [default] * len(rows)
        for name, default in (("activation", config.activations[0]), ("dropout", config.dropouts[0]))
    }
    check_choices(zoo.path, "activation", own["activation"], ACTIVATIONS)
    trained = config.inits[0], config.optimizers[0], config.lrs[0], config.weight_decays[0]
    recipes = [
        Recipe(model, config.seed + number, own["activation"][number], own["dropout"][number] or 0.0, *trained)
        for number, model in enumerate(chosen)
    ]
    return recipes, dict(zip(chosen, zoo.rows(rows).float(), strict=True))
