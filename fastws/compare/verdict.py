"""Verdicts on two networks, and how they are told."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fastws.compare.changes import Change
from fastws.compare.kinship import Agreement, in_words

Verdict = Literal["identical", "same numbers", "same network", "relative", "stranger", "undecided", "not comparable"]
RELATED = math.log(1e-3)  # of the probability that strangers are as close
SHOWN = 12  # tensors in the text


@dataclass
class Same:
    """What ``same`` found.

    Attributes:
        verdict: One word or two, see ``same``.
        sentence: The verdict in words.
        scope: What was looked at: ``"stored coordinates"``, or also ``"permutations and signs"``.
        log_p: Natural logarithm of the probability that strangers are as close; None without an error rate.
        kinds: What was done to one of them, in words.
        child: ``"a"`` or ``"b"``, the one that was made of the other, where that is certain; else None.
        changes: What was found out about each tensor, in the coordinates in which they are closer.
        distances: ``||a - b|| / (||a|| ||b||)**0.5`` of all weights, ``"raw"`` and, with a module, ``"matched"``.
        rated: Whether there is an error rate for all that was looked at.
        agreement: Units that have their own number, of those that were compared.
        notes: What the verdict does not cover.
    """

    verdict: Verdict
    sentence: str
    scope: str = "stored coordinates"
    log_p: float | None = None
    kinds: list[str] = field(default_factory=list)
    child: str | None = None
    changes: list[Change] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)
    rated: bool = True
    agreement: Agreement | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON; of p also the decimal logarithm, which does not underflow."""
        known = self.log_p is not None
        agreed = self.agreement
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "scope": self.scope,
            "p": math.exp(self.log_p) if known else None,
            "log10_p": self.log_p / math.log(10) if known else None,
            "kinds": self.kinds,
            "child": self.child or "unknown",
            "distances": {name: finite(value) for name, value in self.distances.items()},
            "units": {"own": agreed.fixed, "compared": agreed.compared} if agreed else None,
            "notes": self.notes,
            "tensors": [describe_change(change) for change in self.changes],
        }


def describe_change(change: Change) -> dict[str, Any]:
    found = change.difference
    return {
        "name": found.name,
        "shape": list(found.shape),
        "kind": change.kind,
        "found": change.text,
        "distance": finite(found.distance),
        "cosine": found.cosine,
        "unequal": found.unequal,
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def lines_of(found: Same) -> Iterator[str]:
    """A verdict as text, tensors that changed most first."""
    yield found.sentence
    yield from (f"  {kind}" for kind in found.kinds)
    if found.child is not None:
        yield f"  {found.child} was made of the other"
    if found.agreement is not None and found.agreement.compared:
        fixed, compared = found.agreement.fixed, found.agreement.compared
        yield f"  {fixed} of {compared} units are most alike to those of their own number"
    for name, value in found.distances.items():
        yield f"  distance {name}: {value:.3g}"
    yield from (f"  {note}" for note in found.notes)
    moved = sorted((x for x in found.changes if x.kind != "frozen"), key=lambda x: -x.difference.distance)
    if moved:
        width = max(len(x.difference.name) for x in moved[:SHOWN])
        yield "tensors that changed, the most changed first:"
        yield from (f"  {x.difference.name:{width}}  {x.text}" for x in moved[:SHOWN])
        if len(moved) > SHOWN:
            yield f"  and {len(moved) - SHOWN} more; --json lists all"


def say_related(found: Same) -> None:
    """The verdict that a probability gives."""
    where = found.scope if found.scope == "stored coordinates" else f"stored coordinates or after {found.scope}"
    told = f"p = {in_words(found.log_p)}"
    if found.log_p is not None and found.log_p < RELATED:
        found.verdict = "relative"
        found.sentence = f"relatives: strangers are as close with {told}, in {where}"
    elif found.log_p is None:
        found.verdict = "undecided"
        found.sentence = f"undecided: there is no error rate in {where}"
    elif found.rated:
        found.verdict = "stranger"
        found.sentence = f"strangers: no closer than others, {told}, in {where}"
    else:
        found.verdict = "undecided"
        found.sentence = f"undecided: strangers in stored coordinates ({told}), unknown after {found.scope}"
