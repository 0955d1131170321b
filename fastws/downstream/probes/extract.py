"""What makes features of zoos, as a command asks for them; what is fitted is fitted to the zoo of the probes."""

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fastws.devices import find_device
from fastws.downstream.embed import embed, embed_whole, load_embeddings
from fastws.downstream.encoder import default_halo
from fastws.downstream.probes import transforms
from fastws.downstream.probes.features import WEIGHTS_AT_ONCE, layer_statistics, layers_of
from fastws.downstream.probes.spectra import layer_spectra
from fastws.downstream.representation import Tokens, load
from fastws.layout.layout import Layout
from fastws.zoo.alignment import rows_of
from fastws.zoo.format.zoo import Zoo

Features = Literal["statistics", "weights", "chunk", "spectra", "kpca", "umap"]
Transformed = Literal["none", "polar"]
Extractor = Callable[[Zoo], Tensor]  # features [M, d] of all states of a zoo


class Options(Protocol):
    """What of a command's configuration decides about features."""

    model: str | None
    embeddings: str | None
    aligned: bool
    features: tuple[Features, ...]
    transform: Transformed
    apart: bool
    chunk: int
    chunk_start: int | None
    leading: int | None
    norm: bool
    padded: int | None
    published: bool
    seed: int
    device: str | None


def make_extractors(options: Options, zoo: Zoo) -> dict[str, Extractor]:
    """The feature sets that were asked for, by name.

    Raises:
        ValueError: If there is none, or one of them cannot be had.
    """
    padded = options.padded is not None or options.published
    layout = zoo.layout.with_tokens(options.padded, "keep" if options.norm or options.published else "skip")
    read = partial(read_weights, aligned=options.aligned, norm=options.norm or options.published)
    statistics = partial(layer_statistics, padded=padded, apart=options.apart)
    components = transforms.COMPONENTS[0]
    spectra = partial(layer_spectra, leading=options.leading)
    makers: dict[str, Callable[[], dict[str, Extractor]]] = {
        "statistics": lambda: {"statistics": partial(by_parts, statistics, options, options.padded)},
        "weights": lambda: {"weights": read},
        "chunk": lambda: {"chunk": chunk_of(options, layout, read)},
        "spectra": lambda: {"spectra": partial(by_parts, spectra, options, None)},
        "kpca": lambda: kernel_components(read, zoo),
        "umap": lambda: {"umap": after(read, transforms.umap(read(zoo)[zoo.split("train")], components))},
    }
    found = embeddings_of(options, zoo)
    for name in options.features:
        found |= makers[name]()
    if not found:
        what = f"{', '.join(get_args(Features))}, or give model or embeddings"
        raise ValueError(f"predict: features must be asked for, got none; take some of {what}")
    if options.transform == "polar":
        found = {f"{name} polar": after(extract, transforms.polar) for name, extract in found.items()}
    return found


def after(extract: Extractor, transform: transforms.Transform) -> Extractor:
    return lambda zoo: transform(extract(zoo))


def embeddings_of(options: Options, zoo: Zoo) -> dict[str, Extractor]:
    if options.embeddings is not None:
        return {"embedding": lambda other: load_embeddings(options.embeddings, len(other), other.layout)}
    if options.model is None:
        return {}
    model = load(options.model, find_device(options.device))
    if not isinstance(model, Tokens):
        return {"embedding": lambda other: embed_whole(model, other, aligned=options.aligned)}
    halo = None if options.published else default_halo(model.encoder)
    return {"embedding": lambda other: embed(model.encoder, other, halo=halo, aligned=options.aligned)}


def read_weights(zoo: Zoo, *, aligned: bool, norm: bool) -> Tensor:
    layout = zoo.layout.with_tokens(None, "keep" if norm else "skip")
    return torch.cat(layers_of(rows_of(zoo, aligned)(torch.arange(len(zoo))), layout), 1)


def by_parts(make: Callable[[Tensor, Layout], Tensor], options: Options, token_size: int | None, zoo: Zoo) -> Tensor:
    """Features of flat weights, some networks at a time."""
    read = rows_of(zoo, options.aligned)
    layout = zoo.layout.with_tokens(token_size, "keep" if options.norm or options.published else "skip")
    parts = torch.arange(len(zoo)).split(max(1, WEIGHTS_AT_ONCE // layout.num_weights))
    return torch.cat([make(read(rows), layout) for rows in parts])


def chunk_of(options: Options, layout: Layout, read: Extractor) -> Extractor:
    """Consecutive weights, the same of each network."""
    total = sum(part.shape[1] for part in layers_of(torch.empty(1, layout.num_weights), layout))
    last = max(0, total - options.chunk)
    drawn = int(torch.randint(last + 1, (), generator=torch.Generator().manual_seed(options.seed)))
    start = drawn if options.chunk_start is None else options.chunk_start
    if not 0 <= start <= last:
        raise ValueError(f"predict: chunk_start must be in [0, {last}] of {total:,} weights, got {start}")
    return lambda zoo: read(zoo)[:, start : start + options.chunk].contiguous()


def kernel_components(read: Extractor, zoo: Zoo) -> dict[str, Extractor]:
    """Components of each kernel; those of the smaller numbers are the first of the largest."""
    train, found = read(zoo)[zoo.split("train")], {}
    for kernel in transforms.KERNELS:
        try:
            extract = after(read, transforms.kernel_pca(train, kernel, max(transforms.COMPONENTS)))
        except FloatingPointError as error:
            print(f"note: kpca {kernel} is left out: {error}")
            continue
        for count in transforms.COMPONENTS:
            found[f"kpca {kernel} {count}"] = after(extract, lambda x, count=count: x[:, :count])
    return found
