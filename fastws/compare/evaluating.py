"""Loss and accuracy of networks on data that a user names, many networks at once."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fastws.compare.modules import Network, Words
from fastws.data.images import Transform, load, spaced
from fastws.runs.threads import map_on_threads
from fastws.small_cnn.table import ACTIVATIONS, layer_table, rows_of
from fastws.symmetry.tracer import tensors_in
from fastws.zoo.making.given import find_function
from fastws.zoo.making.measuring import in_batches, side_by_side, tally
from fastws.zoo.making.recipes import Part

IGNORED = -100  # a target that does not count
GROUP = 16  # small networks of one call: what the widest vectors hold
Load = Callable[[nn.Module], None]  # puts weights into a module
Precision = Literal["fp32", "bf16"]
Said = TypeVar("Said", bound=Words)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a user says of the data that networks are evaluated on; commands that need some inherit these options."""

    data: str | None = None  # digits, digits28, a folder of images as zoo make reads it, or module:function
    mean: tuple[float, ...] = ()  # of pixels in [0, 1], per channel or one for all; by default that of training images
    std: tuple[float, ...] = ()  # of pixels in [0, 1], per channel or one for all; by default that of training images
    limit: int | None = None  # most images of each part, evenly spaced; by default all
    statistics: int = 5000  # training images at most on which statistics are computed anew, evenly spaced

    def __post_init__(self):
        for name, least in (("limit", 2), ("statistics", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data: {name} must be at least {least}, got {value}")


class Examples(NamedTuple):
    """Inputs ``[n, ..]`` and targets, int64 ``[n]`` or ``[n, length]`` for each position of a sequence."""

    train: Part
    test: Part
    name: str

    def calibrating(self, count: int) -> Part:
        """Training inputs and their targets, evenly spaced."""
        return Part(*(spaced(x, count) for x in self.train))


class Scores(NamedTuple):
    """What a network does on data."""

    loss: float  # mean cross-entropy, in nats
    accuracy: float


def load_examples(command: str, data: Data) -> Examples:
    """The data that a user names.

    ``module:function`` is a function without arguments that returns training inputs and targets, and those for testing,
    tensors whose first axis is that of samples.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the data are damaged, or a function returns another thing.
    """
    if data.data is None:
        raise ValueError(f"{command}: --data must be given, got none; digits, a folder of images, or module:function")
    if ":" not in data.data:
        images = load(data.data, data.limit, transform=Transform(mean=data.mean, std=data.std))
        return Examples(Part(*images[:2]), Part(*images[2:4]), data.data)
    found = find_function(data.data, "data")()
    tensors = found if isinstance(found, tuple | list) else ()
    if len(tensors) != 4 or not all(isinstance(x, Tensor) and x.dim() for x in tensors):
        what = "training inputs, training targets, test inputs and test targets, four tensors"
        raise ValueError(f"{command}: {data.data} must return {what}, got {type(found).__name__}")
    if len(tensors[0]) != len(tensors[1]) or len(tensors[2]) != len(tensors[3]):
        got = ", ".join(str(len(x)) for x in tensors)
        raise ValueError(f"{command}: {data.data} must return as many inputs as targets, got {got}")
    if len(tensors[0]) < 2 or not len(tensors[2]):
        got = f"{len(tensors[0])} and {len(tensors[2])}"
        raise ValueError(
            f"{command}: {data.data} must return two training inputs and one test input at least, got {got}"
        )
    for y in (tensors[1], tensors[3]):
        if y.is_floating_point() or y.is_complex():
            raise ValueError(f"{command}: {data.data} must return integers as targets, got {y.dtype}")
    for x in (tensors[0], tensors[2]):
        if not torch.isfinite(x).all():
            raise ValueError(f"{command}: {data.data} must return finite inputs, got NaN or infinity in some")
    x, y, test_x, test_y = (spaced(x, data.limit) for x in tensors)
    return Examples(Part(x, y.long()), Part(test_x, test_y.long()), data.data)


def with_images(words: Said, examples: Examples | None) -> Said:
    """What a user said of a module, which takes images of the shape of the data unless another one is said."""
    if words.image_shape is not None or examples is None or examples.test.x.dim() != 4:
        return words
    return replace(words, image_shape=tuple(examples.test.x.shape[1:]))


def require_inputs(command: str, network: Network, examples: Examples) -> None:
    """Raises ValueError if the network does not take inputs of the data."""
    for part in (examples.train, examples.test):
        x = part.x[:2]
        try:
            with torch.no_grad():
                network.module(x)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            got, reason = f"{list(x.shape)} {x.dtype}", next(iter(str(error).splitlines()), "")
            what = f"inputs of {examples.name} must be what {network.name} takes"
            raise ValueError(f"{command}: {what}, got {got}, for it says: {reason}") from error


def measure(
    network: Network, loads: Sequence[Load], part: Part, *, precision: Precision = "fp32", name: str = "evaluate"
) -> list[Scores]:
    """Loss and accuracy of many networks of one module on the same data.

    Small networks run side by side, one in each lane of a vector. Others run one by one, each on a thread of its own,
    which keeps all of them busier than networks one after the other on all threads.

    Args:
        network: The module; it is not changed.
        loads: Of each network, what puts its weights into a module in eval mode.
        part: Inputs and targets.
        precision: ``"bf16"`` computes what autocast allows in bfloat16.
        name: Of the progress bar.
    """
    table, code = table_of(network, part) if precision == "fp32" else (None, 0)
    size = 1 if table is None else GROUP
    groups = [loads[begin : begin + size] for begin in range(0, len(loads), size)]

    def run(group: Sequence[Load]) -> list[Scores]:
        modules = [deepcopy(network.module) for _ in group]
        with torch.no_grad():
            for load_into, module in zip(group, modules, strict=True):
                load_into(module)
            if table is None:
                return [score(modules[0], part, precision)]
            weights = torch.stack([torch.cat([x.flatten() for x in module.parameters()]) for module in modules])
            codes = torch.full((len(group),), code, dtype=torch.int32)
            done = tally(side_by_side(weights.float(), table, codes), part)
        return [Scores(*pair) for pair in zip(done.loss.tolist(), done.accuracy.tolist(), strict=True)]

    found = []
    with tqdm(total=len(loads), desc=name, unit=" networks") as bar:
        for scores in map_on_threads(run, groups):
            found += scores
            bar.update(len(scores))
    return found


def table_of(network: Network, part: Part) -> tuple[Tensor | None, int]:
    """The table by which small networks run side by side, and the code of their activation; None for others."""
    kinds = [
        code
        for layer in network.module.modules()
        for code, kind in enumerate(ACTIVATIONS.values())
        if type(layer) is kind
    ]
    if part.x.dim() != 4 or part.y.dim() != 1 or len(set(kinds)) != 1:
        return None, 0
    try:
        table = layer_table(network.module, tuple(part.x.shape[1:]))
    except ValueError:
        return None, 0
    # targets that do not count, or that no logit has, are for ``score``
    classes = rows_of(table)[-1].out_channels
    return (table, kinds[0]) if int(part.y.min()) >= 0 and int(part.y.max()) < classes else (None, 0)


@torch.no_grad()
def score(module: nn.Module, part: Part, precision: Precision = "fp32") -> Scores:
    """Mean cross-entropy and accuracy of one module in eval mode; the first of its outputs are the logits."""
    loss = right = count = 0.0
    for logits, y in logits_of(module, part, precision):
        kept = y != IGNORED
        loss += float(cross_entropy(logits, y, ignore_index=IGNORED, reduction="none").double().sum())
        right += float(((logits.argmax(1) == y) & kept).sum())
        count += int(kept.sum())
    if not count:
        raise ValueError(f"data: some targets must count, got {IGNORED} in all of them")
    return Scores(loss / count, right / count)


def logits_of(module: nn.Module, part: Part, precision: Precision) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits ``[n, num_classes]`` and targets ``[n]``, batch by batch; positions of sequences are samples."""
    for x, y in in_batches(part.x, part.y):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = next(tensors_in(module(x))).float()
        if logits.shape[:-1] != y.shape:
            raise ValueError(
                f"data: targets must be {list(logits.shape[:-1])}, for logits {list(logits.shape)}, got {list(y.shape)}"
            )
        wrong = y[(y != IGNORED) & ((y < 0) | (y >= logits.shape[-1]))]
        if wrong.numel():
            must = f"{IGNORED} or in [0, {logits.shape[-1]}), the logits"
            raise ValueError(f"data: targets must be {must}, got {int(wrong[0])}")
        yield logits.flatten(0, -2), y.flatten()
