"""Embeddings of the networks of a zoo by a learned representation, and the files they are kept in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import pyarrow
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import fastws
from fastws.devices import find_device
from fastws.downstream.encoder import Encoder, Pool, average, chunk, default_halo, encode, pool_shape, suit
from fastws.downstream.hub import embed_hub, open_for, require_one, require_room, save_hub
from fastws.downstream.representation import BATCH, Representation, Tokens, load
from fastws.files.atomic import write_atomically, write_tensors
from fastws.files.json import parse
from fastws.files.lock import one_writer
from fastws.files.safetensors import open_tensors
from fastws.zoo.alignment import rows_of
from fastws.zoo.format.zoo import Zoo


@dataclass(frozen=True, kw_only=True)
class Config:
    """Embeds every network of a zoo, or of a folder, of any architecture, also another than a SANE was trained on.

    fastws embed --model runs/sane/checkpoint.pt --zoo zoos/digits --pool layers --out embeddings.parquet
    fastws embed --model runs/hub/checkpoint.pt --hub models --out embeddings.safetensors

    A safetensors file has "embeddings" [M, E] in the order of the zoo's rows, or of the models of a hub by name, which
    it holds; a parquet file one row for each vector, with the model and the epoch of the network, the layer or the
    token, and the vector. The models of a hub are the safetensors files of a folder, by their paths in it.
    """

    model: str  # checkpoint.pt of fastws train sane or train ae
    zoo: str | None = None  # folder of the zoo
    hub: str | None = None  # in place of a zoo, a folder of safetensors files of any architectures, read in place
    out: str  # file to write, .safetensors or .parquet
    aligned: bool = False  # networks in the order that fastws zoo align found, as the model should have been trained

    pool: Pool = "mean"  # of a SANE's token embeddings: their mean, that of each layer, all tokens, or spread per layer
    halo: int | None = None  # tokens seen on both sides of a chunk; by default a quarter of the training window
    one_pass: bool = False  # encode the whole sequence at once, as the published code does for properties
    batch_size: int = 64  # windows per forward pass
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"embed: batch_size must be at least 1, got {self.batch_size}")
        if self.halo is not None and self.halo < 0:
            raise ValueError(f"embed: halo must be at least 0, got {self.halo}")
        require_one("embed", self.zoo, self.hub)
        if self.hub is not None:
            require_room(self.out, self.pool)
            if self.aligned:
                raise ValueError("embed: aligned must be left out for a hub, whose models have no alignment, got True")


def run(config: Config) -> None:
    device = find_device(config.device)
    if config.hub is not None:
        run_hub(config, device)
        return
    model, zoo = load(config.model, device), Zoo.open(config.zoo)
    with one_writer(Path(config.out)), precision_of(config, device):
        if isinstance(model, Tokens):
            encoder = suit(model.encoder, zoo)
            options = {"batch_size": config.batch_size, "pool": config.pool, "aligned": config.aligned}
            embeddings = embed(encoder, zoo, halo=halo_of(config, encoder), **options)
            vectors = pool_shape(encoder, config.pool)[0]
        elif config.pool != "mean":
            what = f"mean for {config.model}, whose networks have one code each, got {config.pool}"
            raise ValueError(f"embed: pool must be {what}")
        else:
            embeddings, vectors = embed_whole(model, zoo, aligned=config.aligned), 1
        if Path(config.out).suffix == ".parquet":
            write_parquet(config.out, embeddings.view(len(zoo), vectors, -1), zoo, config.pool, model)
        else:
            save_embeddings(config.out, embeddings, zoo.layout, config.aligned)
    if isinstance(model, Tokens) and encoder is not model.encoder:
        print("note: the model was trained on networks of another architecture; these are standardised by themselves")
    if model.aligned != config.aligned:
        trained, now = (("aligned" if x else "stored") for x in (model.aligned, config.aligned))
        print(f"note: the model was trained on networks as {trained}, these are embedded as {now}; see --aligned")
    print(f"embeddings {list(embeddings.shape)}: {config.out}")


def precision_of(config: Config, device: torch.device) -> torch.autocast:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def halo_of(config: Config, encoder: Encoder) -> int | None:
    """Tokens on both sides of a chunk; None encodes each network in one pass."""
    if config.one_pass:
        return None
    return default_halo(encoder) if config.halo is None else config.halo


def run_hub(config: Config, device: torch.device) -> None:
    model = load(config.model, device)
    if not isinstance(model, Tokens):
        raise ValueError(f"embed: model must be of fastws train sane for a hub, got one of train ae: {config.model}")
    hub = open_for(model.encoder, config.hub)
    print(*hub.describe(), sep="\n")
    halo, options = halo_of(config, model.encoder), {"batch_size": config.batch_size, "pool": config.pool}
    with one_writer(Path(config.out)), precision_of(config, device):
        embedded = embed_hub(model.encoder, hub, halo=halo, **options)
        for name, reason in embedded.left_out.items():
            print(f"left out: {name}: {reason}")
        if not embedded.models:
            raise ValueError(f"embed: hub {config.hub} must hold a model that can be embedded, got none")
        save_hub(config.out, embedded, config.pool)
    count, size = sum(map(len, embedded.vectors)), embedded.vectors[0].shape[1]
    print(f"embeddings {[count, size]} of {len(embedded.models):,} models: {config.out}")


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
    """Embeds all rows of a zoo by a SANE; shows progress.

    Args:
        encoder: From ``load_encoder``.
        zoo: Of any architecture that the encoder has positions for; see ``suit``.
        halo: Tokens seen on both sides of a chunk; None encodes each network in one pass.
        batch_size: Windows per forward pass.
        pool: ``"mean"`` averages the embeddings of all tokens, as published; ``"layers"`` those of each layer;
            ``"tokens"`` keeps all; ``"spread"`` says how far those of each layer lie apart. See ``pool_shape``.
        aligned: Read the networks in the order that ``fastws zoo align`` found.

    Returns:
        What was kept of the token embeddings of each row, vector after vector, ``[M, width]`` float32, on the CPU.

    Raises:
        FileNotFoundError: If ``aligned`` and the zoo has no alignment.
        ValueError: If the encoder has too few positions, or the halo leaves nothing of the window.
    """
    encoder = suit(encoder, zoo)
    window, device, read = encoder.model.config.window, encoder.scale.device, rows_of(zoo, aligned)
    windows = len(chunk(encoder.layout.num_tokens, window, halo)[0])
    together = max(1, batch_size // windows)
    embeddings = torch.empty(len(zoo), int(numpy.prod(pool_shape(encoder, pool))))
    with tqdm(total=len(zoo), desc="embed", unit="network") as bar:
        for rows in torch.arange(len(zoo)).split(together):
            z = encode(encoder, read(rows).to(device), halo=halo, batch_size=batch_size)
            embeddings[rows] = average(encoder, z, pool).cpu()
            bar.update(len(rows))
    return embeddings


def embed_whole(model: Representation, zoo: Zoo, *, aligned: bool = False) -> Tensor:
    """The codes of all rows of a zoo by an autoencoder of whole networks, ``[M, E]`` float32; shows progress.

    Raises:
        FileNotFoundError: If ``aligned`` and the zoo has no alignment.
        ValueError: If the zoo is of another architecture than the model.
    """
    model.layout.require_same(zoo.layout, f"embed: zoo {zoo.path}")
    read, device = rows_of(zoo, aligned), next(model.model.parameters()).device
    parts = torch.arange(len(zoo)).split(BATCH)
    return torch.cat([model.encode(read(rows).to(device)).float().cpu() for rows in tqdm(parts, desc="embed")])


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


def write_parquet(path: str, vectors: Tensor, zoo: Zoo, pool: Pool, model: Representation) -> None:
    """One row for each vector ``[M, k, E]``: model, epoch where it is known, layer, token, vector."""
    count = vectors.shape[1]
    repeated = numpy.arange(len(zoo)).repeat(count)
    known = [name for name in ("model", "epoch") if name in zoo.properties.column_names]
    columns = {name: zoo.properties[name].take(repeated) for name in known}
    layer, token = [None] * count, [None] * count
    if pool != "mean":
        layout = suit(model.encoder, zoo).layout
        numbers = layout.positions[:, 1]
        layer = [layout.layers[n][0] for n in (numbers if pool == "tokens" else numbers.unique()).tolist()]
        token = list(range(count)) if pool == "tokens" else token
    columns["layer"] = pyarrow.array(layer * len(zoo), "string")
    columns["token"] = pyarrow.array(token * len(zoo), "int32")
    flat = pyarrow.array(vectors.flatten().numpy())
    columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[2])
    table = pyarrow.table(columns)
    with write_atomically(Path(path), table.nbytes) as file:
        pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True)


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
        raise ValueError(f"embeddings: {path} must be a file that fastws embed wrote, got {error}") from error
    if embeddings is None or embeddings.dim() != 2 or len(embeddings) != rows:
        got = "none" if embeddings is None else list(embeddings.shape)
        raise ValueError(f"embeddings: {path} must hold embeddings [{rows}, E], one per row of the zoo, got {got}")
    if made_for != layout.fingerprint:
        what = f"of the architecture {layout.fingerprint} of the zoo, got those of {made_for}"
        raise ValueError(f"embeddings: {path} must hold embeddings {what}")
    if not embeddings.isfinite().all():
        row = int((~embeddings.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"embeddings: {path} must hold finite embeddings, got others first in row {row}")
    return embeddings
