"""Calls every compiled operator with arguments that do not fit: each is computed, or refused in one sentence.

Calls of ``torch.ops`` pass by the checks in Python, as do those of ``torch.compile``; no wrong index, shape or dtype
may reach memory that is not there.
"""

import argparse
import random
import sys
from collections import Counter

import torch
from torch import Tensor, nn

import fastws
from fastws import _native, ops

NUMBERS = (-(2**63), -(2**40), -7, -2, -1, 0, 1, 2, 3, 5, 11, 64, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
SIZES = (-(2**63), -1, 0, 1, 2, 3, 5, 11, 64, 2**44, 2**62, 2**63 - 1)  # of results: small, or beyond any memory
REALS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 0.5, 1e-300, 1e300)
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
REFUSALS = (RuntimeError, ValueError, TypeError, OverflowError, MemoryError)


def examples() -> dict[str, dict]:
    """Arguments by name that each operator takes."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    def below(bound, *shape, dtype=torch.int64):
        return torch.randint(bound, shape, generator=generator).to(dtype)

    one, streams = torch.ones(()), {"seed": 3, "offset": 1}
    cases = token_examples(rand) | small_cnn_examples(rand, below) | coordinate_examples(rand, below)
    pair, maps = {"z_i": rand(5, 7), "z_j": rand(5, 7)}, {"student": rand(3, 20), "teacher": rand(3, 20)}
    lengths, segments = below(5, 2, 6, dtype=torch.int32), torch.tensor([[0, 9], [9, 9], [12, 150]])
    tokens = {"prediction": rand(2, 6, 4), "target": rand(2, 6, 4), "lengths": lengths}
    flat = {"prediction": rand(2, 160), "target": rand(2, 160), "offsets": segments}
    flat |= {"sigma": rand(3).abs(), "share": rand(3), "clip": 4.0}
    cases |= {
        "attention": {"qkv": rand(2, 5, 18), "heads": 2},
        "attention_backward": {
            "grad": rand(2, 5, 6),
            "qkv": rand(2, 5, 18),
            "logsumexp": rand(2, 2, 5) + 9,
            "heads": 2,
        },
        "masked_mse": tokens | {"normalize": 2},
        "masked_mse_backward": {"grad": one} | tokens | {"divisor": one},
        "layerwise_mse": flat,
        "layerwise_mse_backward": {"grad": one} | flat,
        "nt_xent": pair | {"temperature": 0.5},
        "nt_xent_backward": {"grad": one} | pair | {"logsumexp": rand(10), "temperature": 0.5},
        "feature_distance": maps | {"weight": 0.5},
        "feature_distance_backward": {"grad": one} | maps | {"sums": rand(3, 3).double().abs(), "weight": 0.5},
        "layer_statistics": {"flat": rand(2, 160), "offsets": segments},
        "kernel_order": {"rows": nn.functional.normalize(rand(2, 40, 9), dim=2), "improve": True},
        "kernel_gradients": {
            "inputs": rand(2, 6, 5, 3),
            "grad": rand(2, 3, 3, 4),
            "kernels": below(12, 5),
            "stride": 2,
        },
        "random_permutations": {"starts": torch.tensor([0, 4, 4, 9]), "total": 9, "batch": 3} | streams,
        "random_subset": {"place": torch.zeros(0, dtype=torch.int64), "population": 50, "count": 20} | streams,
        "complement": {"indices": below(50, 20), "population": 50},
        "alias_table": {"weights": below(1000, 30)},
        "weighted_sample": {"columns": torch.ops.fastws.alias_table(below(1000, 30)), "first": 5, "count": 40}
        | streams,
        "matched_distance": {
            "queries": rand(3, 40),
            "references": rand(2, 40),
            "candidates": below(2, 3, 2),
            "query_flips": below(2, 3).bool(),
            "reference_flips": below(2, 2).bool(),
            "groups": torch.tensor([[4, 5, 0, 0, 2, 1], [4, 5, 20, 2, 2, 1]]),
            "parts": torch.tensor(
                [[0, 1, -1, 1, 1, 0], [1, 4, 1, 1, 1, 1], [0, 1, -1, 1, 1, 0], [1, 4, 0, 1, 1, 1]],
            ),
            "once": torch.ones(40),
        },
    }
    return cases


def token_examples(rand) -> dict[str, dict]:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 5))
    layout = fastws.Layout.from_checkpoint(network, token_size=16)
    symmetry = fastws.Symmetry.trace(network, torch.zeros(1, 3, 8, 8))
    size, tokens, permutations = layout.num_weights, layout.num_tokens, symmetry.random(3)
    table, empty, rows = symmetry.table(layout), torch.zeros(0), len(layout.table)
    views = {"weights": rand(3, size), "table": table, "base": torch.arange(3) * size}
    views |= {"layers": torch.tensor([[0, rows]] * 3), "start": torch.tensor([0, 5, tokens - 4])}
    views |= {"permutations": permutations, "scale": torch.ones(rows), "shift": empty, "token_size": 16, "window": 4}
    views |= {"noise": 0.1, "erase_threshold": 2**30, "seed": 3, "offset": 1, "dtype": torch.float32}
    views |= {"additive": torch.ones(rows), "erase_value": 0.5, "block_threshold": 2**31, "shortest": 2**20}
    views |= {"longest": 2**22}
    return {
        "tokenize": {"flat": rand(3, size), "table": table, "token_size": 16, "num_tokens": tokens},
        "detokenize": {"tokens": rand(3, tokens, 16), "table": table, "num_weights": size},
        "tokenize_out": {"flat": rand(3, size), "table": table, "token_size": 16, "out": torch.zeros(3, tokens, 16)},
        "detokenize_out": {"tokens": rand(3, tokens, 16), "table": table, "out": torch.zeros(3, size)},
        "permute": {
            "flat": rand(3, size),
            "table": symmetry.tensor_table(layout),
            "permutations": permutations,
            "inverse": False,
        },
        "token_views": views,
    }


def small_cnn_examples(rand, below) -> dict[str, dict]:
    layers = [nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Dropout()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5))
    size, count = sum(x.numel() for x in network.parameters()), 9
    table = fastws.layer_table(network, (1, 8, 8))
    data = {"images": rand(6, 1, 8, 8), "labels": below(5, 6), "batches": below(6, count, 2, 3), "layers": table}
    kinds = torch.arange(count, dtype=torch.int32) % 4
    recipe = {"activation": kinds, "dropout": torch.rand(count).double() / 2, "optimizer": kinds.flip(0)}
    recipe |= {"lr": torch.full((count,), 0.01).double(), "weight_decay": torch.full((count,), 0.01).double()}
    recipe |= {"seed": torch.arange(count)}

    def state(*shape):
        return {"weights": rand(*shape), "first": torch.zeros(shape), "second": torch.zeros(shape)}

    logits = {"weights": rand(count, size), "images": data["images"], "layers": table, "activation": kinds}
    return {
        "small_cnn_step": state(count, size) | data | recipe | {"step": 1},
        "small_cnn_logits": logits,
        "variational_cnn_step": state(count, 2, size) | data | recipe | {"kl_weight": 0.1, "step": 1},
    }


def coordinate_examples(rand, below) -> dict[str, dict]:
    count, width, depth, outputs = 20, 9, 2, 3
    arguments = {"layer_table": rand(4, width), "filter_table": rand(5, width), "channel_table": rand(7, width)}
    arguments |= {"grid": torch.tensor([[3, 2], [1, 1], [4, 7]]), "rows": below(35, count)}
    arguments |= {"hidden_weights": rand(depth, width, width), "hidden_biases": rand(depth, width)}
    arguments |= {"out_weight": rand(outputs, width), "out_bias": rand(outputs), "activation": 3}
    kept = torch.ops.fastws.coordinate_mlp(*arguments.values(), True)[1]
    return {
        "coordinate_mlp": arguments | {"keep": True},
        "coordinate_mlp_backward": {"grad": rand(count, outputs), "kept": kept} | arguments,
    }


def spoil(name: str, value, dice: random.Random):
    """Another value in the place of a good one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice(SIZES if name in ("total", "batch", "population", "count", "window") else NUMBERS)
    if isinstance(value, float):
        return dice.choice(REALS)
    if isinstance(value, torch.dtype):
        return dice.choice(DTYPES)
    return dice.choice((spoil_values, spoil_values, spoil_values, spoil_shape, spoil_dtype))(value, dice)


def spoil_values(x: Tensor, dice: random.Random) -> Tensor:
    x = x.clone()
    if x.numel() == 0:
        return x
    entry = dice.randrange(x.numel()) if dice.random() < 0.8 else slice(None)
    if x.dtype.is_floating_point:
        x.view(-1)[entry] = torch.tensor(dice.choice(REALS), dtype=torch.float64).to(x.dtype)
    elif x.dtype != torch.bool:
        limits = torch.iinfo(x.dtype)
        x.view(-1)[entry] = min(max(dice.choice(NUMBERS), limits.min), limits.max)
    return x


def spoil_shape(x: Tensor, dice: random.Random) -> Tensor:
    axis = dice.randrange(x.dim()) if x.dim() else 0
    changes = {
        "more": lambda: torch.cat([x, x], axis),
        "fewer": lambda: x.narrow(axis, 0, max(x.shape[axis] - 1, 0)),
        "none": lambda: x.narrow(axis, 0, 0),
        "none, but wide": lambda: x.new_empty([0 if a == axis else 2**20 for a in range(x.dim())]),
        "another axis": lambda: x[None],
        "no axes": lambda: x.flatten(),
        "one": lambda: x.flatten()[0],
        "transposed": lambda: x.transpose(0, -1),
        "strided": lambda: torch.stack([x, x], -1)[..., 0],
    }
    plain = x.dim() > 0 and x.numel() > 0
    return changes[dice.choice(list(changes))]() if plain else x[None]


def spoil_dtype(x: Tensor, dice: random.Random) -> Tensor:
    return x.to(dice.choice(DTYPES))


def fuzz(calls: int, seed: int, names: list[str], verbose: bool) -> Counter:
    """Spoils one to three arguments of each of so many calls; returns how many were computed and refused."""
    good, found = examples(), Counter()
    for call in range(calls):
        dice = random.Random(f"{seed} {call}")  # each call on its own: any one of them can be made again
        op = dice.choice(names)
        arguments = dict(good[op])
        spoiled = dice.sample(list(arguments), min(len(arguments), dice.choice((1, 1, 1, 2, 3))))
        for name in spoiled:
            arguments[name] = spoil(name, arguments[name], dice)
        if verbose:
            print(call, op, {name: describe(arguments[name]) for name in spoiled}, file=sys.stderr, flush=True)
        try:
            getattr(torch.ops.fastws, op)(*arguments.values())
            found["computed"] += 1
        except REFUSALS:
            found["refused"] += 1
    return found


def describe(value) -> str:
    return f"{list(value.shape)} {value.dtype} {value.flatten()[:30].tolist()}" if isinstance(value, Tensor) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", nargs="+", help="operators to call; by default all compiled ones")
    parser.add_argument("--verbose", action="store_true", help="says what is called before it is called")
    options = parser.parse_args()
    ops.register_all()
    names = options.op or sorted(set(examples()) & _native.COMPILED["cpu"])
    found = fuzz(options.calls, options.seed, names, options.verbose)
    print(f"{options.calls} calls of {len(names)} operators: {found['computed']} computed, {found['refused']} refused")


if __name__ == "__main__":
    main()
