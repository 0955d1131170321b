"""Embeddings of the models of a hub, a folder of files of any architectures, and the files they are kept in."""

import json
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from fastws.downstream.encoder import Encoder, Pool, average, chunk, has_positions, pool_shape, stitch, told
from fastws.files.atomic import write_atomically, write_tensors
from fastws.files.json import parse
from fastws.files.safetensors import open_tensors
from fastws.windows.hub import Hub, open_hub
from fastws.windows.population import cut


class Embedded(NamedTuple):
    """Vectors of the models of a hub that could be embedded, in the order of their names."""

    models: list[str]
    vectors: list[Tensor]  # of each model, [k, E] float32, on the CPU; see pool_shape
    layers: list[list[str | None]]  # of each vector, the name of its layer
    left_out: dict[str, str]  # models that were opened, but not embedded, and why


def open_for(encoder: Encoder, folder: str | Path) -> Hub:
    """A hub with the tokens that an encoder was trained on; see ``open_hub``."""
    layout = encoder.layout
    options = {"token_size": layout.token_size, "norm": layout.norm, "span": layout.span}
    return open_hub(folder, standardize=encoder.standardizes, **options)


@torch.no_grad()
def embed_hub(encoder: Encoder, hub: Hub, *, halo: int | None, batch_size: int = 64, pool: Pool = "mean") -> Embedded:
    """Embeds all models of a hub by a SANE; shows progress.

    A vector is a function of the encoder and the model's own file, whatever else lies in the folder. Models with more
    tokens, layers or units than the encoder has positions for are left out, as are those with numbers that are not
    finite.

    Args:
        encoder: From ``load_encoder``.
        hub: From ``open_for``.
        halo: Tokens seen on both sides of a chunk; None encodes each network in one pass.
        batch_size: Windows per forward pass.
        pool: What is kept of token embeddings; see ``embed``.

    Raises:
        ValueError: If the halo leaves nothing of the window.
    """
    population, found, left_out = hub.population, {}, {}
    with tqdm(total=len(hub.models), desc="embed", unit="model") as bar:
        for number, kind in enumerate(population.kinds):
            rows = (population.kind == number).nonzero().flatten()
            own = encoder._replace(layout=kind.layout)
            if has_positions(encoder.model.config, kind.layout):
                found |= {row: (own, vectors) for row, vectors in embed_rows(own, hub, rows, halo, batch_size, pool)}
            else:
                needed, known = (kind.layout.positions.amax(0) + 1).tolist(), encoder.model.config.max_positions
                reason = f"must have at most {known} tokens, layers and units, as the encoder has, got {needed}"
                left_out |= {hub.models[row]: reason for row in rows.tolist()}
            bar.update(len(rows))
    for row in population.measured.not_finite & found.keys():
        del found[row]
        left_out[hub.models[row]] = "weights must be finite, got others"
    rows = sorted(found, key=lambda row: hub.models[row])
    layers = [layers_of(found[row][0], pool) for row in rows]
    return Embedded([hub.models[row] for row in rows], [found[row][1] for row in rows], layers, left_out)


def embed_rows(encoder: Encoder, hub: Hub, rows: Tensor, halo: int | None, batch_size: int, pool: Pool):
    """The rows of networks of one architecture, and the vectors ``[k, E]`` of each."""
    device, shape = encoder.scale.device, pool_shape(encoder, pool)
    starts, window, place = chunk(encoder.layout.num_tokens, encoder.model.config.window, halo)
    places, steps = told(encoder), torch.arange(window)
    for some in rows.split(max(1, batch_size // len(starts))):
        model, start = some.repeat_interleave(len(starts)), starts.repeat(len(some))
        parts = []
        for own, begin in zip(model.split(batch_size), start.split(batch_size), strict=True):
            values = cut(hub.population, own, begin, window).values.to(device)
            parts.append(encoder.model.encode(values, places[(begin[:, None] + steps).to(device)]).float())
        z = stitch(torch.cat(parts).view(len(some), len(starts) * window, -1), place)
        yield from zip(some.tolist(), average(encoder, z, pool).cpu().view(len(some), *shape), strict=True)


def layers_of(encoder: Encoder, pool: Pool) -> list[str | None]:
    """The name of the layer that each vector of a network is of."""
    if pool == "mean":
        return [None]
    numbers = encoder.layout.positions[:, 1]
    return [encoder.layout.layers[n][0] for n in (numbers if pool == "tokens" else numbers.unique()).tolist()]


def require_one(where: str, zoo: str | None, hub: str | None) -> None:
    """Raises ValueError unless either a zoo or a hub is given."""
    if (zoo is None) == (hub is None):
        got = "neither" if zoo is None else f"{zoo} and {hub}"
        raise ValueError(f"{where}: one of zoo and hub must be given, got {got}")


def require_room(out: str, pool: Pool) -> None:
    """Raises ValueError if a file cannot hold what is kept of models, which have several vectors each."""
    if pool != "mean" and Path(out).suffix != ".parquet":
        raise ValueError(f"embed: out must end in .parquet for pool {pool} of a hub, got {out}")


def save_hub(out: str, embedded: Embedded, pool: Pool) -> None:
    """Writes a parquet file with a row for each vector, or "embeddings" ``[M, E]`` and the names of the models."""
    if Path(out).suffix != ".parquet":
        metadata = {"fastws": json.dumps({"models": embedded.models})}
        write_tensors(Path(out), {"embeddings": torch.cat(embedded.vectors)}, metadata)
        return
    counts = [len(vectors) for vectors in embedded.vectors]
    models = [model for model, count in zip(embedded.models, counts, strict=True) for _ in range(count)]
    tokens = [token if pool == "tokens" else None for count in counts for token in range(count)]
    flat = torch.cat(embedded.vectors)
    columns = {
        "model": pyarrow.array(models, "string"),
        "layer": pyarrow.array([layer for some in embedded.layers for layer in some], "string"),
        "token": pyarrow.array(tokens, "int32"),
        "vector": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.flatten().numpy()), flat.shape[1]),
    }
    table = pyarrow.table(columns)
    with write_atomically(Path(out), table.nbytes) as file:
        pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True)


def load_hub(path: str | Path) -> tuple[list[str], Tensor]:
    """The names of models and their embeddings ``[M, E]``, as ``fastws embed --hub`` wrote them.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        with open_tensors(path) as file:
            told = parse((file.metadata() or {}).get("fastws", "{}"), "what it says of itself")
            models, embeddings = told.get("models"), file.get_tensor("embeddings")
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(f"neighbors: {path} must be a file that fastws embed --hub wrote, got {error}") from error
    named = isinstance(models, list) and all(isinstance(model, str) for model in models)
    if not named or embeddings.dim() != 2 or len(embeddings) != len(models) or not embeddings.isfinite().all():
        what = "one finite vector for each model by name"
        raise ValueError(f"neighbors: {path} must hold {what}, as fastws embed --hub writes it, got other things")
    return models, embeddings
