"""The one door for bytes from outside: nothing is executed, and memory is bounded by the size of what is read."""

from fastws.files.checkpoints import load_checkpoint

__all__ = ["load_checkpoint"]
