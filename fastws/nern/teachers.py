"""Networks to be stored, by the name of their architecture, and the feature maps that are compared in distillation."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastws.files.checkpoints import load_checkpoint
from fastws.nn.resnet import CIFAR_DEPTHS, CIFARResNet, ResNet

# networks of this package: name, and how to make one for a number of classes
ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    **{
        f"cifar-resnet{depth}-{option}": partial(CIFARResNet, depth, option)
        for depth in CIFAR_DEPTHS
        for option in "ab"
    },
    **{f"resnet{depth}": partial(ResNet, depth, stem="imagenet") for depth in (18, 34, 50, 101, 152)},
}
COUNTER = "num_batches_tracked"  # of steps, by batch norms
LIBRARIES = ("torchvision", "timm")  # that may be installed, and have more


def load_teacher(
    architecture: str, weights: str | Path, num_classes: int | None = None, *, key: str | None = None
) -> nn.Module:
    """A trained network, in evaluation mode, without gradients.

    Args:
        architecture: A name in ``ARCHITECTURES``, as ``"cifar-resnet20-a"`` or ``"resnet18"``; or, where they are
            installed, ``"torchvision:vgg16"`` or ``"timm:resnet10t"``.
        weights: Checkpoint, safetensors or torch; nothing in it is executed.
        num_classes: Of the network; by default what the checkpoint says where it depends on them.
        key: Under which a torch file holds the network; by default the only or the usual one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the architecture is unknown, or the weights are not finite or of another network.
    """
    state = load_checkpoint(weights, key)
    if num_classes is None:
        num_classes = count_classes(architecture, state)
    teacher = make_architecture(architecture, num_classes)
    load_weights(teacher, state, f"{weights}")
    return teacher.eval().requires_grad_(False)


def count_classes(architecture: str, state: dict[str, Tensor]) -> int:
    """The size of the first tensor that depends on it; 2 if there is none: what is wrong then is said elsewhere."""
    two, three = (shapes(architecture, count) for count in (2, 3))
    for name, shape in two.items():
        if shape != three[name] and name in state and state[name].dim() == len(shape):
            return next(size for size, x, y in zip(state[name].shape, shape, three[name], strict=True) if x != y)
    return 2


def shapes(architecture: str, num_classes: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = make_architecture(architecture, num_classes).state_dict()
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith(COUNTER)}


def fitting(state: dict[str, Tensor]) -> str:
    """What a state dict fits of what is known here, in words."""
    theirs = {name: tensor.shape for name, tensor in state.items() if not name.endswith(COUNTER)}
    names = [name for name in ARCHITECTURES if shapes(name, count_classes(name, state)) == theirs]
    return f"it fits {', '.join(names)}" if names else "it is of another architecture"


def make_architecture(name: str, num_classes: int) -> nn.Module:
    library, _, model = name.rpartition(":")
    if not library and name in ARCHITECTURES:
        return ARCHITECTURES[name](num_classes)
    if library not in LIBRARIES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"nern: architecture must be {known}, torchvision:<name> or timm:<name>, got {name!r}")
    if find_spec(library) is None:
        raise ValueError(f"nern: {library} must be installed for {name!r}, got none; pip install {library}")
    # imported when it is wanted: either takes seconds
    if library == "timm":
        make = partial(import_module("timm").create_model, pretrained=False)
    else:
        make = partial(import_module("torchvision.models").get_model, weights=None)
    try:
        return make(model, num_classes=num_classes)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"nern: architecture must be one of {library}, got {model!r}: {error}") from error


def load_weights(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Loads a state dict; steps counted by batch norms, which old checkpoints do not have, stay as they are."""
    expected = network.state_dict()
    counters = {name: steps for name, steps in expected.items() if name.endswith(COUNTER)}
    state = counters | state
    for name in expected | state:
        ours, theirs = (list(one[name].shape) if name in one else "nothing" for one in (expected, state))
        if ours != theirs:
            raise ValueError(f"{where}: {name!r} must be {ours}, got {theirs}; {fitting(state)}")
        if state[name].is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{where}: {name!r} must be {expected[name].dtype}, got {state[name].dtype}")
        bad = (~state[name].isfinite()).sum()
        if bad:
            raise ValueError(f"{where}: {name!r} must be finite, got {bad} values that are NaN or infinite")
    network.load_state_dict(state)


@torch.no_grad()
def check_network(network: nn.Module, shape: tuple[int, int, int], num_classes: int, *, maps: bool) -> None:
    """Tries a network on an image of zeros.

    Args:
        network: In evaluation mode, float32.
        shape: ``(C, H, W)`` of the images that it will see.
        num_classes: Of their labels; 0 without labels.
        maps: Whether its feature maps will be compared.

    Raises:
        ValueError: If it does not take such images, does not give logits of so many classes, or has no feature maps.
    """
    images = torch.zeros(1, *shape, device=next(network.parameters()).device)
    try:
        with FeatureTaps() as taps:
            logits = network(images)
    except Exception as error:  # whatever the code of others raises
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"nern: network must take images {list(shape)}, got {first}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < num_classes:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"nern: network must give logits [B, {num_classes or 'classes'}], got {got}")
    if maps and not taps.maps:
        raise ValueError("nern: network must have activations for its feature maps, got none; set feature_weight to 0")


# --- feature maps

PLAIN = (functional.relu, torch.relu, Tensor.relu, functional.relu6, functional.hardtanh, functional.leaky_relu)
PLAIN += (functional.elu, functional.gelu, functional.silu, functional.mish, functional.hardswish, functional.prelu)
PLAIN += (functional.selu, functional.celu, functional.softplus, functional.tanh, torch.tanh, Tensor.tanh)
PLAIN += (functional.sigmoid, torch.sigmoid, Tensor.sigmoid, functional.hardsigmoid, functional.logsigmoid)
PLAIN += (functional.softsign, functional.threshold, functional.rrelu)
IN_PLACE = (functional.relu_, torch.relu_, Tensor.relu_, functional.hardtanh_, functional.leaky_relu_, functional.elu_)
IN_PLACE += (functional.selu_, functional.celu_, functional.threshold_, functional.rrelu_, torch.tanh_, Tensor.tanh_)
IN_PLACE += (torch.sigmoid_, Tensor.sigmoid_)
ACTIVATIONS = {*PLAIN, *IN_PLACE}
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}


class FeatureTaps(TorchFunctionMode):
    """Records the feature maps of a network that runs inside: those that go into its activations.

    No names are needed, so it works on any module. A map is any ``[B, C, H, W]`` that an activation meets.

    Args:
        after: Record what comes out of activations instead, as the published code does, unwillingly, on networks
            whose activations are in place (ResNet-18 of torchvision).
        doubled: Give sums of a block and its shortcut the weight 2. In the published code they take the place of what
            the block computes before the sum, because the sum is in place, and so count twice.

    Attributes:
        maps: Of the last run, in order.
        weights: Of each map, 1 or 2.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(inplace=True))
        >>> with FeatureTaps() as taps:
        ...     outputs = network(torch.zeros(1, 3, 8, 8))
        >>> [list(x.shape) for x in taps.maps], taps.weights
        ([[1, 8, 6, 6], [1, 4, 4, 4]], [1, 1])
    """

    def __init__(self, *, after: bool = False, doubled: bool = False):
        super().__init__()
        self.after, self.doubled = after, doubled
        self.clear()

    def clear(self) -> None:
        self.maps: list[Tensor] = []
        self.weights: list[int] = []
        self.last_sum: Tensor | None = None

    def __enter__(self):
        self.clear()
        return super().__enter__()

    def __exit__(self, *error):
        self.last_sum = None
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = args[0] if args else kwargs.get("input")
        if function not in ACTIVATIONS or before.dim() != 4:
            result = function(*args, **kwargs)
            if function in SUMS:
                self.last_sum = result
            return result
        self.weights.append(2 if self.doubled and before is self.last_sum else 1)
        in_place = function in IN_PLACE or kwargs.get("inplace")
        if in_place and not self.after:
            before = before.clone()  # the activation overwrites its argument
        result = function(*args, **kwargs)
        self.maps.append(result if self.after else before)
        return result
