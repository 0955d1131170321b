"""Networks that have layers in common with ``cnn-s``, to which its weights are carried over (arXiv 2209.14733)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastws.layout.layout import Layout

KERNELS = {"short": (5, 5, 2), "deep": (5, 5, 4, 3)}  # of the convolutions
CHANNELS = {"short": (8, 6, 4), "deep": (8, 4, 6, 4)}


class ResidualCNN(nn.Module):
    """``cnn-s`` with a branch around each of its three convolutions: a max pooling and a 1 x 1 convolution.

    ``module_list`` has the names of ``cnn-s``, ``branches`` are new.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, activation: Callable[[], nn.Module]):
        super().__init__()
        channels, stages, branches = image_shape[0], [], []
        for width, kernel in zip(CHANNELS["short"], KERNELS["short"], strict=True):
            pooled = kernel == 5
            stages += [nn.Conv2d(channels, width, kernel), *([nn.MaxPool2d(2)] if pooled else []), activation()]
            # what a convolution and a pooling of two pixels leave of the image, in one pooling
            branch = nn.MaxPool2d(kernel, 2 if pooled else 1)
            branches.append(nn.Sequential(branch, nn.Conv2d(channels, width, 1)))
            channels = width
        self.module_list, self.branches = nn.ModuleList(stages), nn.ModuleList(branches)
        features = count_features("res-cnn", self.convolve, image_shape)
        head = (nn.Flatten(), nn.Linear(features, 20), activation(), nn.Linear(20, num_classes))
        self.module_list.extend(head)

    def convolve(self, x: Tensor) -> Tensor:
        for branch, stage in zip(self.branches, (slice(0, 3), slice(3, 6), slice(6, 8)), strict=True):
            shortcut = branch(x)
            for layer in self.module_list[stage]:
                x = layer(x)
            x = x + shortcut[:, :, : x.shape[2], : x.shape[3]]
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(x)
        for layer in self.module_list[8:]:
            x = layer(x)
        return x


class SkippingCNN(nn.Module):
    """Three or four convolutions, and perhaps what the first or second one gives, added behind the last.

    Args:
        depth: ``"short"`` is ``cnn-s`` with some biases left out, ``"deep"`` has four convolutions and one pooling.
        skip: Whether something is added: of the short one by a 1 x 1 convolution, of the deep one as it is.
        image_shape: Channels, height and width.
        num_classes: Logits.
        activation: After every hidden layer.
    """

    def __init__(
        self,
        depth: str,
        skip: bool,
        image_shape: tuple[int, int, int],
        num_classes: int,
        activation: Callable[[], nn.Module],
    ):
        super().__init__()
        short, channels, stages = depth == "short", image_shape[0], []
        pooled, biased, hidden = ((0, 1), (1,), 20) if short else ((0,), (0,), 18)
        for number, (width, kernel) in enumerate(zip(CHANNELS[depth], KERNELS[depth], strict=True)):
            pooling = [nn.MaxPool2d(2)] if number in pooled else []
            convolution = nn.Conv2d(channels, width, kernel, bias=number in biased)
            stages.append(nn.Sequential(convolution, *pooling, activation()))
            channels = width
        self.stages, self.skipped, self.add = nn.ModuleList(stages), 0 if short else 1, skip
        self.shortcut = nn.Conv2d(CHANNELS[depth][0], channels, 1, bias=False) if skip and short else nn.Identity()
        features = count_features("cnn-skip" if short else "cnn-deep", self.convolve, image_shape)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(features, hidden, bias=not short), activation(), nn.Linear(hidden, num_classes)
        )

    def convolve(self, x: Tensor) -> Tensor:
        kept = x
        for number, stage in enumerate(self.stages):
            x = stage(x)
            kept = x if number == self.skipped else kept
        return x + thin(self.shortcut(kept), x.shape[2:]) if self.add else x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolve(x))


def thin(x: Tensor, size: Sequence[int]) -> Tensor:
    """Evenly spaced pixels of maps, from the middle of what is left over: ``[B, C, *size]``."""
    for axis, wanted in zip((2, 3), size, strict=True):
        step = x.shape[axis] // wanted
        begin = (x.shape[axis] - (wanted - 1) * step - 1) // 2
        x = x.narrow(axis, begin, (wanted - 1) * step + 1).index_select(
            axis, step * torch.arange(wanted, device=x.device)
        )
    return x


def count_features(name: str, convolve: Callable[[Tensor], Tensor], image_shape: tuple[int, int, int]) -> int:
    try:
        with torch.no_grad():
            return convolve(torch.zeros(1, *image_shape)).numel()
    except (RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"build: images must be larger for {name!r}, got {list(image_shape)}") from error


TRANSFER: dict[str, Callable[..., nn.Module]] = {
    "res-cnn": ResidualCNN,
    "cnn-deep": lambda *shape: SkippingCNN("deep", False, *shape),
    "cnn-skip": lambda *shape: SkippingCNN("short", True, *shape),
    "cnn-deep-skip": lambda *shape: SkippingCNN("deep", True, *shape),
}


def carry_over(weights: Tensor, source: Layout, target: Layout) -> tuple[Tensor, Tensor]:
    """Weights of networks in the places that another architecture has for them.

    Layers are taken in the order of both: each of the target gets the next one of the source whose weight has the shape
    of its own, and what stands before that one is passed over. A bias comes with its weight where both have one.

    Args:
        weights: Networks, ``[M, P]``.
        source: Of their architecture.
        target: Of the other.

    Returns:
        Tensors: ``[M, Q]``, zero where nothing was carried, and bool ``[Q]``, where something was.
    """
    found = torch.zeros(len(weights), target.num_weights, dtype=weights.dtype, device=weights.device)
    carried = torch.zeros(target.num_weights, dtype=torch.bool)
    given, wanted = ({entry.name: entry for entry in layout.entries} for layout in (source, target))
    left = list(source.layers)
    for layer in target.layers:
        shape = wanted[layer[0]].shape
        place = next((n for n, other in enumerate(left) if given[other[0]].shape == shape), None)
        if place is None:
            continue
        pairs, left = zip(layer, left[place], strict=True), left[place + 1 :]
        for name, other in pairs:
            if name is not None and other is not None:
                to, of = wanted[name], given[other]
                found[:, to.offset : to.offset + to.numel] = weights[:, of.offset : of.offset + of.numel]
                carried[to.offset : to.offset + to.numel] = True
    return found, carried
