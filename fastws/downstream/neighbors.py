"""Which networks of a zoo are most like each other, by their embeddings."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastws.downstream.embed import load_embeddings
from fastws.downstream.hub import load_hub, require_one
from fastws.windows.headers import read_models
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.zoo import Zoo

Metric = Literal["cosine", "l2"]
AT_ONCE = 1024  # networks whose distances to all others are in memory


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints for each network those that are nearest to it by embedding, other states of itself left out.

    fastws neighbors --embeddings embeddings.safetensors --hub models --count 3
    fastws neighbors --embeddings embeddings.safetensors --zoo zoos/digits --model 000012 --metric l2 --json
    """

    embeddings: str  # safetensors file of fastws embed
    zoo: str | None = None  # folder of the zoo that was embedded
    hub: str | None = None  # or the folder of safetensors files that was embedded

    model: tuple[str, ...] = ()  # ids of the networks whose neighbours are wanted; by default all
    count: int = 5  # neighbours of each network
    metric: Metric = "cosine"  # cosine: 1 less the cosine of two embeddings; l2: their Euclidean distance
    every: bool = False  # look at every state of the networks, not at the last of each alone
    json: bool = False  # print JSON instead of a table

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"neighbors: count must be at least 1, got {self.count}")
        require_one("neighbors", self.zoo, self.hub)


class Neighbors(NamedTuple):
    """The nearest of each query, nearest first; those behind the last have index -1 and distance infinity."""

    index: Tensor  # [q, k] int64, into the embeddings
    distance: Tensor  # [q, k] float64


class States(NamedTuple):
    """Networks that are compared: one state of each, or all of them."""

    embeddings: Tensor  # [n, E]
    models: list[str]  # ids of the networks
    epochs: list[int | None]


def run(config: Config) -> None:
    states = states_of_zoo(config) if config.hub is None else states_of_hub(config)
    unknown = sorted(set(config.model) - set(states.models))
    if unknown:
        known = f"those of the {'zoo' if config.hub is None else 'hub'}, for example {', '.join(states.models[:3])}"
        raise ValueError(f"neighbors: model must be of {known}, got {unknown[0]!r}")
    asked = [place for place, model in enumerate(states.models) if not config.model or model in config.model]
    found = nearest(states.embeddings, states.models, torch.tensor(asked), config.count, config.metric)

    def state(place: int) -> dict[str, Any]:
        return {"model": states.models[place], "epoch": states.epochs[place]}

    answers = []
    for query, index, distance in zip(asked, found.index.tolist(), found.distance.tolist(), strict=True):
        near = [state(place) | {"distance": value} for place, value in zip(index, distance, strict=True) if place >= 0]
        answers.append(state(query) | {"neighbors": near})
    print(json.dumps({"metric": config.metric, "networks": answers}) if config.json else table(answers))


def states_of_zoo(config: Config) -> States:
    zoo = Zoo.open(config.zoo)
    embeddings = load_embeddings(config.embeddings, len(zoo), zoo.layout)
    models = zoo.properties["model"].cast("string").to_pylist()
    rows = torch.arange(len(zoo)) if config.every else torch.tensor(sorted(last_rows(zoo).values()))
    known = "epoch" in zoo.properties.column_names
    epochs = zoo.numbers("epoch")[rows.numpy()].tolist() if known else [math.nan] * len(rows)
    owners = [models[row] for row in rows.tolist()]
    return States(embeddings[rows], owners, [None if math.isnan(epoch) else int(epoch) for epoch in epochs])


def states_of_hub(config: Config) -> States:
    models, embeddings = load_hub(config.embeddings)
    gone = sorted(set(models) - {model.name for model in read_models(Path(config.hub))[0]})
    if gone:
        what = f"the models of hub {config.hub}, got {gone[0]!r}, which it does not hold"
        raise ValueError(f"neighbors: {config.embeddings} must be of {what}")
    return States(embeddings, models, [None] * len(models))


def nearest(
    embeddings: Tensor, owners: Sequence[str], queries: Tensor, count: int, metric: Metric = "cosine"
) -> Neighbors:
    """The nearest states of other networks.

    Args:
        embeddings: ``[n, E]``.
        owners: The network of each, ``n`` names; states of one network are no neighbours of each other.
        queries: Rows whose neighbours are wanted, ``[q]`` int64.
        count: How many, k.
        metric: ``"cosine"``, of which embeddings of length 0 have 1 to all others, or ``"l2"``.
    """
    number = {model: code for code, model in enumerate(dict.fromkeys(owners))}
    owner = torch.tensor([number[model] for model in owners])
    points = embeddings.double()
    if metric == "cosine":
        points = torch.nn.functional.normalize(points, dim=1)
    count = min(count, len(points))
    parts = []
    for some in queries.split(AT_ONCE):
        if metric == "cosine":
            distances = 1 - points[some] @ points.T
        else:
            distances = torch.cdist(points[some], points, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.masked_fill(owner[some][:, None] == owner, torch.inf)
        ordered, index = distances.sort(dim=1, stable=True)  # of equals the first row
        parts.append((index[:, :count].where(ordered[:, :count].isfinite(), -1), ordered[:, :count]))
    if not parts:
        return Neighbors(torch.zeros(0, count, dtype=torch.int64), torch.zeros(0, count, dtype=torch.float64))
    return Neighbors(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def table(answers: Sequence[dict[str, Any]]) -> str:
    def name(state: dict[str, Any]) -> str:
        return state["model"] if state["epoch"] is None else f"{state['model']} @ {state['epoch']}"

    width = max([len(name(answer)) for answer in answers] + [len("network")])
    lines = [f"{'network':<{width}}  nearest first, with distances"]
    for answer in answers:
        near = "  ".join(f"{name(other)} {other['distance']:.4f}" for other in answer["neighbors"])
        lines.append(f"{name(answer):<{width}}  {near}")
    return "\n".join(lines)
