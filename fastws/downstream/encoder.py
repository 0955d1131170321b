"""A trained SANE as an encoder (arXiv 2406.09997, algorithm 2): networks of any length, in chunks with a halo."""

import operator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import fastws
from fastws.files.checkpoints import load_plain
from fastws.files.limits import DAMAGED
from fastws.layout.moments import layer_moments
from fastws.nn.sane import SANE, SANEConfig
from fastws.windows.places import LAYER_TYPES, PARTS, places_of
from fastws.zoo.format.zoo import Zoo

SAMPLED = 1000  # networks, about, that the moments of another architecture are taken of
Pool = Literal["mean", "layers", "tokens", "spread"]


class Encoder(NamedTuple):
    """A trained SANE, and how weights become its tokens. ``value = weight * scale[l] + shift[l]`` in layer l."""

    model: SANE
    layout: fastws.Layout
    scale: Tensor  # [L]
    shift: Tensor  # [L]
    aligned: bool = False  # whether it was trained on aligned networks
    others: tuple["Encoder", ...] = ()  # the same for the other architectures that it was trained on
    hub: bool | None = None  # of a hub, whether the layers of each network were standardised by themselves; else None

    @property
    def standardizes(self) -> bool:
        """Whether layers of networks of other architectures are to be standardised, as those of its own were."""
        return self.hub if self.hub is not None else not ((self.scale == 1).all() and (self.shift == 0).all())


def load_encoder(path: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """Loads the model, the layout and the statistics of a run of ``fastws train sane``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint of that program.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"embed: model must be the checkpoint.pt of fastws train sane, got no file {path}")
    try:
        state = load_plain(path)
        sizes, kinds = state["extra"]["sane"], [state["extra"], *state["extra"].get("others", ())]
        config = SANEConfig(**sizes | {"max_positions": tuple(sizes["max_positions"])})
        blocks = sum(name.endswith(".ln_1.weight") for name in state["model"])
        if 2 * config.depth != blocks:  # a file may name any number, and so many would be made
            raise ValueError(f"{blocks} blocks for a depth of {config.depth}")
        with torch.device("meta"):
            model = SANE(config)
        expected = {name: x.shape for name, x in model.state_dict().items()}
        if expected != {name: x.shape for name, x in state["model"].items()}:
            raise ValueError(f"other weights than those of {config}")
        model.to_empty(device=device).load_state_dict(state["model"])
        described = [(fastws.Layout.from_dict(kind["layout"]), kind["mean"], kind["std"]) for kind in kinds]
        for layout, mean, std in described:
            check(config, layout, mean, std)
    except DAMAGED as error:
        got = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"embed: model must be the checkpoint.pt of fastws train sane, got {path}: {got}") from error
    aligned = state["extra"].get("aligned") is True
    encoders = [
        Encoder(model.eval(), layout, (1 / std).to(device), (-mean / std).to(device), aligned)
        for layout, mean, std in described
    ]
    hub = state["extra"].get("hub")
    standardized = hub.get("standardize") is True if isinstance(hub, dict) else None
    return encoders[0]._replace(others=tuple(encoders[1:]), hub=standardized)


def check(config: SANEConfig, layout: fastws.Layout, mean: Tensor, std: Tensor) -> None:
    """Raises ValueError unless statistics and positions are those of the tokens of a layout."""
    if mean.shape != (len(layout.table),) or std.shape != mean.shape or not (mean.isfinite() & (std > 0)).all():
        raise ValueError(f"mean and std {list(mean.shape)} for {len(layout.table)} layers")
    positions = tuple((layout.positions.amax(0) + 1).tolist())
    if layout.token_size != config.token_size or not has_positions(config, layout):
        raise ValueError(f"tokens of {layout.token_size} in {positions} positions for a model of {config}")


def has_positions(config: SANEConfig, layout: fastws.Layout) -> bool:
    """Whether a model knows the positions of all tokens of a layout; one of sines or relative ones knows any."""
    if config.layer_types not in (0, len(LAYER_TYPES)):
        return False
    needed = [PARTS] * 3 if config.relative else (layout.positions.amax(0) + 1).tolist()
    return config.positions != "learned" or not any(map(operator.gt, needed, config.max_positions))


def told(encoder: Encoder) -> Tensor:
    """What the model is told of each token of a network, int32 ``[N, 3 or 4]``, on its device."""
    layout, config = encoder.layout, encoder.model.config
    options = {"relative": config.relative, "layer_types": config.layer_types > 0}
    return places_of(layout).describe(layout.positions, layout.positions[:, 1], **options).to(encoder.scale.device)


def suit(encoder: Encoder, zoo: Zoo, where: str = "embed") -> Encoder:
    """The encoder for the networks of a zoo, which may be of another architecture than those it was trained on.

    Then their layers are standardised by the moments of the zoo's own training split, if those of the encoder were.

    Raises:
        ValueError: If the zoo has more tokens, layers or output units than the model has positions for.
    """
    known = [one for one in (encoder, *encoder.others) if one.layout.fingerprint == zoo.layout.fingerprint]
    if known and encoder.hub is None:
        return known[0]
    layout = zoo.layout.with_tokens(encoder.layout.token_size, encoder.layout.norm, encoder.layout.span)
    needed, known = tuple((layout.positions.amax(0) + 1).tolist()), encoder.model.config.max_positions
    if not has_positions(encoder.model.config, layout):
        what = f"at most {known} tokens, layers and output units, for which the model has positions, got {needed}"
        raise ValueError(f"{where}: zoo {zoo.path} must have {what}")
    mean, std = torch.zeros(len(layout.table)), torch.ones(len(layout.table))
    if encoder.standardizes:
        rows = zoo.split("train") if len(zoo.split("train")) else torch.arange(len(zoo))
        mean, std = layer_moments(zoo.rows(rows[:: max(1, len(rows) // SAMPLED)]), layout)
    device = encoder.scale.device
    return encoder._replace(layout=layout, scale=(1 / std).to(device), shift=(-mean / std).to(device))


def default_halo(encoder: Encoder) -> int:
    return encoder.model.config.window // 4


@torch.no_grad()
def encode(encoder: Encoder, weights: Tensor, *, halo: int | None, batch_size: int = 64) -> Tensor:
    """Embeds all tokens of networks: flat weights ``[B, P]`` to ``[B, N, E]`` float32; see ``embed``."""
    layout, device = encoder.layout, weights.device
    starts, window, place = chunk(layout.num_tokens, encoder.model.config.window, halo)
    table = layout.table.to(device)
    model = torch.arange(len(weights)).repeat_interleave(len(starts)).to(device)
    start = starts.repeat(len(weights)).to(device)
    parts, places, steps = [], told(encoder), torch.arange(window, device=device)
    for some, begin in zip(model.split(batch_size), start.split(batch_size), strict=True):
        values, _, _ = fastws.token_views(
            weights, table, layout.token_size, some, begin, window,
            scale=encoder.scale, shift=encoder.shift, dtype=torch.float32,
        )  # fmt: skip
        parts.append(encoder.model.encode(values, places[begin[:, None] + steps]).float())
    z = torch.cat(parts).view(len(weights), len(starts) * window, -1)
    return stitch(z, place)


@torch.no_grad()
def decode(
    encoder: Encoder, z: Tensor, *, halo: int | None, like: Tensor | None = None, batch_size: int = 64
) -> Tensor:
    """Networks of token embeddings: ``[B, N, E]`` to flat weights ``[B, P]`` float32, in the windows of ``encode``.

    Args:
        encoder: From ``load_encoder``.
        z: Embeddings of all tokens.
        halo: Tokens that the decoder sees on both sides of a chunk; None decodes each network in one pass.
        like: Networks ``[P]`` or ``[B, P]`` that give what has no token, as norm layers that tokens leave out; zeros
            without it.
        batch_size: Windows per forward pass.
    """
    layout, device = encoder.layout, z.device
    starts, window, place = chunk(layout.num_tokens, encoder.model.config.window, halo)
    tokens = windows_of(starts, window).to(device)
    network = torch.arange(len(z), device=device).repeat_interleave(len(starts))
    number = torch.arange(len(starts), device=device).repeat(len(z))
    rows, positions = z.flatten(0, 1), told(encoder)
    parts = []
    for some, which in zip(network.split(batch_size), number.split(batch_size), strict=True):
        chosen = (some[:, None] * layout.num_tokens + tokens[which]).flatten()
        windows = rows.index_select(0, chosen).view(len(some), window, -1)
        parts.append(encoder.model.decode(windows, positions[tokens[which]]).float())
    values = stitch(torch.cat(parts).view(len(z), len(starts) * window, -1), place)
    layer = layout.positions[:, 1].to(device).long()
    values.sub_(encoder.shift[layer, None]).div_(encoder.scale[layer, None])
    return layout.detokenize(values, like=values.new_zeros(layout.num_weights) if like is None else like.float())


def average(encoder: Encoder, z: Tensor, pool: Pool) -> Tensor:
    """What is kept of token embeddings ``[B, N, E]``: ``[B, width]``; see ``pool_shape``."""
    if pool == "mean":
        return z.mean(1)
    if pool == "tokens":
        return z.flatten(1)
    counts = encoder.layout.positions[:, 1].bincount(minlength=len(encoder.layout.table)).tolist()
    layers = [layer for layer in z.split(counts, 1) if layer.shape[1]]
    if pool == "layers":
        return torch.cat([layer.mean(1) for layer in layers], 1)
    return torch.stack([layer.std(1, correction=0).mean(1) for layer in layers], 1)


def pool_shape(encoder: Encoder, pool: Pool) -> tuple[int, int]:
    """How many vectors a network has, and how long each is.

    ``mean`` is the mean over all tokens, ``[1, E]``; ``layers`` that over the tokens of each layer, ``[L, E]``;
    ``tokens`` all of them, ``[N, E]``; ``spread`` how far the tokens of a layer lie apart, the mean over entries of
    their std over its tokens, ``[L, 1]``.
    """
    latent, layers = encoder.model.config.latent, len(encoder.layout.positions[:, 1].unique())
    vectors = {"mean": 1, "layers": layers, "tokens": encoder.layout.num_tokens, "spread": layers}
    return vectors[pool], 1 if pool == "spread" else latent


def windows_of(starts: Tensor, window: int) -> Tensor:
    """The tokens of each window, int64 ``[C, W]``."""
    return starts[:, None] + torch.arange(window)


def stitch(windows: Tensor, place: Tensor) -> Tensor:
    """Sequences ``[B, N, ..]`` of the windows that ``chunk`` cuts, ``[B, C * W, ..]``, without their halos."""
    return windows.index_select(1, place.to(windows.device))


def chunk(num_tokens: int, window: int, halo: int | None) -> tuple[Tensor, int, Tensor]:
    """Windows such that each token is seen with ``halo`` tokens on both sides, where there are so many.

    Returns:
        The starts of the windows ``[C]``, their length W, and for each token where to read it among the ``C * W``
        tokens of the windows, ``[N]``. A window that would begin before the sequence begins with it, and one that
        would end behind it ends with it.
    """
    if halo is None or (num_tokens <= window and halo >= 0):
        return torch.zeros(1, dtype=torch.int64), num_tokens, torch.arange(num_tokens)
    content = window - 2 * halo
    if halo < 0 or content < 1:
        raise ValueError(f"embed: halo must be in [0, {(window - 1) // 2}] for a window of {window} tokens, got {halo}")
    starts = (torch.arange(0, num_tokens, content) - halo).clamp(0, num_tokens - window)
    token = torch.arange(num_tokens)
    owner = token // content
    return starts, window, owner * window + token - starts[owner]
