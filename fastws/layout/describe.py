"""Prints the layout of a checkpoint file: every tensor, what it is taken for, and where it lies."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastws.layout.layout import Layout


@dataclass(frozen=True)
class Config:
    """Prints the layout of a checkpoint: every tensor, its role, its place in the flat vector and its tokens.

    Of safetensors files only the headers are read, so that size does not matter.
    """

    path: Annotated[str, tyro.conf.Positional]  # .safetensors, .safetensors.index.json, or what torch.load reads

    token_size: int | None = None  # entries per token; by default the longest row
    norm: Literal["keep", "skip"] = "keep"  # norm layers in tokens
    save: str | None = None  # writes the layout as JSON to this file


def run(config: Config) -> None:
    layout = Layout.from_checkpoint(config.path, config.token_size, config.norm)
    print(layout.describe())
    if config.save is not None:
        layout.save(config.save)
        print(f"saved as {config.save}")
