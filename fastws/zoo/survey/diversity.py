"""How different the networks of a zoo are: in their weights, along their training, and in what they compute.

Everything is measured on a sample of the networks, at all their epochs, and read epoch by epoch; only the search for
equal states reads the whole zoo, once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from fastws.layout.layout import Layout
from fastws.matching.canonical import canonical_hashes
from fastws.ops.layer_statistics import layer_statistics
from fastws.ops.small_cnn_step import small_cnn_logits
from fastws.small_cnn.table import ACTIVATIONS
from fastws.table import table_columns
from fastws.zoo.alignment import aligned_rows, find_alignment, rows_of
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.make import config_of, prepare
from fastws.zoo.making.recipes import check_choices

AT_ONCE = 2**28  # weights in memory, of the networks of a sample at one epoch
WEIGHTS_AT_A_TIME = 2**16  # weights that are multiplied at a time in float64


class Sample(NamedTuple):
    """Some networks of a zoo, at all epochs that the zoo holds."""

    models: list[str]
    epochs: list[int]
    rows: Tensor  # int64 [models, epochs], -1 where the zoo has no such state

    def last(self) -> Tensor:
        """The row of each network's last state."""
        places = torch.arange(len(self.epochs)).where(self.rows >= 0, -1).amax(1)
        return self.rows.gather(1, places[:, None])[:, 0]


class Distances(NamedTuple):
    """Between all pairs of networks, ``[n * (n - 1) / 2]`` float64."""

    l2: Tensor
    cosine: Tensor  # 1 - cos


class Duplicates(NamedTuple):
    """States whose weights an earlier state has already."""

    states: int  # that were compared
    repeated: int
    example: tuple[int, int] | None  # rows of the zoo


class Weights(NamedTuple):
    """What the weights of a sample look like."""

    statistics: Tensor  # [epochs, models, tensors, 7], nan where there is no such state
    steps: Tensor  # [models, epochs - 1], distance between states that follow one another, nan likewise
    std: Tensor  # [P], of each weight over the last states
    distances: dict[str, Distances]  # "raw", and "aligned" if the zoo has an alignment; of the last states
    permuted: Duplicates  # of the last states: equal up to a permutation of neurons
    not_aligned: str = ""  # why there is no "aligned" though the zoo has an alignment


class Functions(NamedTuple):
    """What the last states of a sample compute on test images."""

    images: int
    agreement: Tensor  # [n, n], share of images for which two networks predict the same class
    cka: Tensor  # [n, n], linear CKA of the logits
    accuracy: Tensor  # [n]


# --- samples


def draw_sample(zoo: Zoo, count: int, seed: int) -> Sample:
    """Draws at most ``count`` networks with states of known epochs, and no more than fit into memory at one epoch."""
    table = zoo.properties
    encoded = table["model"].cast("string").combine_chunks().dictionary_encode()
    member, names = encoded.indices.to_numpy(), encoded.dictionary
    known = "epoch" in table.column_names
    number = zoo.numbers("epoch") if known else numpy.zeros(len(zoo))
    dated = numpy.isfinite(number)  # states without an epoch stand in no table of epochs
    if not dated.any():
        number, dated = numpy.zeros(len(zoo)), numpy.ones(len(zoo), dtype=bool)
    candidates = numpy.unique(member[dated])
    count = min(count, len(candidates), max(2, AT_ONCE // zoo.layout.num_weights))
    chosen = numpy.sort(numpy.random.default_rng(seed).choice(candidates, count, replace=False))
    place = numpy.full(len(names), -1)
    place[chosen] = numpy.arange(count)
    epochs = numpy.unique(number[dated])
    epoch = numpy.searchsorted(epochs, number)
    here = numpy.flatnonzero((place[member] >= 0) & dated)
    rows = torch.full((count, len(epochs)), -1)
    rows[place[member[here]], epoch[here]] = torch.from_numpy(here)
    return Sample([names[int(number)].as_py() for number in chosen], [int(e) for e in epochs], rows)


def tensor_offsets(layout: Layout) -> Tensor:
    """Where each tensor of a flat vector begins and ends, weights and biases on their own: ``[L, 2]``."""
    columns = table_columns(layout.tensor_table)
    return torch.stack([columns.weight_offset, columns.weight_offset + columns.rows * columns.row_length], 1)


def tensor_names(layout: Layout) -> list[str]:
    """Names of the tensors, in the order of ``tensor_offsets``."""
    return [entry.name for entry in layout.entries if entry.offset >= 0 and entry.numel > 0]


# --- weights


def measure_weights(zoo: Zoo, sample: Sample, aligned: bool = False) -> Weights:
    """Reads the states of a sample, epoch by epoch, aligned if that is asked for; shows progress."""
    read = rows_of(zoo, aligned)
    offsets = tensor_offsets(zoo.layout)
    count = len(sample.models)
    statistics = torch.full((len(sample.epochs), count, len(offsets), 7), torch.nan, dtype=torch.float64)
    steps = torch.full((count, max(len(sample.epochs) - 1, 0)), torch.nan, dtype=torch.float64)
    before = None
    for number, rows in enumerate(tqdm(sample.rows.unbind(1), desc="weights", unit="epoch")):
        there = rows >= 0
        weights = torch.full((count, zoo.layout.num_weights), torch.nan, dtype=zoo.dtype)
        weights[there] = read(rows[there])
        statistics[number] = layer_statistics(weights, offsets)
        if before is not None:
            steps[:, number - 1] = distances(weights, before)
        before = weights
    rows = sample.last()
    last = zoo.rows(rows)
    between = {"raw": pairwise_distances(last)}
    not_aligned = ""
    if find_alignment(zoo) is not None:
        try:
            between["aligned"] = pairwise_distances(aligned_rows(zoo, rows))
        except ValueError as error:
            not_aligned = str(error)
    permuted = count_repeated(canonical_hashes(last, zoo.symmetry, zoo.layout, flips=zoo.may_flip[rows]), rows.tolist())
    spread = read(rows) if aligned else last
    std = torch.cat([part.double().std(0, correction=0) for part in spread.split(WEIGHTS_AT_A_TIME, 1)])
    return Weights(statistics, steps, std, between, permuted, not_aligned)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Between rows of ``[n, P]``, one by one: copies in float64 would be large."""
    return torch.stack([(x.double() - y.double()).norm() for x, y in zip(a, b, strict=True)])


def pairwise_distances(weights: Tensor) -> Distances:
    """Euclidean and cosine distances between the rows of ``[n, P]``."""
    products = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for part in weights.split(WEIGHTS_AT_A_TIME, 1):
        products += part.double() @ part.double().T
    i, j = torch.triu_indices(len(weights), len(weights), 1)
    square, product = products.diagonal(), products[i, j]
    l2 = (square[i] + square[j] - 2 * product).clamp(min=0).sqrt()
    return Distances(l2, 1 - product / (square[i] * square[j]).sqrt())


# --- duplicates


def find_duplicates(zoo: Zoo) -> Duplicates:
    """States whose weights are equal bit for bit, by a hash of each; reads the zoo once, and shows progress."""
    hashes = numpy.empty(len(zoo), "S16")
    number = 0
    with tqdm(total=len(zoo), desc="duplicates", unit=" states") as bar:
        for shard in zoo.shards:
            for row in shard.view(torch.uint8).numpy():
                hashes[number] = hashlib.blake2b(row, digest_size=16).digest()
                number += 1
                bar.update()
    return count_repeated(hashes, range(len(zoo)))


def count_repeated(hashes: Sequence, rows: Sequence[int]) -> Duplicates:
    """How many hashes have been seen before; ``rows`` are the rows of the zoo that they belong to."""
    _, first, inverse = numpy.unique(numpy.asarray(hashes), return_index=True, return_inverse=True)
    repeated = numpy.flatnonzero(first[inverse] != numpy.arange(len(inverse)))
    example = (rows[first[inverse[repeated[0]]]], rows[repeated[0]]) if len(repeated) else None
    return Duplicates(len(inverse), len(repeated), example and (int(example[0]), int(example[1])))


# --- functions


def measure_functions(zoo: Zoo, sample: Sample, data: str | None = None, limit: int = 2000) -> Functions:
    """Runs the last states of a sample on test images.

    Args:
        zoo: One that ``fastws zoo make`` or ``sparsify`` wrote: its provenance says what networks and images are.
        sample: Which networks.
        data: Where the images are; by default where they were when the zoo was made.
        limit: Images to take, evenly spaced.

    Raises:
        FileNotFoundError: If the images are not there.
        ValueError: If the provenance does not say what the networks are.
    """
    logits, labels = compute_logits(zoo, sample, data, limit)
    predictions = logits.argmax(2)
    accuracy = (predictions == labels).double().mean(1)
    return Functions(len(labels), agreement(predictions), linear_cka(logits), accuracy)


def compute_logits(zoo: Zoo, sample: Sample, data: str | None, limit: int) -> tuple[Tensor, Tensor]:
    """Logits ``[n, images, classes]`` of last states, and labels ``[images]``."""
    # sparse twins have the recipes of their parents
    told = zoo.provenance.get("parent", {"provenance": zoo.provenance})
    config = config_of(zoo.path, told.get("provenance") if isinstance(told, dict) else None)
    job = prepare(replace(config, data=data or config.data, device="cpu"))
    x, y = job.data.test
    images = torch.arange(len(y)) if len(y) <= limit else torch.linspace(0, len(y) - 1, limit).long()
    x, y, rows = x[images], y[images], sample.last()
    if "activation" in zoo.properties.column_names:
        activations = zoo.properties["activation"].take(rows.numpy()).to_pylist()
        check_choices(zoo.path, "activation", activations, ACTIVATIONS)
    else:
        activations = [config.activations[0]] * len(rows)
    weights = zoo.rows(rows).float()
    if not job.one_by_one:
        codes = torch.tensor([list(ACTIVATIONS).index(name) for name in activations], dtype=torch.int32)
        return small_cnn_logits(weights, x, job.plan.layers(), codes), y
    logits = []
    for row, activation in zip(weights, tqdm(activations, desc="functions", unit="network"), strict=True):
        network, state = job.plan.build(activation), zoo.layout.unflatten(row)
        with torch.no_grad():
            logits.append(torch.cat([functional_call(network, state, (part,)) for part in x.split(200)]))
    return torch.stack(logits), y


def agreement(predictions: Tensor) -> Tensor:
    """Share of samples with equal class for each pair of networks: ``[n, images]`` to ``[n, n]`` (arXiv 2209.14764)."""
    same = torch.zeros(len(predictions), len(predictions))
    for label in predictions.unique():
        predicted = (predictions == label).float()
        same += predicted @ predicted.T
    return same.double() / predictions.shape[1]


def linear_cka(features: Tensor) -> Tensor:
    """Linear centred kernel alignment of each pair of networks (Kornblith et al., arXiv 1905.00414, equation 5).

    ``|X' Y|^2 / (|X' X| |Y' Y|)`` for features centred over the samples, in Frobenius norms; nan if they are constant.

    Args:
        features: ``[n, samples, d]``.

    Returns:
        ``[n, n]``, float64.
    """
    n, samples, size = features.shape
    centred = (features.double() - features.double().mean(1, keepdim=True)).permute(1, 0, 2).reshape(samples, n * size)
    squares = (centred.T @ centred).square().view(n, size, n, size).sum((1, 3))
    norms = squares.diagonal().sqrt()
    return squares / (norms[:, None] * norms)


def pairs(matrix: Tensor) -> Tensor:
    """The entries above the diagonal of ``[n, n]``."""
    i, j = torch.triu_indices(len(matrix), len(matrix), 1)
    return matrix[i, j]
