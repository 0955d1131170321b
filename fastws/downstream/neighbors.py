"""Which networks of a zoo are most like each other, by their embeddings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastws.downstream.embed import load_embeddings
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.zoo import Zoo

Metric = Literal["cosine", "l2"]
AT_ONCE = 1024  # networks whose distances to all others are in memory


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints for each network those that are nearest to it by embedding, other states of itself left out.

    fastws neighbors --embeddings embeddings.safetensors --zoo zoos/digits
    fastws neighbors --embeddings embeddings.safetensors --zoo zoos/digits --model 000012 --metric l2 --json
    """

    embeddings: str  # safetensors file of fastws embed
    zoo: str  # folder of the zoo that was embedded

    model: tuple[str, ...] = ()  # ids of the networks whose neighbours are wanted; by default all
    count: int = 5  # neighbours of each network
    metric: Metric = "cosine"  # cosine: 1 less the cosine of two embeddings; l2: their Euclidean distance
    every: bool = False  # look at every state of the networks, not at the last of each alone
    json: bool = False  # print JSON instead of a table

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"neighbors: count must be at least 1, got {self.count}")


class Neighbors(NamedTuple):
    """The nearest of each query, nearest first; those behind the last have index -1 and distance infinity."""

    index: Tensor  # [q, k] int64, into the embeddings
    distance: Tensor  # [q, k] float64


def run(config: Config) -> None:
    zoo = Zoo.open(config.zoo)
    embeddings = load_embeddings(config.embeddings, len(zoo), zoo.layout)
    models = zoo.properties["model"].cast("string").to_pylist()
    rows = torch.arange(len(zoo)) if config.every else torch.tensor(sorted(last_rows(zoo).values()))
    unknown = sorted(set(config.model) - set(models))
    if unknown:
        known = f"those of the zoo, for example {', '.join(models[:3])}"
        raise ValueError(f"neighbors: model must be of {known}, got {unknown[0]!r}")
    owners = [models[row] for row in rows.tolist()]
    asked = [place for place, model in enumerate(owners) if not config.model or model in config.model]
    found = nearest(embeddings[rows], owners, torch.tensor(asked), config.count, config.metric)
    epochs = zoo.numbers("epoch")[rows.numpy()].tolist() if "epoch" in zoo.properties.column_names else None

    def state(place: int) -> dict[str, Any]:
        known = epochs is not None and epochs[place] == epochs[place]
        return {"model": owners[place], "epoch": int(epochs[place]) if known else None}

    answers = []
    for query, index, distance in zip(asked, found.index.tolist(), found.distance.tolist(), strict=True):
        near = [state(place) | {"distance": value} for place, value in zip(index, distance, strict=True) if place >= 0]
        answers.append(state(query) | {"neighbors": near})
    print(json.dumps({"metric": config.metric, "networks": answers}) if config.json else table(answers))


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
