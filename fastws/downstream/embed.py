"""Embeddings of networks by a trained SANE (arXiv 2406.09997, algorithm 2): encoded in chunks with a halo."""

import json
import operator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import fastws
from fastws.devices import find_device
from fastws.files.atomic import write_tensors
from fastws.files.checkpoints import load_plain
from fastws.files.json import parse
from fastws.files.limits import DAMAGED
from fastws.files.lock import one_writer
from fastws.files.safetensors import open_tensors
from fastws.nn.sane import SANE, SANEConfig
from fastws.zoo.align import rows_of
from fastws.zoo.format.zoo import Zoo

Pool = Literal["mean", "layers"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Embeds every network of a zoo: the mean over its tokens, or over those of each layer, of their embeddings.

    fastws embed --model runs/sane/checkpoint.pt --zoo zoos/digits --out embeddings.safetensors
    """

    model: str  # checkpoint.pt of fastws train sane
    zoo: str  # folder of the zoo
    out: str  # file to write, a safetensors file with "embeddings" [M, E] in the order of the zoo's rows
    aligned: bool = False  # networks in the order that fastws zoo align found, as the model should have been trained

    pool: Pool = "mean"  # mean over all token embeddings, E numbers; layers: over each layer, L * E numbers
    halo: int | None = None  # tokens seen on both sides of a chunk; by default a quarter of the training window
    one_pass: bool = False  # encode the whole sequence at once, as the published code does for properties
    batch_size: int = 64  # windows per forward pass
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"embed: batch_size must be at least 1, got {self.batch_size}")


class Encoder(NamedTuple):
    """A trained SANE, and how weights become its tokens. ``value = weight * scale[l] + shift[l]`` in layer l."""

    model: SANE
    layout: fastws.Layout
    scale: Tensor  # [L]
    shift: Tensor  # [L]
    aligned: bool = False  # whether it was trained on aligned networks


def run(config: Config) -> None:
    device = find_device(config.device)
    encoder, zoo = load_encoder(config.model, device), Zoo.open(config.zoo)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    halo = None if config.one_pass else default_halo(encoder) if config.halo is None else config.halo
    with one_writer(Path(config.out)), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        options = {"batch_size": config.batch_size, "pool": config.pool, "aligned": config.aligned}
        embeddings = embed(encoder, zoo, halo=halo, **options)
        save_embeddings(config.out, embeddings, encoder.layout, config.aligned)
    if encoder.aligned != config.aligned:
        trained, now = (("aligned" if x else "stored") for x in (encoder.aligned, config.aligned))
        print(f"note: the model was trained on networks as {trained}, these are embedded as {now}; see --aligned")
    print(f"embeddings {list(embeddings.shape)}: {config.out}")


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
        layout, sizes, mean, std = (state["extra"][name] for name in ("layout", "sane", "mean", "std"))
        layout = fastws.Layout.from_dict(layout)
        config = SANEConfig.of_state(state["model"], sizes["heads"])
        if asdict(config) != sizes | {"max_positions": tuple(sizes["max_positions"])}:
            raise ValueError(f"weights of {config} for {sizes}")
        with torch.device("meta"):
            model = SANE(config)
        model.to_empty(device=device).load_state_dict(state["model"])
        check(model.config, layout, mean, std)
    except DAMAGED as error:
        got = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"embed: model must be the checkpoint.pt of fastws train sane, got {path}: {got}") from error
    aligned = state["extra"].get("aligned") is True
    return Encoder(model.eval(), layout, (1 / std).to(device), (-mean / std).to(device), aligned)


def check(config: SANEConfig, layout: fastws.Layout, mean: Tensor, std: Tensor) -> None:
    """Raises ValueError unless statistics and positions are those of the tokens of a layout."""
    if mean.shape != (len(layout.table),) or std.shape != mean.shape or not (mean.isfinite() & (std > 0)).all():
        raise ValueError(f"mean and std {list(mean.shape)} for {len(layout.table)} layers")
    positions = tuple((layout.positions.amax(0) + 1).tolist())
    if layout.token_size != config.token_size or any(map(operator.gt, positions, config.max_positions)):
        raise ValueError(f"tokens of {layout.token_size} in {positions} positions for a model of {config}")


def default_halo(encoder: Encoder) -> int:
    return encoder.model.config.window // 4


@torch.no_grad()
def embed(
    encoder: Encoder,
    zoo: Zoo,
    *,
    halo: int | None,
    batch_size: int = 64,
    pool: Pool = "mean",
    aligned: bool = False,
) -> Tensor:
    """Embeds all rows of a zoo; shows progress.

    Args:
        encoder: From ``load_encoder``.
        zoo: Of the architecture that the encoder was trained on.
        halo: Tokens seen on both sides of a chunk; None encodes each network in one pass.
        batch_size: Windows per forward pass.
        pool: ``"mean"`` averages the embeddings of all tokens, as published; ``"layers"`` those of each layer.
        aligned: Read the networks in the order that ``fastws zoo align`` found.

    Returns:
        Means of the token embeddings of each row, ``[M, E]`` or, layer after layer, ``[M, L * E]``, float32, on the
        CPU.

    Raises:
        FileNotFoundError: If ``aligned`` and the zoo has no alignment.
        ValueError: If the zoo is of another architecture, or the halo leaves nothing of the window.
    """
    encoder.layout.require_same(zoo.layout, f"embed: zoo {zoo.path}")
    window, device, read = encoder.model.config.window, encoder.scale.device, rows_of(zoo, aligned)
    windows = len(chunk(encoder.layout.num_tokens, window, halo)[0])
    together = max(1, batch_size // windows)
    means = 1 if pool == "mean" else len(encoder.layout.table)
    embeddings = torch.empty(len(zoo), means * encoder.model.config.latent)
    with tqdm(total=len(zoo), desc="embed", unit="network") as bar:
        for rows in torch.arange(len(zoo)).split(together):
            z = encode(encoder, read(rows).to(device), halo=halo, batch_size=batch_size)
            embeddings[rows] = average(encoder, z, pool).cpu()
            bar.update(len(rows))
    return embeddings


@torch.no_grad()
def encode(encoder: Encoder, weights: Tensor, *, halo: int | None, batch_size: int = 64) -> Tensor:
    """Embeds all tokens of networks: flat weights ``[B, P]`` to ``[B, N, E]`` float32; see ``embed``."""
    layout, device = encoder.layout, weights.device
    starts, window, place = chunk(layout.num_tokens, encoder.model.config.window, halo)
    table = layout.table.to(device)
    model = torch.arange(len(weights)).repeat_interleave(len(starts)).to(device)
    start = starts.repeat(len(weights)).to(device)
    parts = []
    for some, begin in zip(model.split(batch_size), start.split(batch_size), strict=True):
        values, _, positions = fastws.token_views(
            weights, table, layout.token_size, some, begin, window,
            scale=encoder.scale, shift=encoder.shift, dtype=torch.float32,
        )  # fmt: skip
        parts.append(encoder.model.encode(values, positions).float())
    z = torch.cat(parts).view(len(weights), len(starts) * window, -1)
    return z[:, place.to(device)]


def average(encoder: Encoder, z: Tensor, pool: Pool) -> Tensor:
    """Means of token embeddings ``[B, N, E]``: ``[B, E]``, or of each layer ``[B, L * E]``; see ``embed``."""
    if pool == "mean":
        return z.mean(1)
    counts = encoder.layout.positions[:, 1].bincount().tolist()
    return torch.cat([layer.mean(1) for layer in z.split(counts, 1) if layer.shape[1]], 1)


def chunk(num_tokens: int, window: int, halo: int | None) -> tuple[Tensor, int, Tensor]:
    """Windows such that each token is seen with ``halo`` tokens on both sides, where there are so many.

    Returns:
        The starts of the windows ``[C]``, their length W, and for each token where to read it among the ``C * W``
        tokens of the windows, ``[N]``. A window that would begin before the sequence begins with it, and one that
        would end behind it ends with it.
    """
    if halo is None or num_tokens <= window:
        return torch.zeros(1, dtype=torch.int64), num_tokens, torch.arange(num_tokens)
    content = window - 2 * halo
    if halo < 0 or content < 1:
        raise ValueError(f"embed: halo must be in [0, {(window - 1) // 2}] for a window of {window} tokens, got {halo}")
    starts = (torch.arange(0, num_tokens, content) - halo).clamp(0, num_tokens - window)
    token = torch.arange(num_tokens)
    owner = token // content
    return starts, window, owner * window + token - starts[owner]


def compare_distances(features: Tensor, moved: Tensor) -> dict[str, float]:
    """Distances between networks and their permuted copies, beside those between different networks.

    Args:
        features: ``[n, d]``, at least two networks.
        moved: ``[n * k, d]``, k copies of each.
    """
    own = (features[:, None] - moved.unflatten(0, (len(features), -1))).norm(dim=-1)  # [n, k]
    apart = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    others = apart[~torch.eye(len(features), dtype=torch.bool)].view(len(features), -1)  # [n, n - 1]
    return {
        "permuted": own.mean().item(),
        "other": others.mean().item(),
        "ratio": (own.mean() / others.mean()).item(),
        "nearer": (own[:, :, None] < others[:, None]).double().mean().item(),
        "nearer_than_nearest": (own < others.min(1, keepdim=True).values).double().mean().item(),
    }


def save_embeddings(path: str | Path, embeddings: Tensor, layout: fastws.Layout, aligned: bool = False) -> None:
    metadata = {"fastws": json.dumps({"fingerprint": layout.fingerprint, "aligned": aligned})}
    write_tensors(Path(path), {"embeddings": embeddings}, metadata)


def load_embeddings(path: str | Path, rows: int, layout: fastws.Layout) -> Tensor:
    """Reads what ``embed`` wrote for a zoo of so many rows and of this layout.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        with open_tensors(path) as file:
            embeddings = file.get_tensor("embeddings") if "embeddings" in file.keys() else None  # noqa: SIM118
            told = parse((file.metadata() or {}).get("fastws", "{}"), "what it says of itself")
            made_for = told.get("fingerprint", layout.fingerprint)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"predict: {path} must be a file that fastws embed wrote, got {error}") from error
    if embeddings is None or embeddings.dim() != 2 or len(embeddings) != rows:
        got = "none" if embeddings is None else list(embeddings.shape)
        raise ValueError(f"predict: {path} must hold embeddings [{rows}, E], one per row of the zoo, got {got}")
    if made_for != layout.fingerprint:
        what = f"of the architecture {layout.fingerprint} of the zoo, got those of {made_for}"
        raise ValueError(f"predict: {path} must hold embeddings {what}")
    if not embeddings.isfinite().all():
        row = int((~embeddings.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"predict: {path} must hold finite embeddings, got others first in row {row}")
    return embeddings
