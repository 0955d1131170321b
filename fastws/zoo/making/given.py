"""Networks that a user names: an architecture of ``zoo make``, or a function of their own as ``module:function``."""

import os
import sys
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.making.architectures import build


def make_network(
    architecture: str, image_shape: tuple[int, int, int], num_classes: int, activation: str = "relu"
) -> tuple[nn.Module, object]:
    """A network, and inputs that it takes.

    Args:
        architecture: A name that ``build`` knows, or ``module:function``. The function is called without arguments, and
            returns a network that takes images, or a pair of a network and its example inputs, as ``Symmetry.trace``
            takes them. Its module may lie in the current folder.
        image_shape: Channels, height and width.
        num_classes: Logits of an architecture that ``build`` makes.
        activation: Of an architecture that ``build`` makes; relu is what all of them can have.

    Raises:
        ValueError: If there is no such architecture, module or function, or it returns something else.
    """
    images = torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0))  # zeros would hide weights
    if ":" not in architecture:
        # dropout and activations have no weights
        return build(architecture, image_shape, num_classes=num_classes, activation=activation), images
    made = find_function(architecture)()
    network, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, images)
    if not isinstance(network, nn.Module):
        got = type(network).__name__
        raise ValueError(f"architecture: {architecture} must return a network, or it and its inputs, got {got}")
    return network, inputs


def find_function(name: str, option: str = "architecture") -> Callable[[], object]:
    """The function that ``module:function`` names, given as an option; its module may lie in the current folder."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command that is installed does not look there by itself
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        what = f"module:function of a module in {os.getcwd()} or an installed one"
        raise ValueError(f"{option}: function must be given as {what}, got {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{option}: {name} must be a function, got {type(found).__name__}")
    return found


def trace_network(
    architecture: str, image_shape: tuple[int, int, int], num_classes: int, activation: str = "relu"
) -> tuple[nn.Module, Symmetry]:
    """The network of ``make_network`` and its symmetry."""
    network, inputs = make_network(architecture, image_shape, num_classes, activation)
    return network, Symmetry.trace(network, inputs)
