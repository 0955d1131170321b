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
from fastws.zoo.making.architectures import initialize
from fastws.zoo.making.recipes import Plan, Recipe, check_choices
from fastws.zoo.making.transfer import carry_over

# what a zoo does not hand on: where it lies, which networks it has, and how they were drawn
OWN = (
    "zoo",
    "preset",
    "explain",
    "start",
    "regularise",
    "regularise_at",
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
    if all(value is not None for name, value in vars(config).items() if name not in ("limit", "regularise")):
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
    last = last_rows(zoo)
    chosen = dict(list(last.items())[: config.networks])
    rows, known = list(chosen.values()), zoo.properties.column_names
    own = {
        name: zoo.properties[name].take(rows).to_pylist() if name in known else given(name, choices, zoo) * len(rows)
        for name, choices in (("activation", config.activations), ("dropout", config.dropouts))
    }
    check_choices(zoo.path, "activation", own["activation"], ACTIVATIONS)
    trained = config.inits[0], config.optimizers[0], config.lrs[0], config.weight_decays[0]
    recipes = [
        Recipe(model, config.seed + number, own["activation"][number], own["dropout"][number] or 0.0, *trained)
        for number, model in enumerate(chosen)
    ]
    return recipes, dict(zip(chosen, weights_of(config, plan, zoo, recipes, rows), strict=True))


def weights_of(config: Any, plan: Plan, zoo: Zoo, recipes: list[Recipe], rows: list[int]) -> Tensor:
    """The weights that networks begin with, ``[M, P]``: their own, or what of them fits others.

    Others are networks of another architecture, or with a head for another number of classes.

    What does not fit is initialised as networks without a start are; how much is carried over is printed.

    Raises:
        ValueError: If nothing fits.
    """
    weights, made = zoo.rows(rows).float(), zoo.provenance["config"]
    with torch.device("meta"):
        layout = Layout.from_checkpoint(plan.build())
    if layout.fingerprint == zoo.layout.fingerprint:
        return weights
    found, carried = carry_over(weights, zoo.layout, layout)
    if not carried.any():
        what = f"an architecture with layers of {made['architecture']}, of which {zoo.path} is, got {plan.architecture}"
        raise ValueError(f"zoo make: architecture must be {what}")
    for row, recipe in zip(found, recipes, strict=True):
        network = plan.build(recipe.activation)
        initialize(network, recipe.init, recipe.seed)
        row[~carried] = layout.flatten(network.state_dict())[~carried]
    print(
        f"{int(carried.sum()):,} of {len(carried):,} weights are carried over from {made['architecture']} "
        f"to {plan.architecture}, the others are initialised by {recipes[0].init}"
    )
    return found


def given(name: str, choices: tuple[Any, ...], zoo: Zoo) -> list[Any]:
    """The one choice of a property that networks do not say themselves; a guess would be a wrong network."""
    if len(choices) != 1:
        what = f"one choice for networks of start that do not say theirs, those of {zoo.path}, got {choices}"
        raise ValueError(f"zoo make: {name}s must name {what}; give --{name}s")
    return list(choices)
