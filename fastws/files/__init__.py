"""The one door for bytes from outside: nothing is executed, and memory is bounded by the size of what is read."""

from importlib import import_module

LATER = {"load_checkpoint": "fastws.files.checkpoints"}  # so that readers of JSON need not wait for torch
__all__ = [*LATER]


def __getattr__(name: str):
    if name not in LATER:
        raise AttributeError(f"module 'fastws.files' has no attribute {name!r}")
    globals()[name] = getattr(import_module(LATER[name]), name)
    return globals()[name]
