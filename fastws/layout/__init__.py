"""A checkpoint as one flat vector and as a grid of tokens."""

from fastws.layout.layout import Layout

__all__ = ["Layout"]
