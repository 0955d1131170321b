"""Fast kernels and lean trainers for weight-space learning.

Shapes: B checkpoints in a batch, M in a zoo, P weights per checkpoint, L layers, N tokens, T token size, W window,
S indices in a row of permutations, D width, E embedding.
"""

from fastws.layout import Layout
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
    "__version__",
    "detokenize",
    "masked_mse",
    "nt_xent",
    "permute",
    "random_permutations",
    "token_views",
    "tokenize",
]
