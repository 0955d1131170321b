"""``fastws lineage``: which checkpoints of a folder are relatives, and how they descend from each other."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastws import pages
from fastws.compare import lineage_page
from fastws.compare.collection import Collection, collect
from fastws.compare.kinship import in_words
from fastws.compare.modules import Words
from fastws.compare.moving import Mover, find_mover
from fastws.compare.relate import Group, relate
from fastws.files.atomic import write_file, write_json
from fastws.terminal import json_alone, tell


@dataclass(frozen=True, kw_only=True)
class Config(Words):
    """Finds relatives among the checkpoints of a folder: copies, fine-tuned, quantised, pruned and averaged networks.

    fastws lineage checkpoints/ --out lineage.html
    fastws lineage checkpoints/ --architecture resnet18 --json

    Directions are told where they are certain, or strong (one network with three relatives); else they are unknown.
    """

    folder: Annotated[str, tyro.conf.Positional]  # of checkpoint files, or of folders of transformers

    out: str | None = None  # page to write, .html, with its numbers beside it, .json
    whole: bool = False  # look for scales and rotations too, which takes minutes for large networks
    json: bool = False  # print JSON instead of text


@dataclass
class Lineage:
    """What ``lineage`` found.

    Attributes:
        groups: Networks of one architecture each, that of most networks first.
        left_out: Files that could not be read, and why.
    """

    groups: list[Group] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: networks by name."""
        return {"groups": [describe_group(group) for group in self.groups], "left_out": self.left_out}


def run(config: Config) -> None:
    if config.out is not None:
        pages.require_matplotlib("lineage")
        if not config.out.endswith(".html"):
            raise ValueError(f"lineage: out must be a page that ends with .html, got {config.out}")
    with json_alone(config.json):
        found = lineage(config.folder, words=config, whole=config.whole, progress=not config.json)
    described = found.to_dict()
    if config.out is not None:
        path = Path(config.out)
        write_json(path.with_suffix(".json"), described)
        title = f"lineage of {Path(os.path.realpath(config.folder)).name}"
        write_file(path, pages.document(title, lineage_page.body(title, found.groups, found.left_out)).encode())
    report = [] if config.out is None else [f"report: {config.out}"]
    tell(described, [*lines_of(found), *report], config.json)


def lineage(
    folder: str | os.PathLike, *, words: Words | None = None, whole: bool = False, progress: bool = False
) -> Lineage:
    """Which checkpoints of a folder are relatives, and how they descend from each other.

    Networks of one architecture are compared, all pairs at once: units of strangers are exchangeable, so that they
    agree no more than when they are shifted against each other. Pairs that do (at a rate of 0.001 of false discoveries)
    are candidates. Where the module is known, so are those with like invariants (``fastws.compare.sketches``), if they
    are near when matched. Relations are told where strangers are as close with p < 0.001: exactly in stored coordinates
    (``fastws.compare.kinship``), and after matching by random pairs of the folder. What is told of them is in
    ``fastws.compare.tree``; the idea of a tree of models is that of arXiv 2405.18432.

    Args:
        folder: Of checkpoint files (safetensors, torch), in it and in folders in it, or folders of transformers.
        words: Says the module; by default it is found by the ``config.json`` beside a checkpoint.
        whole: Whether networks are matched at the whole group, beside permutations and signs.
        progress: Whether bars are shown.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds fewer than two checkpoints that can be read, or the module does not fit.
    """
    collection = collect(folder, progress)
    return Lineage(list(relate_all(collection, words or Words(), whole, progress)), collection.left_out)


def relate_all(collection: Collection, words: Words, whole: bool, progress: bool) -> Iterator[Group]:
    movers: list[Mover | None] = []
    notes, errors = [], []
    for group in collection.groups:
        try:
            mover, why = find_mover(group[0].checkpoint, words, whole) if len(group) > 1 else (None, "")
        except ValueError as error:  # of a module that may fit another group
            errors.append(error)
            mover, why = None, f"permutations were not looked at: {error}"
        movers.append(mover)
        notes.append([why] if why else [])
    if errors and not any(movers):
        raise errors[0]
    for group, mover, note in zip(collection.groups, movers, notes, strict=True):
        if len(group) > 1:
            yield relate(group, mover, note, progress)
        else:
            empty = torch.zeros(1, 1, dtype=torch.float64)
            yield Group([group[0].name], "nothing", [], [], [], empty, ["no other network is of its architecture"])


# --- what is told


def describe_group(group: Group) -> dict[str, Any]:
    name = group.names.__getitem__
    related = {number for family in group.families for number in family}
    return {
        "networks": group.names,
        "scope": group.scope,
        "families": [[name(number) for number in family] for family in group.families],
        "strangers": [own for number, own in enumerate(group.names) if number not in related],
        "relations": [
            {
                "parent": name(edge.parent) if edge.direction != "unknown" else None,
                "child": name(edge.child) if edge.direction != "unknown" else None,
                "networks": [name(edge.parent), name(edge.child)],
                "direction": edge.direction,
                "distance": edge.distance,
                "log10_p": None if edge.log_p is None else edge.log_p / math.log(10),
                "kinds": edge.kinds,
                "told": edge.told,
                "share": edge.share,
            }
            for edge in group.edges
        ],
        "duplicates": [[name(one), name(other)] for one, other in group.duplicates],
        "notes": group.notes,
    }


def lines_of(found: Lineage) -> Iterator[str]:
    """What was found, as text."""
    for group in found.groups:
        name = group.names.__getitem__
        related = sum(map(len, group.families))
        count = f"{len(group.families)} {'family' if len(group.families) == 1 else 'families'}"
        yield f"{len(group.names)} networks of one architecture: {count} of {related} networks, in {group.scope}"
        for one, other in group.duplicates:
            yield f"  {name(other)} is {name(one)}"
        for edge in sorted(group.edges, key=lambda edge: (edge.child, edge.parent)):
            arrow = {"certain": "->", "strong": "~>", "unknown": "--"}[edge.direction]
            share = "" if edge.share is None else f", {edge.share:.0%} of it"
            kinds, p = ", ".join(edge.kinds), in_words(edge.log_p)
            what = f"{kinds}{share}, distance {edge.distance:.2g}, p {p}"
            yield f"  {name(edge.parent)} {arrow} {name(edge.child)}: {what}"
        yield from (f"  {note}" for note in group.notes)
    for path, reason in found.left_out.items():
        yield f"left out: {path}: {reason}"
    yield "-> parent to child, certain; ~> likely; -- direction unknown"
