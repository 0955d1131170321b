"""What may be permuted in a network without changing its function, found by tracing it."""

from fastws.symmetry.symmetry import Symmetry

__all__ = ["Symmetry"]
