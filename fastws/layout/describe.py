"""Prints the layout of a checkpoint file: every tensor, what it is taken for, and where it lies."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastws.files.checkpoints import load_checkpoint
from fastws.layout.layout import Layout
from fastws.runs.begun import former_names


@former_names(save="out")
@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints the layout of a checkpoint: every tensor, its role, its place in the flat vector and its tokens.

    fastws layout resnet18.safetensors
    fastws layout resnet18.safetensors --token-size 288 --norm skip --out layout.json

    Of safetensors files only the headers are read, so that size does not matter.
    """

    path: Annotated[str, tyro.conf.Positional]  # .safetensors, .safetensors.index.json, or what torch.load reads

    token_size: int | None = None  # entries per token; by default the longest row
    norm: Literal["keep", "skip"] = "keep"  # whether norm layers have tokens
    key: str | None = None  # under which a torch file holds the network; by default the only or the usual one
    out: str | None = None  # JSON file to write, which Layout.load reads


def run(config: Config) -> None:
    source = config.path if config.key is None else load_checkpoint(config.path, config.key)
    layout = Layout.from_checkpoint(source, config.token_size, config.norm)
    print(layout.describe())
    if config.out is not None:
        layout.save(config.out)
        print(f"saved as {config.out}")
