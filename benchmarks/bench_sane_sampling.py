"""Sampling from SANE's codes of tokens: kernel densities, and windows with a halo; ResNet-18 of 53,704 tokens.

Predicted, one thread. Ten samples of 128 entries a token from 140 anchors: a sample of a token is a row of 512 bytes
read at random and 128 normals of 4 ns, so .6 us; scikit-learn builds a tree of 140 points for each token and draws ten,
1.6 ms a token, 160 us a sample: 250 times, and as released, where noise is drawn once for all tokens, 1,000 times.
Windows of 256 tokens, 128 of them halo, are 55 MB written once and read once, 20 ms of fresh memory; the published loop
selects window by window, stacks them and puts slices side by side, three copies: 2 times. With four entries a token,
where its 420 turns of a loop are all that counts, 10 times and more.

Run: fastws bench sane_sampling [--full]
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import numpy
import torch
from torch import Tensor

from fastws.benchmarks.harness import Case, Options
from fastws.downstream.encoder import chunk, stitch, windows_of
from fastws.downstream.sampling import generators

if find_spec("sklearn"):
    from sklearn.neighbors import KernelDensity

ANCHORS, SAMPLES, LATENT, BANDWIDTH = 140, 10, 128, 0.2
TOKENS = 53_704  # of ResNet-18 for CIFAR-100, norms included
SAMPLED = 2_685  # tokens of the usual size, a twentieth
WINDOW, HALO = 256, 64


# --- densities


def make_anchors(tokens: int) -> tuple[Tensor]:
    return (torch.randn(ANCHORS, tokens * LATENT, generator=torch.Generator().manual_seed(0)),)


def draw_independent(anchors: Tensor) -> Tensor:
    return generators.kde(anchors, SAMPLES, BANDWIDTH, torch.Generator().manual_seed(1), width=LATENT).points


def draw_reference(anchors: Tensor) -> Tensor:
    return generators.kde_reference(anchors, SAMPLES, BANDWIDTH, width=LATENT).points


def draw_by_densities(anchors: Tensor, seed: int | None) -> Tensor:
    """A density for each token; as released all of them draw with the same seed."""
    parts, random = [], numpy.random.RandomState(0)
    for part in anchors.view(len(anchors), -1, LATENT).transpose(0, 1).numpy():
        density = KernelDensity(kernel="gaussian", bandwidth=BANDWIDTH).fit(part)
        parts.append(density.sample(SAMPLES, random_state=random if seed is None else seed))
    return torch.from_numpy(numpy.concatenate(parts, 1)).to(anchors.dtype)


def check_law(actual: Tensor, truth: Callable, anchors: Tensor) -> None:
    """Other random numbers of the same law: samples have the spread of anchors and noise."""
    expected = (anchors.var() + BANDWIDTH**2).sqrt().item()
    if actual.shape != (SAMPLES, anchors.shape[1]) or abs(actual.std().item() / expected - 1) > 0.05:
        raise ValueError(f"sane_sampling: points must have a spread of {expected:.3f}, got {actual.std().item():.3f}")


def check_equal(actual: Tensor, truth: Callable, anchors: Tensor) -> None:
    torch.testing.assert_close(actual, truth(anchors), rtol=0, atol=3e-7)


# --- windows with a halo


def make_codes(tokens: int, entries: int) -> tuple[Tensor]:
    return (torch.randn(1, tokens, entries, generator=torch.Generator().manual_seed(0)),)


def at_once(codes: Tensor) -> Tensor:
    starts, window, place = chunk(codes.shape[1], WINDOW, HALO)
    rows = codes.index_select(1, windows_of(starts, window).flatten())
    return stitch(rows, place)


def published(codes: Tensor) -> Tensor:
    """Window after window, stacked, and the contents of all put side by side; tokens must leave a long remainder."""
    count, content = codes.shape[1], WINDOW - 2 * HALO
    windows, kept = [], []
    for begin in range(0, count, content):
        first = max(0, min(begin - HALO, count - WINDOW))
        windows.append(torch.index_select(codes, 1, torch.arange(first, first + WINDOW)))
        kept.append((begin - first, min(content, count - begin)))
    stacked = torch.stack(windows, 1)
    parts = [stacked[:, number, begin : begin + length] for number, (begin, length) in enumerate(kept)]
    return torch.cat(parts, 1)


def check_same(actual: Tensor, truth: Callable, codes: Tensor) -> None:
    if not torch.equal(actual, codes):
        raise ValueError("sane_sampling: windows without their halos must be the codes that they were cut from")


def cases(options: Options) -> Iterator[Case]:
    common = {"op": "sane_sampling"}
    tokens = 3 if options.small else TOKENS if options.full else SAMPLED
    if find_spec("sklearn"):
        kinds = {"independent": (draw_independent, None, check_law), "reference": (draw_reference, 42, check_equal)}
        for name, (draw, seed, check) in kinds.items():
            yield Case(
                name=f"kde {name}, {SAMPLES} of {ANCHORS} anchors, per token of {LATENT}",
                make_args=partial(make_anchors, tokens),
                runs={"kernel": draw, "scikit-learn": partial(draw_by_densities, seed=seed)},
                truth=draw,
                check=check,
                units={"": tokens},
                **common,
            )
    for entries in (4, LATENT):
        yield Case(
            name=f"windows with halos, {TOKENS:,} tokens of {entries}",
            make_args=partial(make_codes, 1000 if options.small else TOKENS, entries),
            runs={"kernel": at_once, "published": published},
            truth=at_once,
            check=check_same,
            work=lambda codes: 6 * codes.numel() * codes.element_size(),
            **common,
        )
