"""Fast kernels and lean trainers for weight-space learning.

Shapes: B checkpoints in a batch, M in a zoo, P weights per checkpoint, L layers, N tokens, T token size, W window,
S indices in a row of permutations, D width, E embedding.
"""

from importlib import import_module

from fastws.layout import Layout, Tokens
from fastws.ops.masked_mse import masked_mse
from fastws.ops.nt_xent import nt_xent
from fastws.ops.permute import permute, random_permutations
from fastws.ops.token_views import token_views
from fastws.ops.tokenize import detokenize, tokenize
from fastws.symmetry import Symmetry
from fastws.version import __version__

__all__ = [
    "Layout",
    "Symmetry",
    "Tokens",
    "Zoo",
    "__version__",
    "detokenize",
    "downstream",
    "masked_mse",
    "nn",
    "nt_xent",
    "permute",
    "random_permutations",
    "token_views",
    "tokenize",
    "zoo",
]


def __getattr__(name: str):
    """Zoos and what is done with them need pyarrow and scipy, which take longer to import than all the rest: later."""
    if name in ("downstream", "nn", "zoo"):
        return import_module(f"fastws.{name}")
    if name == "Zoo":
        return import_module("fastws.zoo").Zoo
    raise AttributeError(f"module 'fastws' has no attribute {name!r}")
