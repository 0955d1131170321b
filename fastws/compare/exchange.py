"""What leaves the function of a network as it is, printed, and written for other tools."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastws.compare.modules import Checkpoint, Words, require_network
from fastws.compare.tracing import trace_group, trace_symmetry
from fastws.files.atomic import write_file
from fastws.symmetry.exchange import Exported, to_axes_to_perm, to_perm_spec
from fastws.symmetry.symmetry import Symmetry

Format = Literal["json", "axes-to-perm", "perm-spec"]


@dataclass(frozen=True, kw_only=True)
class Config(Words):
    """Prints what may be done to the weights of a network without changing its function, line by line.

    fastws symmetry resnet20.pt --architecture cifar-resnet20-a
    fastws symmetry resnet20.pt --architecture cifar-resnet20-a --format axes-to-perm --out resnet20.json

    With out, the permutations are written for other tools: axes-to-perm is what Git Re-Basin takes, a name or null for
    each axis of each tensor; perm-spec is that of universal neural functionals, integers; json has all of it, and
    fastws.Symmetry.from_dict reads it. What a format cannot say stays, and is told.
    """

    model: Annotated[str, tyro.conf.Positional]  # checkpoint or Hugging Face folder

    whole: bool = True  # finds scales, matrices and rotations too, not permutations and signs alone
    format: Format = "json"  # of the file that is written
    out: str | None = None  # JSON file to write


def run(config: Config) -> None:
    checkpoint = Checkpoint.open(config.model)
    network = require_network(checkpoint, config)
    if config.whole:
        group = trace_group(network)
        symmetry = group.symmetry
        print(group.describe())
    else:
        symmetry = trace_symmetry(network)
        print(symmetry.describe())
    if config.out is not None:
        spec, notes = written(symmetry, config.format)
        write_file(Path(config.out), (json.dumps(spec, indent=1) + "\n").encode())
        print("\n".join([*notes, f"written: {config.out}"]))


def written(symmetry: Symmetry, form: Format) -> Exported:
    """A symmetry in a format that JSON can hold, and what it does not say."""
    if form == "json":
        return Exported(symmetry.to_dict(), [])
    exported = to_axes_to_perm(symmetry) if form == "axes-to-perm" else to_perm_spec(symmetry)
    return Exported(listed(exported.spec), exported.notes)


def listed(spec: Any) -> Any:
    """Nested dictionaries with lists for tuples."""
    return {k: listed(v) for k, v in spec.items()} if isinstance(spec, dict) else list(spec)
