"""What aligns the networks of a zoo: a permutation for each model, in a file beside its weights.

Found by ``fastws zoo align``, of a matching or of a canonical form; ``aligned_rows`` applies it while rows are read.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.compute
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastws.checks import is_permutation
from fastws.files.atomic import write_tensors
from fastws.files.json import parse
from fastws.files.safetensors import open_tensors
from fastws.matching.match import Norms
from fastws.signed import split
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.format.zoo import Zoo

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


def symmetry_of(zoo: Zoo) -> Symmetry:
    if zoo.symmetry is None:
        fix = "give --architecture to fastws zoo align, or write it with that of Symmetry.trace"
        raise ValueError(f"{zoo.path}: zoo must have a symmetry, got none; {fix}")
    return zoo.symmetry
