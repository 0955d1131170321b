"""A learned representation of networks, whatever learned it: weights to codes, and codes to weights.

``load`` reads the checkpoint of any trainer. What embeds, predicts or samples knows no more of a representation than
this: its layout, whether its networks were aligned, and the four functions below.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import fastws
from fastws.downstream.encoder import Encoder, chunk, default_halo, encode, load_encoder
from fastws.files.checkpoints import load_plain
from fastws.files.limits import DAMAGED
from fastws.layout.layout import Layout
from fastws.nn.hyper_representation import HyperRepresentation, HyperRepresentationConfig

BATCH = 256  # networks at once


class Representation(Protocol):
    """Codes are ``[B, ..]`` float32; what their axes are is the representation's own business."""

    layout: Layout
    aligned: bool  # whether it was trained on networks in the order of an alignment

    def encode(self, flat: Tensor) -> Tensor:
        """Codes of networks ``[B, P]``."""

    def decode(self, codes: Tensor) -> Tensor:
        """Networks ``[B, P]`` of codes, in float32."""


class WholeNetworks:
    """An autoencoder of whole networks: one code ``[E]`` for each."""

    def __init__(self, model: HyperRepresentation, layout: Layout, aligned: bool):
        self.model, self.layout, self.aligned = model.eval(), layout, aligned

    @torch.no_grad()
    def encode(self, flat: Tensor) -> Tensor:
        return torch.cat([self.model.encode(part.float()) for part in flat.split(BATCH)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return torch.cat([self.model.decode(part) for part in codes.split(BATCH)])


class Tokens:
    """A SANE: a code ``[N, E]`` for each network, one row per token."""

    def __init__(self, encoder: Encoder, aligned: bool):
        self.encoder, self.layout, self.aligned = encoder, encoder.layout, aligned
        self.halo = default_halo(encoder)

    def encode(self, flat: Tensor) -> Tensor:
        return torch.cat([encode(self.encoder, part, halo=self.halo) for part in flat.split(BATCH)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Windows with a halo on both sides, of which only what is inside is kept; all windows of a part at once."""
        model, layout, device = self.encoder.model, self.layout, codes.device
        starts, window, place = chunk(layout.num_tokens, model.config.window, self.halo)
        tokens = (starts[:, None] + torch.arange(window)).flatten().to(device)
        positions = layout.positions.to(device)[tokens].view(len(starts), window, 3)
        parts = []
        for part in codes.split(BATCH):
            windows = part[:, tokens].view(len(part), len(starts), window, -1)
            values = model.decode(windows, positions).flatten(1, 2)[:, place.to(device)].float()
            layer = layout.positions[:, 1].to(device).long()
            scale, shift = self.encoder.scale[layer], self.encoder.shift[layer]
            values = (values - shift[:, None]) / scale[:, None]
            parts.append(layout.detokenize(values, like=torch.zeros(len(part), layout.num_weights, device=device)))
        return torch.cat(parts)


def load(path: str | Path, device: torch.device | str = "cpu") -> Representation:
    """Loads what ``fastws train ae`` or ``fastws train sane`` wrote.

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
            return Tokens(load_encoder(path, device), bool(extra.get("aligned", False)))
        layout = fastws.Layout.from_dict(extra["layout"])
        config = HyperRepresentationConfig.from_dict(extra["hyper_representation"])
        model = HyperRepresentation(config)
        model.load_state_dict(state["model"])
        if config.size != layout.num_weights:
            raise ValueError(f"networks of {config.size} weights for a layout of {layout.num_weights}")
    except DAMAGED as error:
        got = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"representation: {expected}, got {path}: {got}") from error
    return WholeNetworks(model.to(device), layout, bool(extra["aligned"]))
