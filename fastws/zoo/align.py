"""Alignment of a zoo: every network's neurons in the order that fits those of the others (arXiv 2209.04836).

Networks that differ by the order of their neurons, or where activations are odd by signs of neurons, are one function.
Weight matching finds, by coordinate descent over the groups of the architecture, the order and the signs that are
closest to the mean of the other networks of the training split, or to one reference network. A zoo keeps one
permutation per model, a few kB, beside its weights; ``aligned_rows`` applies them while it reads. The permutations of a
canonical form, which sorts each network's neurons by themselves, are kept in the same way, in a file of their own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from fastws.files.lock import one_writer
from fastws.matching.canonical import Form, canonical
from fastws.matching.match import Norms, batch_size, match, objective
from fastws.matching.mean import match_to_mean
from fastws.zoo.alignment import ALIGNMENT, CANONICAL, Alignment, symmetry_of
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.writer import store_symmetry
from fastws.zoo.format.zoo import ODD, Zoo
from fastws.zoo.making.given import trace_network


@dataclass(frozen=True, kw_only=True)
class Config:
    """Aligns the networks of a zoo to their mean or to one of them, or sorts each, and keeps the permutations.

    fastws zoo align --zoo zoos/digits
    fastws zoo align --zoo zoos/digits --canonical l2
    """

    zoo: str  # folder of the zoo, which the permutations are kept in

    out: str | None = None  # file to write; by default alignment.safetensors or canonical.safetensors in the zoo
    reference: str | None = None  # model to match all others to; by default the mean of the aligned train split
    best: str | None = None  # whose last value says which model to begin with; val_accuracy or else test_accuracy
    signs: bool = True  # units of networks whose activation is odd may change their sign too
    architecture: str | None = None  # of a zoo without symmetry: that of zoo make, or module:function, which returns it
    image_shape: tuple[int, int, int] = (1, 28, 28)  # channels, height and width that the architecture takes
    num_classes: int = 10  # logits of the architecture, if it is one of zoo make
    canonical: Form | None = None  # sort each network's neurons instead, by l2 norm or in lexicographic order
    norms: Norms = "exclude"  # whether running means and variances count in the distance
    sweeps: int = 100  # most visits of each permutation group
    restarts: int = 1  # runs of the matching, which visit groups in other orders; each network keeps its best
    device: str = "cpu"  # that the matching computes on, cpu or cuda

    def __post_init__(self):
        for name in ("sweeps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"zoo align: {name} must be at least 1, got {getattr(self, name)}")


def align(config: Config) -> Alignment:
    """Matches the last state of every model of a zoo to that of the reference, or sorts it; writes the permutations.

    All states of a model get the permutation of its last one, so that its path through training stays a path.

    Raises:
        ValueError: If the zoo has no symmetry or no models, the architecture is another one, or there is no such
            reference or property.
        OSError: If the file cannot be written, or another process is writing it.
    """
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"zoo align: device must be cpu where no GPU is, got {config.device!r}")
    zoo = Zoo.open(config.zoo)
    with one_writer(written(config)):
        return align_zoo(config, zoo)


def align_zoo(config: Config, zoo: Zoo) -> Alignment:
    if config.architecture is not None:
        zoo = give_symmetry(config, zoo)
    symmetry, layout, last = symmetry_of(zoo), zoo.layout, last_rows(zoo)
    reference, chosen = choose_reference(config, zoo, last)
    rows, norms = torch.tensor(list(last.values())), {"norms": config.norms}
    may_flip = zoo.may_flip[rows] & config.signs
    options = norms | {"sweeps": config.sweeps, "restarts": config.restarts}
    method = config.canonical or ("mean" if config.reference is None else "matching")
    base = goal = zoo.rows([last[reference]])[0].to(config.device)
    known, rounds = {}, 0  # permutations of networks by their number, and how often they were matched anew
    if method == "mean":
        places = training_places(zoo, last)

        def read(numbers: Tensor) -> Tensor:
            return zoo.rows(rows[places[numbers]]).to(config.device)

        together = match_to_mean(read, len(places), goal, symmetry, layout, flips=may_flip[places], **options)
        known, rounds = dict(zip(places.tolist(), together.permutations, strict=True)), together.rounds
        base = goal = together.mean.to(goal.dtype)
    elif config.canonical:
        own = may_flip[list(last).index(reference)][None]
        goal = symmetry.permute(goal, canonical(goal[None], symmetry, layout, config.canonical, flips=own), layout)[0]
    permutations, before, after = [], [], []
    with tqdm(total=len(rows), desc="align", unit=" networks") as bar:
        for numbers in torch.arange(len(rows)).split(batch_size(symmetry)):
            flat = zoo.rows(rows[numbers]).to(config.device)
            if config.canonical:
                found = canonical(flat, symmetry, layout, config.canonical, flips=may_flip[numbers])
            else:
                found = symmetry.identity(len(flat), flat.device)
                new = torch.tensor([number not in known for number in numbers.tolist()])
                for place in (~new).nonzero().flatten().tolist():
                    found[place] = known[int(numbers[place])].to(flat.device)
                if new.any():
                    found[new] = match(flat[new], goal, symmetry, layout, flips=may_flip[numbers[new]], **options)
            permutations.append(found[:, : sum(symmetry.sizes)].cpu())
            before.append(objective(flat, base, symmetry, layout, **norms).cpu())
            after.append(objective(symmetry.permute(flat, found, layout), goal, symmetry, layout, **norms).cpu())
            bar.update(len(numbers))
    results = (torch.cat(parts).contiguous() for parts in (permutations, before, after))
    alignment = Alignment(reference, chosen, config.norms, tuple(last), *results, method, rounds)
    alignment.save(zoo, written(config))
    return alignment


def give_symmetry(config: Config, zoo: Zoo) -> Zoo:
    """The zoo with the symmetry of an architecture, traced with an odd activation where any network has one."""
    names = zoo.properties["activation"].to_pylist() if "activation" in zoo.properties.column_names else []
    activation = next((name for name in names if name in ODD), "relu")
    _, symmetry = trace_network(config.architecture, config.image_shape, config.num_classes, activation)
    store_symmetry(zoo.path, symmetry)
    return Zoo.open(config.zoo)


def training_places(zoo: Zoo, last: dict[str, int]) -> Tensor:
    """The numbers of the models of the training split; of all, where it has none here."""
    training = set(zoo.splits.get("train", last))
    places = [place for place, model in enumerate(last) if model in training]
    return torch.tensor(places or range(len(last)))


def written(config: Config) -> Path:
    """The file that ``align`` writes; a canonical form has one of its own, so that it overwrites no matching."""
    return Path(config.out or Path(config.zoo) / (CANONICAL if config.canonical else ALIGNMENT))


def choose_reference(config: Config, zoo: Zoo, last: dict[str, int]) -> tuple[str, str]:
    """The id of the reference, and why it was chosen."""
    if config.reference is not None:
        if config.reference not in last:
            some = ", ".join(list(last)[:3])
            raise ValueError(f"zoo align: reference must be a model of {zoo.path}: {some} ..; got {config.reference!r}")
        return config.reference, "named"
    names = zoo.properties.column_names
    by = config.best or ("val_accuracy" if "val_accuracy" in names else "test_accuracy")
    if by not in names:
        raise ValueError(f"zoo align: best must be one of {', '.join(names)}, got {by!r}; or name a reference")
    values = zoo.numbers(by)
    where, models = ("the train split", zoo.splits["train"]) if "train" in zoo.splits else ("all models", last)
    candidates = [model for model in models if model in last and numpy.isfinite(values[last[model]])]
    if not candidates:
        what = f"none of {where} of {zoo.path} with {by}"
        raise ValueError(f"zoo align: reference must be named, got {what}")
    best = max(sorted(candidates), key=lambda model: values[last[model]])  # the first of equals
    return best, f"highest last {by} of {where}"


def run(config: Config) -> None:
    alignment = align(config)
    print(f"{written(config)}: permutations of {len(alignment.models):,} models")
    if config.canonical is not None:
        print(f"canonical form: {config.canonical}")
    to = "the mean" if alignment.method == "mean" else "the reference"
    first = f"reference: model {alignment.reference}, {alignment.chosen}"
    print(first + (f"; then {alignment.rounds} rounds to the mean" if alignment.method == "mean" else ""))
    flipped = int((alignment.permutations < 0).any(1).sum())
    print(f"networks of which units changed their sign: {flipped:,}")
    before, after = alignment.before.mean(), alignment.after.mean()
    change = f"{'gained' if after >= before else 'lost'} {abs(after - before):.4g}"
    print(f"mean inner product with {to}: {before:.4g} before, {after:.4g} after, {change}")
    print("next: --aligned of fastws train sane, embed, predict and zoo info reads the networks in this order")
