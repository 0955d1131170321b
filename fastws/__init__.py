"""Fast kernels and lean trainers for weight-space learning.

Shapes: B checkpoints in a batch, M in a zoo, P weights per checkpoint, L layers, N tokens, T token size, W window,
S indices in a row of permutations, D width, E embedding.
"""

from importlib import import_module

from fastws.ops.masked_mse import masked_mse
from fastws.ops.nt_xent import nt_xent
from fastws.ops.permute import permute, random_permutations
from fastws.ops.token_views import token_views
from fastws.ops.tokenize import detokenize, tokenize
from fastws.tokens import Tokens
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


LATER = {  # name: module
    "Layout": "fastws.layout",
    "Symmetry": "fastws.symmetry",
    "Zoo": "fastws.zoo",
    "downstream": "fastws.downstream",
    "nn": "fastws.nn",
    "zoo": "fastws.zoo",
}


def __getattr__(name: str):
    """Imports at first use what a program that only calls operators does not need: half of the import time and more."""
    if name not in LATER:
        raise AttributeError(f"module 'fastws' has no attribute {name!r}")
    module = import_module(LATER[name])
    globals()[name] = getattr(module, name) if name[0].isupper() else module
    return globals()[name]
