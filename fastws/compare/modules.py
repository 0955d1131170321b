"""From what a user names to networks: a checkpoint, and the module that computes with it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastws.compare.hugging_face import CONFIG, is_ignored, make_hugging_face
from fastws.files.checkpoints import load_checkpoint
from fastws.layout.layout import Layout
from fastws.nern.teachers import ARCHITECTURES, COUNTER, LIBRARIES, make_architecture
from fastws.symmetry.copies import Inputs
from fastws.zoo.making import architectures
from fastws.zoo.making.architectures import Activation, Architecture
from fastws.zoo.making.given import make_network

SHAPES = ((1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 28, 28), (1, 32, 32), (3, 64, 64))  # of images, tried in this order
LARGE = {"torchvision": 224, "timm": 224, "cifar": 32, "resnet": 64}  # pixels of example images, by what begins a name
MUST_SAY = "relu networks run as tanh go unnoticed"


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a user says of the module behind a checkpoint; commands that need one inherit these options."""

    architecture: str | None = None  # of zoo make, of train nern, or module:function; by default that of config.json
    activation: Activation | None = None  # of an architecture of zoo make, which has it from its zoo
    image_shape: tuple[int, int, int] | None = None  # channels, height and width; by default the usual ones that fit
    num_classes: int | None = None  # logits of the architecture; by default as many as the checkpoint has


class Checkpoint(NamedTuple):
    """A network on disk."""

    path: Path
    layout: Layout
    state: dict[str, Tensor]  # under plain names; memory-mapped where the file is safetensors

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Reads names, shapes and dtypes of a checkpoint; of safetensors files no more than that.

        Args:
            path: A file, the index of several (``*.index.json``), or a folder that ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or holds no network.
        """
        state = load_checkpoint(path)
        return cls(Path(path), Layout.from_checkpoint(path), state)

    @classmethod
    def open_whole(cls, path: str | Path) -> "Checkpoint":
        """``open`` for what cannot do without some weights.

        Raises:
            ValueError: Also if some of the weights are quantised, and so in no tensor that can be computed with.
        """
        opened = cls.open(path)
        if lost := opened.layout.lost:
            fix = "dequantise it where it was made"
            raise ValueError(f"{path}: checkpoint must hold its weights as floats, got {lost:,} quantised; {fix}")
        return opened


class Network(NamedTuple):
    """What computes with the weights of a checkpoint."""

    module: nn.Module  # in eval mode, with weights of its own: whose, says nobody
    inputs: Inputs  # that it takes, as ``Symmetry.trace`` does
    name: str  # what the user called it
    folder: Path | None = None  # of transformers, whose config.json it was made from


def find_network(checkpoint: Checkpoint, words: Words) -> Network | None:
    """The module that a checkpoint is of; None where neither ``words`` nor a ``config.json`` beside it says one.

    Raises:
        ValueError: If there is no such module, or it does not fit the checkpoint, in a tensor that is named.
    """
    name, folder = words.architecture, folder_of(checkpoint.path)
    if name is None and not (folder / CONFIG).is_file():
        return None
    if name is None:
        found = Network(*make_hugging_face(folder), f"the module of {folder / CONFIG}", folder)
    elif ":" in name and name.partition(":")[0] not in LIBRARIES:
        found = Network(*make_network(name, (words.image_shape or SHAPES[0]), words.num_classes or 10), name)
    else:
        found = known_network(checkpoint, words)
    require_fit(checkpoint, found)
    return found._replace(module=found.module.eval().requires_grad_(False))


def require_network(checkpoint: Checkpoint, words: Words) -> Network:
    """``find_network`` for what cannot do without.

    Raises:
        ValueError: If there is none; says which known ones would fit.
    """
    found = find_network(checkpoint, words)
    if found is None:
        fit = [name for name in ARCHITECTURES if fits(checkpoint, name)]
        what = "--architecture must say which module the weights are of where no config.json lies beside them"
        fix = f"it fits {' and '.join(fit)}" if fit else "give one of zoo make or train nern, or module:function"
        raise ValueError(f"{checkpoint.path}: {what}, got none; {fix}")
    return found


def folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


# --- architectures that have names here


def known_network(checkpoint: Checkpoint, words: Words) -> Network:
    """The network of a name; where one name is of several, the one that fits, else the first."""
    name, made = words.architecture, None
    small = name in get_args(Architecture)
    if not small or name in ARCHITECTURES:
        classes = words.num_classes or count_classes(checkpoint, partial(make_architecture, name))
        module = make_architecture(name, classes)
        pixels = next((size for begin, size in LARGE.items() if name.startswith(begin)), 224)
        shape = words.image_shape or (3, pixels, pixels)
        made = Network(module, torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), name)
        if not small or not difference(checkpoint, made.module):
            return made
    activation = words.activation or ("relu" if name in architectures.LARGE else None)
    if activation is None:
        raise ValueError(f"architecture: --activation must be given for {name}, got none; {MUST_SAY}")
    fitting = []
    for shape in [words.image_shape] if words.image_shape else SHAPES:
        with suppress(ValueError):  # images that are too small, or of other channels
            make = partial(make_network, name, shape, activation=activation)
            classes = words.num_classes or count_classes(checkpoint, lambda count, make=make: make(count)[0])
            fitting.append(Network(*make(classes), name))
            if not difference(checkpoint, fitting[-1].module):
                return fitting[-1]
    if not fitting and made is None:
        make_network(name, words.image_shape or SHAPES[0], words.num_classes or 10, activation)  # says what is wrong
    return made or fitting[0]


def count_classes(checkpoint: Checkpoint, make: Callable[[int], nn.Module]) -> int:
    """The size in the checkpoint of what depends on the number of classes, which ``make`` takes; 10 if nothing does."""
    with torch.device("meta"):
        two, three = (shapes_of(make(count)) for count in (2, 3))
    for name, shape in two.items():
        held = checkpoint.state.get(name)
        if shape != three[name] and held is not None and held.dim() == len(shape):
            return next(size for size, x, y in zip(held.shape, shape, three[name], strict=True) if x != y)
    return 10


def fits(checkpoint: Checkpoint, name: str) -> bool:
    with torch.device("meta"):
        return not difference(checkpoint, make_architecture(name, count_classes(checkpoint, ARCHITECTURES[name])))


# --- whether a module fits


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def difference(checkpoint: Checkpoint, module: nn.Module) -> str:
    """The first tensor in which a checkpoint differs from a module, in words; "" if it holds what the module needs.

    Of tensors that the module ties one is enough, and steps that batch norms count may be missing.
    """
    ours, theirs = shapes_of(module), {name: tuple(tensor.shape) for name, tensor in checkpoint.state.items()}
    tied = Layout.from_checkpoint(module).aliases
    present = {tied.get(name, name) for name in theirs}
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in theirs and (tied.get(name, name) in present or name.endswith(COUNTER)):
            continue
        if name not in ours and is_ignored(module, name):
            continue
        if ours.get(name) != theirs.get(name):
            must, got = (list(one[name]) if name in one else "nothing" for one in (ours, theirs))
            return f"{name!r} must be {must}, got {got}"
    return ""


def require_fit(checkpoint: Checkpoint, network: Network) -> None:
    if found := difference(checkpoint, network.module):
        raise ValueError(f"{checkpoint.path}: checkpoint must fit {network.name}, but {found}")
