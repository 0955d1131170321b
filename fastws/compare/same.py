"""``fastws same``: whether two checkpoints are one network, relatives or strangers."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import tyro
from torch import Tensor

from fastws.compare.changes import find_changes, summarise
from fastws.compare.differences import Difference, coarser, compare_tensors, rounding, total
from fastws.compare.kinship import ENOUGH_NULL, LEAST_NULL, agreement, find_families, in_words, log_empirical
from fastws.compare.modules import Checkpoint, Words
from fastws.compare.moving import HELPFUL, Mover, find_mover
from fastws.compare.paired import Paired, pair, why_not
from fastws.compare.verdict import Same, lines_of, say_related
from fastws.terminal import json_alone, shorten, tell

ROUNDED = 4.0  # times the rounding of the coarsest dtype: what may be left of one network that was cast or scaled
FEW_ROWS = 16  # of a tensor that has grown, below which it is a new head


@dataclass(frozen=True, kw_only=True)
class Config(Words):
    """Says whether two checkpoints are the same network, relatives or strangers, and what was done to one of them.

    fastws same base.safetensors finetuned.safetensors
    fastws same base/ other/ --null strangers/ --json

    Checkpoints are what fastws layout reads: files, indices of several, folders of transformers. Where the module is
    known (by config.json beside the file, or --architecture) neurons are matched too; else their stored order counts.
    """

    a: Annotated[str, tyro.conf.Positional]  # a checkpoint
    b: Annotated[str, tyro.conf.Positional]  # the other one

    null: str | None = None  # folder of unrelated networks of the architecture, which say how close strangers get
    whole: bool | None = None  # look for scales and rotations too, which takes minutes; by default of small networks
    json: bool = False  # print JSON instead of text


def run(config: Config) -> None:
    options = {"null": config.null, "whole": config.whole, "progress": not config.json}
    with json_alone(config.json):
        found = same(config.a, config.b, words=config, **options)
    tell(found.to_dict(), lines_of(found), config.json)


class Question(NamedTuple):
    """What is asked of two networks that are comparable and not equal."""

    a: Checkpoint
    b: Checkpoint
    paired: Paired
    weights: list[Difference]
    mover: Mover | None
    why_none: str
    null: str | os.PathLike | None
    progress: bool


def same(
    a: str | os.PathLike,
    b: str | os.PathLike,
    *,
    words: Words | None = None,
    null: str | os.PathLike | None = None,
    whole: bool | None = None,
    progress: bool = False,
) -> Same:
    """Whether two checkpoints are one network, relatives or strangers.

    In this order: *identical* (equal bytes), *same numbers* (after a cast to the coarser dtype), *same network* (equal
    but for the order and the signs of neurons, up to 4 times the rounding of the dtype), *relative* (strangers are as
    close with p < 0.001), *stranger*; *undecided* without an error rate; *not comparable*. In stored coordinates p is
    exact (``fastws.compare.kinship.agreement``). Modulo the symmetry there is no closed form, because neurons of one
    task resemble each other: p then comes from ``null``, and the better of both is taken, doubled.

    Args:
        a: A checkpoint: file, index of several, or folder of transformers. It is read out of core, once and, where it
            has changed, a second time.
        b: The other one.
        words: Says the module; by default it is found by the ``config.json`` beside a.
        null: Folder of networks of the same architecture that are not related, six or more.
        whole: Whether to match at the whole group (scales, rotations, ...) beside permutations and signs; by default of
            networks of at most 2**20 weights, because finding it takes minutes for large ones.
        progress: Whether bars are shown.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is damaged or quantised, the module does not fit, or weights are not finite.
    """
    one, two = Checkpoint.open_whole(a), Checkpoint.open_whole(b)
    paired = pair(one, two)
    if reason := why_not(paired, one, two):
        return Same("not comparable", f"not comparable: {reason}")
    found = list(compare_tensors(paired.weights | paired.statistics, "same", progress))
    complete = not (paired.rows or paired.reshaped or any(paired.only))
    equal = complete and not any(x.unequal for x in found)
    if equal and paired.others_equal and all(x.identical for x in found):
        return Same("identical", f"identical: all {len(found)} floating tensors hold the same bytes")
    if bad := next((x for x in found if x.nonfinite), None):
        where = f"same: {shorten(bad.name)!r} of {a} and {b}"
        raise ValueError(f"{where} must be finite, got {bad.nonfinite} NaN or infinite numbers; mend the checkpoint")
    if equal:
        return Same("same numbers", f"same numbers: {tell_cast(found, paired)}")
    mover, why = None, "permutations were not looked at: not all tensors correspond"
    if complete:
        mover, why = find_mover(one, words or Words(), whole)
    weights = [x for x in found if x.name in paired.weights]
    return judge(Question(one, two, paired, weights, mover, why, null, progress))


def judge(asked: Question) -> Same:
    """The verdict on two networks whose numbers differ."""
    pairs, raw = asked.paired.weights, total(asked.weights)
    ours, theirs = ({name: tensors[side] for name, tensors in pairs.items()} for side in (0, 1))
    agreed = agreement(ours, theirs, find_families({name: tuple(x.shape) for name, x in ours.items()}))
    result = Same("stranger", "", log_p=agreed.log_p, distances={"raw": raw.distance}, agreement=agreed)
    result.notes += tell_grown(asked.paired)
    found = asked.weights
    if asked.mover is None:
        result.notes.append(asked.why_none)
    else:
        pairs, found = match_both(asked, result)
    if result.verdict == "same network":
        return result
    say_related(result)
    if result.verdict == "relative":
        result.changes = list(find_changes(pairs, found))
        told = summarise(result.changes)
        result.kinds, result.child = told.kinds, told.child
    return result


def match_both(asked: Question, result: Same) -> tuple[Mapping[str, tuple[Tensor, Tensor]], list[Difference]]:
    """Looks at b in the coordinates of a; the pairs of tensors and their differences where they are closer."""
    paired, mover = asked.paired, asked.mover
    everything = paired.weights | paired.statistics
    base, other = ({name: tensors[side] for name, tensors in everything.items()} for side in (0, 1))
    moved = mover.move(other, base)
    aligned, matched = beside(paired, moved, asked.progress)
    least = permuted = result.distances["matched"] = total(matched).distance
    if mover.group is not None:
        moved, least = mover.move_whole(other, base)
        result.distances["whole group"] = least
        if least < HELPFUL * permuted:
            aligned, matched = beside(paired, moved, asked.progress)
        least = min(least, permuted)
    result.scope = mover.scope
    result.notes += mover.notes
    closer = total(matched).gap < total(asked.weights).gap
    # neurons that only moved are what they were, bit for bit; casts, scales and rotations round
    exact = least >= HELPFUL * permuted and all(one == other for one, other in (x.dtypes for x in matched))
    if least <= (0 if exact else ROUNDED * max(rounding(coarser(*x.dtypes)) for x in matched)):
        what = f"equal but for {mover.scope} of neurons" if closer else "equal but for rounding"
        result.verdict, result.sentence, result.log_p = "same network", f"same network: {what}", None
        return aligned, matched
    null = [] if asked.null is None else mover.strangers(asked.null, (asked.a, asked.b), asked.progress)
    rate, pairs = log_empirical(least, null), f"{len(null)} pairs of strangers"
    if rate is not None:
        how = "counted among" if len(null) >= ENOUGH_NULL else "the tail of a normal distribution of log distances of"
        result.notes.append(f"p of matched neurons is {in_words(rate)}, {how} {pairs}")
        result.log_p = min(0.0, math.log(2) + min(rate, result.log_p or 0.0))
    else:
        result.rated = False
        need = f"{LEAST_NULL} are needed, those of six networks: give --null FOLDER"
        result.notes.append(f"matched neurons have no error rate: {pairs} are given, {need}")
    return (aligned, matched) if closer else (paired.weights, asked.weights)


def beside(paired: Paired, moved: Mapping[str, Tensor], progress: bool):
    """The weights of a beside others of b, and how they differ."""
    pairs = {name: (tensor, moved[name]) for name, (tensor, _) in paired.weights.items()}
    return pairs, list(compare_tensors(pairs, "matched", progress))


def tell_cast(found: list[Difference], paired: Paired) -> str:
    dtypes = {tuple(str(dtype).removeprefix("torch.") for dtype in x.dtypes) for x in found}
    casts = sorted(f"{one} and {other}" for one, other in dtypes if one != other)
    if casts:
        return f"equal as numbers of the coarser dtype, of {'; '.join(casts)}"
    return "equal but for the sign of zeros" if paired.others_equal else "equal but for tensors of integers"


def tell_grown(paired: Paired) -> list[str]:
    """Sentences about what is not in the comparison."""
    told = list(paired.reshaped)
    for one in paired.rows:
        (difference,) = compare_tensors({one.name: paired.grown[one.name]}, progress=False)
        shared = min(one.rows)
        kept = shared >= FEW_ROWS and difference.cosine > 0.5
        what = f"the first {shared} are alike, cosine {difference.cosine:.2f}" if kept else "they are not alike"
        told.append(f"{shorten(one.name)!r} has {one.rows[0]} rows in a and {one.rows[1]} in b; {what}")
    for side, names in zip("ab", paired.only, strict=True):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            told.append(f"only {side} has {shorten(names[0])!r}{more}")
    return told
