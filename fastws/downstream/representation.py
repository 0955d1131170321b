"""A learned representation of networks, whatever learned it: weights to codes, and codes to weights.

``load`` reads the checkpoint of any trainer. What embeds, predicts or samples knows no more of a representation than
this: its layout, whether its networks were aligned, and the functions below.
"""

from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

import fastws
from fastws.downstream.encoder import Encoder, decode, default_halo, encode, load_encoder, suit
from fastws.downstream.sampling.generators import BANDWIDTH, TOKEN_BANDWIDTH
from fastws.files.checkpoints import load_plain
from fastws.files.limits import DAMAGED
from fastws.layout.layout import Layout
from fastws.nn.hyper_representation import HyperRepresentation, HyperRepresentationConfig
from fastws.zoo.format.zoo import Zoo

BATCH = 256  # networks at once


class Representation(Protocol):
    """Codes are ``[B, ..]`` float32; what their axes are is the representation's own business."""

    layout: Layout
    aligned: bool  # whether it was trained on networks in the order of an alignment
    bandwidth: float  # of the published kernel density of its codes

    def encode(self, flat: Tensor) -> Tensor:
        """Codes of networks ``[B, P]``."""

    def decode(self, codes: Tensor, like: Tensor | None = None) -> Tensor:
        """Networks ``[B, P]`` of codes, in float32; ``like``, ``[P]`` or ``[B, P]``, gives what has no code."""

    def suit(self, zoo: Zoo, where: str) -> Self:
        """The representation for the networks of a zoo.

        Raises:
            ValueError: If they are of an architecture that it cannot represent.
        """


class WholeNetworks:
    """An autoencoder of whole networks: one code ``[E]`` for each."""

    bandwidth = BANDWIDTH

    def __init__(self, model: HyperRepresentation, layout: Layout, aligned: bool):
        self.model, self.layout, self.aligned = model.eval(), layout, aligned

    @torch.no_grad()
    def encode(self, flat: Tensor) -> Tensor:
        return torch.cat([self.model.encode(part.float()) for part in flat.split(BATCH)])

    @torch.no_grad()
    def decode(self, codes: Tensor, like: Tensor | None = None) -> Tensor:
        return torch.cat([self.model.decode(part) for part in codes.split(BATCH)])

    def suit(self, zoo: Zoo, where: str) -> "WholeNetworks":
        self.layout.require_same(zoo.layout, f"{where}: zoo {zoo.path}")
        return self


class Tokens:
    """A SANE: a code ``[N, E]`` for each network, one row per token; windows have a halo on both sides."""

    bandwidth = TOKEN_BANDWIDTH

    def __init__(self, encoder: Encoder, aligned: bool, halo: int | None = None):
        self.encoder, self.layout, self.aligned = encoder, encoder.layout, aligned
        self.halo = default_halo(encoder) if halo is None else halo

    def encode(self, flat: Tensor) -> Tensor:
        return torch.cat([encode(self.encoder, part, halo=self.halo) for part in flat.split(BATCH)])

    def decode(self, codes: Tensor, like: Tensor | None = None) -> Tensor:
        parts = codes.split(BATCH)
        given = like.split(BATCH) if like is not None and like.dim() == 2 else [like] * len(parts)
        return torch.cat(
            [decode(self.encoder, part, halo=self.halo, like=one) for part, one in zip(parts, given, strict=True)]
        )

    def suit(self, zoo: Zoo, where: str) -> "Tokens":
        encoder = suit(self.encoder, zoo, where)
        return self if encoder is self.encoder else Tokens(encoder, self.aligned, self.halo)


def load(path: str | Path, device: torch.device | str = "cpu", halo: int | None = None) -> Representation:
    """Loads what ``fastws train ae`` or ``fastws train sane`` wrote.

    Args:
        path: Of the checkpoint.
        device: That codes are computed on.
        halo: Tokens that a SANE sees on both sides of those that it codes; None: a quarter of its window.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another file.
    """
    expected = "model must be a checkpoint of fastws train ae or train sane"
    if not Path(path).is_file():
        raise FileNotFoundError(f"representation: {expected}, got no file {path}")
    try:
        state = load_plain(path)
        extra = state["extra"]
        if "sane" in extra:
            return Tokens(load_encoder(path, device), bool(extra.get("aligned", False)), halo)
        if "hyper_representation" not in extra:
            raise ValueError("the checkpoint of another program")
        layout = fastws.Layout.from_dict(extra["layout"])
        config = HyperRepresentationConfig.from_dict(extra["hyper_representation"])
        model = HyperRepresentation(config)
        model.load_state_dict(state["model"])
        if config.size != layout.num_weights:
            raise ValueError(f"networks of {config.size} weights for a layout of {layout.num_weights}")
    except DAMAGED as error:
        got = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"representation: {expected}, got {path}: {got}") from error
    if halo is not None:
        raise ValueError(f"representation: halo must be left out for an autoencoder of whole networks, got {halo}")
    return WholeNetworks(model.to(device), layout, bool(extra["aligned"]))
