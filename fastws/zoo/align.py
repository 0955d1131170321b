"""Alignment of a zoo: every network's neurons in the order that fits those of the others (arXiv 2209.04836).

Networks that differ by the order of their neurons, or where activations are odd by signs of neurons, are one function.
Weight matching finds, by coordinate descent over the groups of the architecture, the order and the signs that are
closest to the mean of the other networks of the training split, or to one reference network. A zoo keeps one
permutation per model, a few kB, beside its weights; ``aligned_rows`` applies them while it reads. The permutations of a
canonical form, which sorts each network's neurons by themselves, are kept in the same way, in a file of their own.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import pyarrow
import pyarrow.compute
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from fastws.checks import is_permutation
from fastws.files.atomic import write_tensors
from fastws.files.json import parse
from fastws.files.lock import one_writer
from fastws.files.safetensors import open_tensors
from fastws.matching.canonical import Form, canonical
from fastws.matching.match import Norms, batch_size, match, objective
from fastws.matching.mean import match_to_mean
from fastws.signed import split
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.writer import store_symmetry
from fastws.zoo.format.zoo import ODD, Zoo
from fastws.zoo.making.given import trace_network

FORMAT = 2  # 1 knew no signs and no rounds
ALIGNMENT = "alignment.safetensors"
CANONICAL = "canonical.safetensors"
ROWS_AT_ONCE = 2**26  # weights of networks that are permuted at a time, so that a zoo needs no second copy


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the models of a zoo are aligned, and to what.

    Attributes:
        reference: Id of the model whose last state the others were matched to, at first or at all.
        chosen: Why that one.
        norms: ``"exclude"`` or ``"include"``, see ``match``.
        models: Ids of all models, in the order of what follows.
        permutations: int32 ``[models, sum(symmetry.sizes)]``, ~p for a unit that changes its sign.
        before: Inner product with the mean or the reference, float64 ``[models]``.
        after: The same after the permutation; of a canonical form, after that of the reference too.
        method: ``"mean"`` of the aligned training networks, ``"matching"`` to the reference, or the canonical form.
        rounds: Of matching to the mean.
    """

    reference: str
    chosen: str
    norms: Norms
    models: tuple[str, ...]
    permutations: Tensor
    before: Tensor
    after: Tensor
    method: str = "matching"
    rounds: int = 0

    @classmethod
    def open(cls, zoo: Zoo, path: str | os.PathLike | None = None) -> "Alignment":
        """Reads what ``align`` wrote; ``path`` is a file, by default ``alignment.safetensors`` in the zoo, or
        where there is none ``canonical.safetensors``.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or was made for another architecture.
        """
        path = find_alignment(zoo) or zoo.path / ALIGNMENT if path is None else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: alignment must be there, got none; run fastws zoo align")
        try:
            with open_tensors(path) as file:
                fields = parse((file.metadata() or {})["alignment"], "what it says of itself")
                tensors = {name: file.get_tensor(name) for name in ("permutations", "before", "after")}
            made_for, version = fields.pop("fingerprint"), fields.pop("format")
            alignment = cls(**fields | {"models": tuple(fields["models"])}, **tensors)
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: file must be an alignment, got {error!r}; run fastws zoo align again") from error
        if version not in (1, FORMAT) or made_for != zoo.layout.fingerprint:
            what = f"{zoo.layout.fingerprint}, got {made_for} in format {version}"
            raise ValueError(f"{path}: alignment must be of the architecture {what}; run fastws zoo align again")
        wrong = alignment._find_wrong(symmetry_of(zoo))
        if wrong:
            raise ValueError(f"{path}: file must be an alignment, got {wrong}; run fastws zoo align again")
        return alignment

    def _find_wrong(self, symmetry: Symmetry) -> str:
        """What is no permutation of each group for each model, which ``permute`` would trust; "" if all are."""
        sizes = symmetry.sizes
        texts = (self.reference, self.chosen, self.norms, self.method, *self.models)
        if not all(isinstance(text, str) for text in texts):
            return "names that are no strings"
        if type(self.rounds) is not int:
            return f"{self.rounds!r} rounds"
        expected = {"permutations": (torch.int32, (len(self.models), sum(sizes)))}
        expected |= dict.fromkeys(("before", "after"), (torch.float64, (len(self.models),)))
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                return f"{name} {list(tensor.shape)} {tensor.dtype} in place of {list(shape)} {dtype}"
        for group, vectors in enumerate(self.permutations.split(list(sizes), 1)):
            index, negative = split(vectors)
            if not is_permutation(index) or (negative.any() and not symmetry.flips[group]):
                return f"another thing than permutations of group {group}"
        return ""

    def save(self, zoo: Zoo, path: Path) -> None:
        """Writes one safetensors file, atomically; what is not a tensor is JSON in its header."""
        fields = {name: getattr(self, name) for name in ("reference", "chosen", "norms", "models", "method", "rounds")}
        text = json.dumps(fields | {"format": FORMAT, "fingerprint": zoo.layout.fingerprint})
        tensors = {name: getattr(self, name) for name in ("permutations", "before", "after")}
        write_tensors(path, tensors, {"alignment": text})


def aligned_rows(zoo: Zoo, rows: Tensor | Sequence[int], alignment: Alignment | None = None) -> Tensor:
    """Copies of rows of a zoo ``[k, P]``, aligned: ``zoo.rows(rows)``, permuted while they are read.

    A trainer that holds its zoo in memory takes this once in place of ``zoo.rows``; nothing else changes, and random
    permutations drawn on top of it are as random as before.

    Args:
        zoo: An open zoo.
        rows: Integers in ``[0, M)``.
        alignment: That of the zoo, ``Alignment.open(zoo)``, which is also the default.

    Raises:
        FileNotFoundError: If the zoo has no alignment.
        ValueError: If a model was added since it was made.
    """
    alignment, symmetry = alignment or Alignment.open(zoo), symmetry_of(zoo)
    rows = torch.as_tensor(rows, dtype=torch.int64).flatten()
    flat, permutations = zoo.rows(rows), permutations_of(zoo, rows, alignment)
    for part in torch.arange(len(rows)).split(max(1, ROWS_AT_ONCE // zoo.layout.num_weights)):
        flat[part] = symmetry.permute(flat[part], permutations[part], zoo.layout)
    return flat


def permutations_of(zoo: Zoo, rows: Tensor, alignment: Alignment) -> Tensor:
    """What aligns the networks of rows, the groups of permutations, int32 ``[k, sum(sizes)]``.

    Raises:
        ValueError: If a model was added since the alignment was made.
    """
    ids = zoo.properties["model"].cast("string").take(pyarrow.array(rows.numpy()))
    places = pyarrow.compute.index_in(ids, value_set=pyarrow.array(alignment.models, "string"))
    if places.null_count:
        new = ids.filter(places.is_null())[0]
        raise ValueError(f"aligned_rows: models must be in the alignment, got {str(new)!r}; run fastws zoo align again")
    return alignment.permutations[torch.from_numpy(places.to_numpy().copy()).long()]


def rows_of(zoo: Zoo, aligned: bool) -> Callable[[Tensor | Sequence[int]], Tensor]:
    """What reads rows of a zoo: ``zoo.rows``, or ``aligned_rows`` with the alignment of the zoo, which is read once."""
    return partial(aligned_rows, zoo, alignment=Alignment.open(zoo)) if aligned else zoo.rows


def find_alignment(zoo: Zoo) -> Path | None:
    """The file with the alignment of a zoo: that of a matching, else that of a canonical form, if there is one."""
    return next((zoo.path / name for name in (ALIGNMENT, CANONICAL) if (zoo.path / name).is_file()), None)


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


def symmetry_of(zoo: Zoo) -> Symmetry:
    if zoo.symmetry is None:
        fix = "give --architecture to fastws zoo align, or write it with that of Symmetry.trace"
        raise ValueError(f"{zoo.path}: zoo must have a symmetry, got none; {fix}")
    return zoo.symmetry


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
