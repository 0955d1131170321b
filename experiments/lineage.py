"""Who descends from whom, in a zoo where that is known; and what networks that were moved on purpose hide from.

python experiments/lineage.py --out runs/lineage        # --smoke for seconds

Networks of 64 - 32 - 32 - 10 units learn digits. Some have descendants: fine-tuned, pruned, in eight bits, the mean of
two that were fine-tuned. In three copies of the zoo networks are left as they are, get their units in another order, or
are moved by random elements of the whole group. Each is asked for its relations; a raw cosine is asked beside it. Then
public signals of provenance, restated, are asked of the same pairs: of how many relatives is a signal larger than of
all pairs of strangers?
"""

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import tyro
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch import Tensor, nn

import fastws
from fastws.compare.modules import Words
from fastws.data.digits import WHITE, read
from fastws.files.atomic import write_json
from fastws.terminal import one_sentence

SIZES = (64, 32, 32, 10)
MATRICES = ("0.weight", "2.weight", "4.weight")
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints how many relations were found, and which signals survive."""

    out: str  # folder of everything
    strangers: int = 30  # networks without relatives
    families: int = 8  # networks with five descendants each
    steps: int = 600  # of training
    seed: int = 0  # of everything random
    smoke: bool = False  # few networks and steps; its numbers mean nothing


class Images(NamedTuple):
    """Digits."""

    x: Tensor  # [n, 64]
    y: Tensor  # [n]


class Zoo(NamedTuple):
    """Networks by name."""

    states: dict[str, State]
    family: dict[str, str]  # the root of each
    parents: dict[str, set[str]]  # of those that have any


def make_module() -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def factory() -> tuple[nn.Module, Tensor]:
    """For --architecture lineage:factory."""
    return make_module(), torch.randn(1, SIZES[0], generator=torch.Generator().manual_seed(0))


def run(config: Config) -> None:
    begin = perf_counter()
    train, test = (Images(x.flatten(1).float() / WHITE, y) for x, y in read())
    zoo = make_zoo(config, train)
    accuracy = {
        name: float((answer(state, test.x)[-1].argmax(1) == test.y).float().mean())
        for name, state in zoo.states.items()
    }
    trees, signals = [], []
    for kind, move in MOVES.items():
        moved = zoo._replace(
            states={name: move(state, n + config.seed) for n, (name, state) in enumerate(zoo.states.items())}
        )
        trees.append({"networks": kind} | score_tree(config, moved, kind))
        signals.append({"networks": kind} | score_signals(moved, test.x))
    only = {name: state for name, state in zoo.states.items() if name.startswith("stranger")}
    results = {
        "seed": config.seed,
        "accuracy": sum(accuracy.values()) / len(accuracy),
        "trees": trees,
        "signals": signals,
        "strangers": score_strangers(config, only),
        "seconds": perf_counter() - begin,
    }
    write_json(Path(config.out, "results.json"), results)
    print(f"{len(zoo.states)} networks, accuracy {results['accuracy']:.3f}")
    for line in (*trees, *signals):
        print(
            ", ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items()
            )
        )
    print(f"strangers alone: {results['strangers']}")


# --- networks


def make_zoo(config: Config, images: Images) -> Zoo:
    families, strangers = (2, 8) if config.smoke else (config.families, config.strangers)
    steps = 30 if config.smoke else config.steps
    torch.manual_seed(config.seed)
    started = [
        {name: x.detach() for name, x in make_module().state_dict().items()} for _ in range(families + strangers)
    ]
    trained = fit(started, images, steps, 1e-2, config.seed)
    zoo = Zoo({f"stranger{n:02}": state for n, state in enumerate(trained[families:])}, {}, {})
    roots = trained[:families]
    first, second = (fit(roots, images, max(1, steps // 6), 3e-3, config.seed + seed) for seed in (1, 2))
    for number, (root, one, other) in enumerate(zip(roots, first, second, strict=True)):
        name = f"family{number:02}"
        made = {
            name: (root, set()),
            f"{name}-tuned": (one, {name}),
            f"{name}-again": (other, {name}),
            f"{name}-pruned": (pruned(root), {name}),
            f"{name}-int8": (in_eight_bits(one), {f"{name}-tuned"}),
            f"{name}-mean": ({key: (one[key] + other[key]) / 2 for key in one}, {f"{name}-tuned", f"{name}-again"}),
        }
        for own, (state, parents) in made.items():
            zoo.states[own], zoo.family[own], zoo.parents[own] = state, name, parents
    return zoo


def fit(states: Sequence[State], images: Images, steps: int, rate: float, seed: int) -> list[State]:
    """Networks trained side by side, each on minibatches of its own."""
    weights = {name: torch.stack([state[name] for state in states]).requires_grad_() for name in states[0]}
    optimizer = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(images.y), (len(states), 64), generator=random)
        hidden = images.x[batch]
        for name in MATRICES:
            hidden = hidden.relu() if name != MATRICES[0] else hidden
            hidden = torch.baddbmm(weights[name.replace("weight", "bias")][:, None], hidden, weights[name].mT)
        loss = nn.functional.cross_entropy(hidden.flatten(0, 1), images.y[batch].flatten()) * len(states)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [
        {name: stacked[number].detach().clone() for name, stacked in weights.items()} for number in range(len(states))
    ]


def pruned(state: State) -> State:
    return {
        name: torch.where(x.abs() < x.abs().median(), 0.0, x) if name in MATRICES else x for name, x in state.items()
    }


def in_eight_bits(state: State) -> State:
    def rounded(x: Tensor) -> Tensor:
        step = x.abs().max() / 127
        return (x / step).round() * step

    return {name: rounded(x) if name in MATRICES else x for name, x in state.items()}


def stay(state: State, seed: int) -> State:
    return state


def permuted(state: State, seed: int) -> State:
    random, state = torch.Generator().manual_seed(seed), dict(state)
    for before, after in itertools.pairwise(MATRICES):
        order, bias = torch.randperm(len(state[before]), generator=random), before.replace("weight", "bias")
        state[before], state[bias], state[after] = state[before][order], state[bias][order], state[after][:, order]
    return state


def moved_by_group(state: State, seed: int) -> State:
    """A random permutation, and scales of the units of ReLU: all that leaves the function of such a network."""
    random, state = torch.Generator().manual_seed(seed), permuted(state, seed)
    for before, after in itertools.pairwise(MATRICES):
        scale, bias = torch.randn(len(state[before]), generator=random).mul(0.5).exp(), before.replace("weight", "bias")
        state[before], state[bias] = state[before] * scale[:, None], state[bias] * scale
        state[after] = state[after] / scale
    return state


MOVES: dict[str, Callable[[State, int], State]] = {
    "as they are": stay,
    "permuted": permuted,
    "moved by the whole group": moved_by_group,
}


def answer(state: State, x: Tensor) -> list[Tensor]:
    """Hidden activations and logits."""
    layers = []
    for name in MATRICES:
        x = nn.functional.linear(x, state[name], state[name.replace("weight", "bias")])
        x = x.relu() if name != MATRICES[-1] else x
        layers.append(x)
    return layers


# --- trees


def write(folder: Path, states: Mapping[str, State]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, state in states.items():
        save_file({key: x.contiguous() for key, x in state.items()}, folder / f"{name}.safetensors")
    return folder


def find(folder: Path) -> dict[str, Any]:
    words = Words(architecture="lineage:factory")
    (group,) = fastws.lineage(folder, words=words, whole=True).to_dict()["groups"]
    for names in (*group["families"], *(edge["networks"] for edge in group["relations"])):
        names[:] = [name.removesuffix(".safetensors") for name in names]
    return group


def score_tree(config: Config, zoo: Zoo, kind: str) -> dict[str, Any]:
    """Precision and recall of pairs of relatives, of lineage and of a raw cosine, and how many relations are right."""
    group = find(write(Path(config.out, kind.replace(" ", "-")), zoo.states))
    pairs = list(itertools.combinations(zoo.states, 2))
    true = {pair for pair in pairs if related(zoo, pair)}
    found = {pair for pair in pairs if any(set(pair) <= set(family) for family in group["families"])}
    cosines = {pair: raw_cosine(*(zoo.states[name] for name in pair)) for pair in pairs}
    # the cosine is given what lineage is not: a limit that no stranger passes
    limit = max(cosines[pair] for pair in pairs if pair not in true)
    parents: dict[str, set[str]] = {}
    for edge in group["relations"]:
        parent, child = edge["networks"]
        if edge["direction"] == "unknown" and child not in zoo.parents:
            continue
        parents.setdefault(child, set()).add(parent)
    certain = [edge for edge in group["relations"] if edge["direction"] == "certain"]
    right = sum(parent in ancestors(zoo, child) for parent, child in (edge["networks"] for edge in certain))
    return {
        "relatives": len(true),
        "precision": len(found & true) / max(1, len(found)),
        "recall": len(found & true) / max(1, len(true)),
        "recall of a raw cosine": sum(cosines[pair] > limit for pair in true) / max(1, len(true)),
        "parents right": sum(parents.get(child) == own for child, own in zoo.parents.items() if own)
        / max(1, sum(map(bool, zoo.parents.values()))),
        "certain directions": len(certain),
        "of them right": right / max(1, len(certain)),
    }


def ancestors(zoo: Zoo, child: str) -> set[str]:
    """All that a network was made of, and what that was made of."""
    found, left = set(), [child]
    while left:
        new = zoo.parents.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def related(zoo: Zoo, pair: tuple[str, str]) -> bool:
    one, other = pair
    return one in zoo.family and zoo.family[one] == zoo.family.get(other)


def score_strangers(config: Config, states: Mapping[str, State]) -> dict[str, Any]:
    """How often two of many strangers are called relatives, with nobody else in the folder."""
    group = find(write(Path(config.out, "strangers"), states))
    pairs = len(states) * (len(states) - 1) // 2
    return {"pairs": pairs, "called relatives": len(group["relations"])}


# --- signals


def raw_cosine(a: State, b: State) -> float:
    x, y = (torch.cat([state[name].flatten() for name in MATRICES]) for state in (a, b))
    return float(nn.functional.cosine_similarity(x, y, dim=0))


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def sorted_norms(a: State, b: State) -> float:
    """Norms of units in order of size, as in profiles of norms (Cisco's model-provenance-kit)."""
    x, y = (torch.cat([state[name].norm(dim=1).sort().values for name in MATRICES]) for state in (a, b))
    return correlation(x, y)


def spectra(a: State, b: State) -> float:
    """Singular values of each matrix, by which TransFusion (arXiv 2505.22697) pairs heads: less their distance."""
    x, y = (torch.cat([torch.linalg.svdvals(state[name]) for name in MATRICES]) for state in (a, b))
    return -float((x - y).norm() / x.norm())


def assigned(a: State, b: State, name: str) -> tuple[Tensor, Tensor]:
    """Units of b that are assigned to those of a by the cosine of their weights."""
    x, y = (nn.functional.normalize(state[name], dim=1) for state in (a, b))
    rows, columns = linear_sum_assignment((x @ y.T).numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def order_of_units(a: State, b: State) -> float:
    """Spearman's correlation of units with those assigned to them (arXiv 2502.12292)."""
    return sum(float(spearmanr(*assigned(a, b, name)).statistic) for name in MATRICES[:2]) / 2


def invariant_terms(a: State, b: State) -> float:
    """Products over hidden units, as HuRef's (arXiv 2312.04828) over embedded tokens: here over pixels."""
    return correlation(*(state[MATRICES[0]].T @ state[MATRICES[0]] for state in (a, b)))


def assigned_kernels(a: State, b: State) -> float:
    """Centred kernel alignment of weights after an assignment (arXiv 2510.06738)."""
    rows, columns = assigned(a, b, MATRICES[0])
    return alignment(a[MATRICES[0]][rows], b[MATRICES[0]][columns])


def alignment(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of vectors with one sample in each row."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def score_signals(zoo: Zoo, x: Tensor) -> dict[str, float]:
    """Of each signal the share of relatives for which it is larger than for all pairs of strangers."""
    activations = {name: answer(state, x) for name, state in zoo.states.items()}
    signals: dict[str, Callable[[str, str], float]] = {
        name: lambda one, other, signal=signal: signal(zoo.states[one], zoo.states[other])
        for name, signal in {
            "raw cosine": raw_cosine,
            "order of units (IND)": order_of_units,
            "sorted norms": sorted_norms,
            "singular values": spectra,
            "invariant terms (HuRef)": invariant_terms,
            "assignment and CKA (AWM)": assigned_kernels,
        }.items()
    }
    signals["CKA of activations (REEF)"] = lambda one, other: alignment(activations[one][1], activations[other][1])
    pairs = list(itertools.combinations(zoo.states, 2))
    found = {}
    for name, signal in signals.items():
        values = {pair: signal(*pair) for pair in pairs}
        limit = max(value for pair, value in values.items() if not related(zoo, pair))
        relatives = [value > limit for pair, value in values.items() if related(zoo, pair)]
        found[name] = sum(relatives) / len(relatives)
    return found


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
