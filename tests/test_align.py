import doctest
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import permutations

import architectures
import numpy
import pytest
import safetensors.torch
import torch
from architectures import unsigned_axes
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import CASES, networks
from scipy.optimize import linear_sum_assignment
from torch import nn

import fastws
from fastws.cli import main
from fastws.downstream.embed import embed
from fastws.downstream.encoder import load_encoder
from fastws.files.lock import one_writer
from fastws.layout.layout import Layout
from fastws.matching import match as matching
from fastws.matching.assignment import PRICED_SIZE, solve
from fastws.matching.match import match, objective
from fastws.random.integers import epoch_rows
from fastws.symmetry.symmetry import Symmetry
from fastws.symmetry.verify import randomise
from fastws.train.sane import batches
from fastws.train.sane import train as sane
from fastws.zoo import Zoo, ZooWriter
from fastws.zoo.align import Config, align
from fastws.zoo.alignment import ALIGNMENT, CANONICAL, Alignment, aligned_rows
from fastws.zoo.format.manifest import MANIFEST
from fastws.zoo.making.architectures import build
from fastws.zoo.readers.checkpoints import read_checkpoints
from fastws.zoo.survey.diversity import draw_sample, measure_weights

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("in_one_thread")


@cache
def entries_of(segments, group, size):
    """The entries of an axis that each unit of a group has, ``[size, entries]``."""
    members, entry, number = [[] for _ in range(size)], 0, 0
    for segment_group, count, block, _ in segments:
        for _ in range(count):
            if segment_group == group:
                members[number % size] += range(entry, entry + block)
                number += 1
            entry += block
    return torch.tensor(members)


def published(symmetry, reference, state, order):
    """Algorithm 1 of arXiv 2209.04836 as its authors wrote it: one network, tensor by tensor; its permutations."""
    chosen = [numpy.arange(size) for size in symmetry.sizes]
    names = [name for name in symmetry.axes if "running" not in name and name not in symmetry.aliases]

    def groups(segments):
        return sorted({group for group, *_ in segments or () if group is not None})

    def permuted(name, except_axis):
        tensor = state[name]
        for axis, segments in enumerate(symmetry.axes[name]):
            index = torch.arange(tensor.shape[axis])
            for group in groups(segments) if axis != except_axis else []:
                entries = entries_of(segments, group, symmetry.sizes[group])
                index[entries] = entries[torch.from_numpy(chosen[group])]
            tensor = tensor.index_select(axis, index)
        return tensor

    for sweep in range(100):
        progress = False
        for group in order(sweep):
            size = symmetry.sizes[group]
            similarity = numpy.zeros((size, size))
            for name in names:
                for axis, segments in enumerate(symmetry.axes[name]):
                    if group in groups(segments):
                        entries = entries_of(segments, group, size).flatten()
                        both = reference[name], permuted(name, axis)
                        a, b = (x.index_select(axis, entries).movedim(axis, 0).reshape(size, -1) for x in both)
                        similarity += (a @ b.T).numpy()
            rows, best = linear_sum_assignment(similarity, maximize=True)
            progress |= similarity[rows, best].sum() > similarity[rows, chosen[group]].sum() + 1e-12
            chosen[group] = best
        if not progress:
            break
    return torch.from_numpy(numpy.concatenate(chosen)).int()


# --- matching


@pytest.mark.parametrize("case", CASES)
def test_permutation_of_a_permuted_copy_is_recovered(case):
    symmetry, layout, _, _, flat = networks(case, 2)
    moves = symmetry.random(5, seed=2)
    copies = symmetry.permute(flat[0].expand(5, -1), moves, layout)
    found = match(copies, flat[0], symmetry, layout)
    assert torch.equal(found, symmetry.inverse(moves))
    assert torch.equal(symmetry.permute(copies, found, layout), flat[:1].expand(5, -1))


@pytest.mark.parametrize("case, dtype", [*((case, torch.float64) for case in CASES), ("mlp", torch.float32)])
def test_match_is_the_published_algorithm(case, dtype):
    """Visiting groups in the same order, it reaches the same objective."""
    symmetry, layout, module, _, flat = networks(case, 3, mix=0.4)
    flat = flat.to(dtype)
    layout, groups = Layout.from_checkpoint(module), list(range(len(symmetry.sizes)))
    states = [layout.unflatten(row.double()) for row in flat]
    theirs = [published(symmetry, states[0], s, lambda i: groups[:: (-1) ** i]) for s in states[1:]]
    values = [
        objective(symmetry.permute(flat[1:].double(), rows, layout), flat[0].double(), symmetry, layout)
        for rows in (match(flat[1:], flat[0], symmetry, layout), torch.stack(theirs))
    ]
    torch.testing.assert_close(*values, rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=0)


def test_fixed_order_loses_nothing_to_a_random_one():
    symmetry, layout, module, _, flat = networks("CNN with flatten", 7, mix=0.4)
    layout, numbers = Layout.from_checkpoint(module), numpy.random.default_rng(0)
    states = [layout.unflatten(row) for row in flat]
    theirs = [published(symmetry, states[0], s, lambda _: numbers.permutation(len(symmetry.sizes))) for s in states[1:]]
    value, random_order, before = (
        objective(permuted, flat[0], symmetry, layout).sum()
        for permuted in (
            symmetry.permute(flat[1:], match(flat[1:], flat[0], symmetry, layout), layout),
            symmetry.permute(flat[1:], torch.stack(theirs), layout),
            flat[1:],
        )
    )
    assert value - before > 0.98 * (random_order - before)


@pytest.mark.parametrize("case", ["CNN with flatten", "ResNet"])
def test_more_restarts_are_never_worse(case, monkeypatch):
    symmetry, layout, _, _, flat = networks(case, 12)
    found = [match(flat[1:], flat[0], symmetry, layout, restarts=restarts) for restarts in (1, 2, 6)]
    values = [objective(symmetry.permute(flat[1:], rows, layout), flat[0], symmetry, layout) for rows in found]
    assert (values[0] <= values[1]).all() and (values[1] <= values[2]).all() and (values[0] < values[2]).any()
    monkeypatch.setattr("fastws.matching.match.BATCH_NETWORKS", 5)
    assert torch.equal(match(flat[1:], flat[0], symmetry, layout, restarts=6), found[2])


def test_no_group_alone_can_gain():
    """Every permutation of every single group is tried."""
    symmetry, layout, _, _, flat = networks(lambda: architectures.densenet(blocks=(1, 2), growth=4, first=4), 3)
    found = match(flat[1:].double(), flat[0].double(), symmetry, layout)
    aligned = symmetry.permute(flat[1:].double(), found, layout)
    best, tried = objective(aligned, flat[0].double(), symmetry, layout), 0
    for start, size in zip(symmetry.starts, symmetry.sizes, strict=False):
        if size > 5:
            continue
        tried += 1
        for order in permutations(range(size)):
            row = symmetry.identity()[0, : symmetry.starts[-1]]
            row[start : start + size] = torch.tensor(order)
            other = objective(symmetry.permute(aligned, row[None], layout), flat[0].double(), symmetry, layout)
            assert (other <= best * (1 + 1e-12)).all()
    assert tried == 5  # stem, 3 growths, transition


def test_small_gains_beside_large_weights():
    """A gain that float32 can tell from rounding counts, however large weights are that belong to no group."""
    torch.manual_seed(0)
    for _ in range(10):
        mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        symmetry, layout = Symmetry.trace(mlp, torch.randn(1, 4)), Layout.from_checkpoint(mlp)
        reference = layout.flatten(mlp).detach()
        moved = symmetry.permute(reference, symmetry.random(50), layout)
        expected = match(moved, reference, symmetry, layout)
        moved[:, -3:] = reference[-3:] = 1e6  # biases of the output
        assert torch.equal(match(moved, reference, symmetry, layout), expected)


def test_wide_layers_whose_units_have_unlike_scales():
    """Assignment problems that are hard, and large enough to be solved with prices."""

    def build():
        widths = (12, 90, 70, 60, 5)
        layers = [layer for sizes in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*sizes), nn.ReLU())]
        return nn.Sequential(*layers[:-1]), torch.randn(2, 12)

    symmetry, layout, module, _, flat = networks(build, 4)
    assert min(symmetry.sizes) > PRICED_SIZE
    flat = (flat + 0.3 * flat.abs()).double()
    layout = Layout.from_checkpoint(module)
    states = [layout.unflatten(row) for row in flat]
    theirs = [published(symmetry, states[0], s, lambda i: [0, 1, 2][:: (-1) ** i]) for s in states[1:]]
    assert torch.equal(match(flat[1:], flat[0], symmetry, layout), torch.stack(theirs))
    for dtype in (torch.float32, torch.bfloat16):
        found = match(flat[1:].to(dtype), flat[0].to(dtype), symmetry, layout)
        values = [
            objective(symmetry.permute(flat[1:], rows, layout), flat[0], symmetry, layout)
            for rows in (found, torch.stack(theirs))
        ]
        torch.testing.assert_close(*values, rtol=1e-6 if dtype == torch.float32 else 0.02, atol=0)


@given(
    st.integers(1, 90),
    st.sampled_from(["normal", "outer", "ties", "zeros"]),
    st.sampled_from(["best", "random", None]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_assignments_are_the_best_whatever_the_search_starts_from(size, kind, start, seed):
    numbers = numpy.random.default_rng(seed)
    similarity = {
        "normal": lambda: numbers.standard_normal((3, size, size)),
        "outer": lambda: numbers.random((3, size, 1)) * numbers.random((3, 1, size)) + 1e5,
        "ties": lambda: numbers.integers(0, 3, (3, size, size)),
        "zeros": lambda: numpy.zeros((3, size, size)),
    }[kind]().astype(numpy.float32)
    best = numpy.stack([linear_sum_assignment(one.T, maximize=True)[1] for one in similarity])
    current = best if start == "best" else numpy.stack([numbers.permutation(size) for _ in best])
    current = None if start is None else torch.from_numpy(current.astype(numpy.int32))
    with ThreadPoolExecutor(2) as pool:
        found = solve(torch.from_numpy(similarity), current, pool).numpy()
    assert (numpy.sort(found, 1) == numpy.arange(size)).all()
    values = [numpy.take_along_axis(similarity, x[:, None], 1).astype(float).sum((1, 2)) for x in (found, best)]
    numpy.testing.assert_allclose(*values, rtol=1e-12)


@pytest.mark.parametrize("case", ["mlp", "ResNet", "DenseNet"])
def test_batch_equals_one_by_one_and_repeats(case, monkeypatch):
    symmetry, layout, _, _, flat = networks(case, 5)
    together = match(flat[1:], flat[0], symmetry, layout)
    assert torch.equal(together, match(flat[1:], flat[0], symmetry, layout))
    monkeypatch.setattr("fastws.matching.match.BATCH_NETWORKS", 1)
    assert torch.equal(together, match(flat[1:], flat[0], symmetry, layout))


@pytest.mark.parametrize("case", CASES)
def test_function_is_preserved(case):
    symmetry, layout, module, inputs, flat = networks(case, 2)
    layout, module = Layout.from_checkpoint(module), module.double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    flat = flat.double()
    outputs = []
    for row in (flat[1], symmetry.permute(flat[1:], match(flat[1:], flat[0], symmetry, layout), layout)[0]):
        module.load_state_dict(layout.unflatten(row, like=module))
        with torch.no_grad():
            outputs.append(module(inputs))
    assert not torch.equal(flat[1], row)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_objective_never_falls_where_a_group_lies_on_both_axes():
    """y + W y: moving the units moves rows and columns of W, so the assignment problem is not the whole truth."""

    def build():
        body = architectures.Residual(nn.Linear(7, 7, bias=False))
        return nn.Sequential(nn.Linear(3, 7), body, nn.Tanh(), nn.Linear(7, 2)), torch.randn(2, 3)

    symmetry, layout, module, _, flat = networks(build, 25)
    assert unsigned_axes(symmetry, "1.body.weight")[0] == unsigned_axes(symmetry, "1.body.weight")[1] == ((0, 7, 1),)
    flat = flat.double()
    flat[:, 28:77] *= 10  # W, so that it decides
    values = [objective(flat[1:], flat[0], symmetry, layout)]
    for sweeps in range(1, 5):
        found = match(flat[1:], flat[0], symmetry, layout, sweeps=sweeps)
        values.append(objective(symmetry.permute(flat[1:], found, layout), flat[0], symmetry, layout))
    assert all((after >= before - 1e-9).all() for before, after in zip(values, values[1:], strict=False))
    assert (values[-1] > values[0]).float().mean() > 0.5
    layout = Layout.from_checkpoint(module)
    states = [layout.unflatten(row) for row in flat]
    taken = torch.stack([published(symmetry, states[0], state, lambda _: [0]) for state in states[1:]])
    unguarded = objective(symmetry.permute(flat[1:], taken, layout), flat[0], symmetry, layout)
    assert (unguarded < values[0] - 1).any()  # the published algorithm can fall
    assert values[-1].mean() > unguarded.mean()


def test_norm_statistics_decide_nothing_unless_included():
    symmetry, layout, module, _, flat = networks("ResNet", 1)
    moves = symmetry.random(3, seed=2)
    copies = symmetry.permute(flat.expand(3, -1), moves, layout)
    for entry in Layout.from_checkpoint(module).entries:
        if entry.role == "norm statistic":
            copies[:, entry.offset : entry.offset + entry.numel] = 1e3 * torch.rand(3, entry.numel)
    assert torch.equal(match(copies, flat[0], symmetry, layout), symmetry.inverse(moves))
    assert not torch.equal(match(copies, flat[0], symmetry, layout, norms="include"), symmetry.inverse(moves))


@pytest.mark.parametrize("case", ["ResNet", "GPT"])
def test_match_does_not_depend_on_the_order_of_tensors(case):
    symmetry, layout, module, _, flat = networks(case, 3)
    backwards = Layout.from_checkpoint(dict(reversed(module.state_dict().items())))
    turned = torch.stack([backwards.flatten(layout.unflatten(row)) for row in flat])
    moves = symmetry.random(2, seed=3)
    copies = symmetry.permute(turned[:1].expand(2, -1), moves, backwards)
    assert torch.equal(match(copies, turned[0], symmetry, backwards), symmetry.inverse(moves))
    values = (objective(turned[1:], turned[0], symmetry, backwards), objective(flat[1:], flat[0], symmetry, layout))
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


def test_extreme_networks():
    symmetry, layout, _, _, flat = networks("CNN with flatten", 3)
    assert match(flat[:0], flat[0], symmetry, layout).shape == (0, symmetry.num_indices)
    assert torch.equal(match(torch.zeros(2, flat.shape[1]), flat[0], symmetry, layout), symmetry.identity(2))
    assert torch.equal(match(flat, flat[0], symmetry, layout, sweeps=0), symmetry.identity(3))
    moves = symmetry.random(2)
    copies = symmetry.permute(flat[:1].bfloat16().expand(2, -1), moves, layout)
    assert torch.equal(match(copies, flat[0].bfloat16(), symmetry, layout), symmetry.inverse(moves))
    alone = Symmetry.trace(nn.Linear(4, 3), torch.randn(1, 4))  # has no groups
    single = Layout.from_checkpoint(nn.Linear(4, 3))
    assert match(torch.randn(2, 15), torch.randn(15), alone, single).shape == (2, 0)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(flat=torch.zeros(3, 5)), r"flat must be \[M, 722\] floating point, as the layout says, got \[3, 5\]"),
        (dict(flat=torch.zeros(722)), r"flat must be \[M, 722\]"),
        (dict(reference=torch.zeros(5)), r"reference must be \[722\] or \[M, 722\] floating point on cpu, got \[5\]"),
        (dict(reference=torch.full((722,), torch.nan)), "reference must be finite"),
        (dict(flat=torch.full((2, 722), torch.inf)), "flat must be finite, got NaN or infinity in 2 rows"),
        (dict(norms="scaled"), "norms must be 'exclude' or 'include', got 'scaled'"),
        (dict(sweeps=-1), "sweeps and tolerance must be at least 0, got -1"),
        (dict(restarts=0), "restarts must be at least 1, got 0"),
    ],
)
def test_bad_arguments(change, sentence):
    symmetry, layout, _, _, flat = networks("mlp", 2)
    with pytest.raises(ValueError, match=f"match: {sentence}"):
        match(**{"flat": flat, "reference": flat[0], "symmetry": symmetry, "layout": layout} | change)


def test_docstring_examples_run():
    result = doctest.testmod(matching, extraglobs={"fastws": fastws, "torch": torch})
    assert result.attempted == 7 and result.failed == 0


# --- zoos

MODELS, EPOCHS = 6, 3


def properties(first, count):
    """Rows of one epoch after the other; the later models are the better ones."""
    row = torch.arange(first, first + count)
    names = [f"m{number}" for number in (row % MODELS).tolist()]
    return {"model": names, "epoch": row // MODELS, "test_accuracy": (row % MODELS + row // MODELS) / 10}


SPLITS = {"train": ["m4", "m0", "m1", "m2"], "val": ["m3"], "test": ["m5"]}


def make_zoo(path, symmetry=True, splits=SPLITS):
    """Six models, three epochs each: noisy copies of one network in six orders."""
    module, inputs = architectures.zoo_cnn()
    traced, layout = Symmetry.trace(module, inputs), Layout.from_checkpoint(module)
    with torch.no_grad():
        randomise(module, 0)
    template = layout.flatten(module).detach()
    generator = torch.Generator().manual_seed(0)
    rows = template + 1e-3 * torch.randn(MODELS * EPOCHS, layout.num_weights, generator=generator)
    rows = traced.permute(rows, traced.random(MODELS, seed=1).repeat(EPOCHS, 1), layout)
    with ZooWriter(path, layout, traced if symmetry else None, splits=splits) as writer:
        for first in range(0, len(rows), 4):
            part = rows[first : first + 4]
            writer.append(part, properties(first, len(part)))
    return Zoo.open(path)


def test_zoo_is_aligned_as_a_whole(tmp_path, capsys):
    zoo = make_zoo(tmp_path / "zoo")
    main(["zoo", "align", "--zoo", str(tmp_path / "zoo"), "--reference", "m4"])
    assert "permutations of 6 models\nreference: model m4, named" in capsys.readouterr().out
    alignment = Alignment.open(zoo)
    assert alignment.models == tuple(f"m{i}" for i in range(6)) and (alignment.after >= alignment.before).all()
    assert alignment.permutations.shape == (6, 38) and alignment.norms == "exclude"
    reference = zoo.rows([16])[0]  # m4, last epoch
    rows = torch.tensor([17, 3, 3, 0, 10, 16])
    expected = symmetry_rows(
        zoo, rows, match(zoo.rows(range(12, 18)), reference, zoo.symmetry, zoo.layout)[rows % MODELS]
    )
    assert torch.equal(aligned_rows(zoo, rows), expected)
    assert (aligned_rows(zoo, range(18)) - reference).abs().max() < 0.02
    assert (zoo.rows(range(18)) - reference).abs().max() > 0.2
    after = objective(aligned_rows(zoo, range(12, 18)), reference, zoo.symmetry, zoo.layout)
    torch.testing.assert_close(alignment.after, after, rtol=1e-12, atol=0)
    assert (tmp_path / "zoo" / ALIGNMENT).stat().st_size < 10_000


def symmetry_rows(zoo, rows, found):
    return zoo.symmetry.permute(zoo.rows(rows), found, zoo.layout)


def test_canonical_form_overwrites_no_matching(tmp_path, capsys):
    zoo = make_zoo(tmp_path / "zoo")
    main(["zoo", "align", "--zoo", str(zoo.path), "--canonical", "l2"])
    assert Alignment.open(zoo).method == "l2"
    made = align(Config(zoo=str(zoo.path)))
    main(["zoo", "align", "--zoo", str(zoo.path), "--canonical", "lexicographic"])
    assert Alignment.open(zoo).method == "mean" and torch.equal(Alignment.open(zoo).permutations, made.permutations)
    assert Alignment.open(zoo, zoo.path / CANONICAL).method == "lexicographic"
    capsys.readouterr()
    main(["zoo", "align", "--zoo", str(zoo.path)])
    gain = (made.after.mean() - made.before.mean()).item()
    assert f"after, gained {gain:.4g}" in capsys.readouterr().out


def test_one_process_at_a_time_writes_an_alignment(tmp_path):
    make_zoo(tmp_path)
    with one_writer(tmp_path / "alignment.safetensors"):
        with pytest.raises(BlockingIOError, match="alignment.safetensors: one process at a time may write it"):
            align(Config(zoo=str(tmp_path)))
        align(Config(zoo=str(tmp_path), out=str(tmp_path / "elsewhere/a.safetensors"), sweeps=1))
    align(Config(zoo=str(tmp_path), sweeps=1))
    assert not list(tmp_path.rglob("*.lock"))


def test_rows_are_aligned_part_by_part(tmp_path, monkeypatch):
    zoo = make_zoo(tmp_path / "zoo")
    align(Config(zoo=str(zoo.path)))
    rows = torch.tensor([17, 3, 3, 0, 10, 16, 5])
    expected = aligned_rows(zoo, rows)
    monkeypatch.setattr("fastws.zoo.alignment.ROWS_AT_ONCE", 2 * zoo.layout.num_weights)
    assert torch.equal(aligned_rows(zoo, rows), expected)
    assert aligned_rows(zoo, []).shape == (0, zoo.layout.num_weights)


# --- alignment in use


def test_info_describes_the_alignment(tmp_path, capsys):
    zoo = make_zoo(tmp_path / "zoo")
    with pytest.raises(SystemExit, match="alignment must be there, got none; run fastws zoo align"):
        main(["zoo", "info", "--zoo", str(zoo.path), "--aligned"])
    main(["zoo", "align", "--zoo", str(zoo.path)])
    capsys.readouterr()
    main(["zoo", "info", "--zoo", str(zoo.path), "--aligned"])
    assert "aligned: mean, reference model m4, highest last test_accuracy" in capsys.readouterr().out
    sample = draw_sample(zoo, 6, seed=0)
    stored, aligned = (measure_weights(zoo, sample, aligned) for aligned in (False, True))
    expected = aligned_rows(zoo, sample.last()).double().std(0, correction=0)
    torch.testing.assert_close(aligned.std, expected)
    assert aligned.std.mean() < stored.std.mean() / 10  # noisy copies of one network
    # no layer's statistics change when its neurons change places
    torch.testing.assert_close(aligned.statistics, stored.statistics, equal_nan=True)


def test_views_permute_aligned_networks(tmp_path):
    """The stored permutation comes first, the one that a view draws behind it."""
    zoo = make_zoo(tmp_path / "zoo")
    found, symmetry = align(Config(zoo=str(zoo.path))).permutations, zoo.symmetry
    options = {"batch_size": 4, "noise": 0, "standardize": False, "window": 48}  # all tokens
    config = sane.Config(zoo=str(zoo.path), out=str(tmp_path), aligned=True, **options)
    source = sane.make_source(config, zoo, CPU)
    expected = aligned_rows(zoo, torch.cat([zoo.split("train"), zoo.split("val")]))
    assert torch.equal(source.population.weights[0][: expected.numel()], expected.flatten())
    (second,) = sane.draw(config, source, "train", 3).values[1:]
    drawn = symmetry.random(8, config.seed, batches.PERMUTATION + 3)[4:]
    order = epoch_rows(len(zoo.split("train")), 4, config.seed, batches.ORDER, 3)
    rows = zoo.split("train")[source.rows("train")[order]]
    composed = symmetry.compose(symmetry.expand(found[rows % MODELS]), drawn)
    views = source.population.kinds[0].layout.tokenize(symmetry.permute(zoo.rows(rows), composed, zoo.layout)).values
    assert torch.equal(second, views)
    config = replace(config, aligned=False)
    plain = sane.draw(config, sane.make_source(config, zoo, CPU), "train", 3)
    assert not torch.equal(plain.values[1], second)


def test_embeddings_and_probes_of_aligned_networks(tmp_path, capsys):
    zoo = make_zoo(tmp_path / "zoo")
    main(["zoo", "align", "--zoo", str(zoo.path)])
    options = ["--zoo", str(zoo.path), "--steps", "1", "--batch-size", "2", "--device", "cpu", "--window", "48"]
    main(["train", "sane", *options, "--size", "tiny", "--out", str(tmp_path / "run"), "--aligned"])
    model = str(tmp_path / "run/checkpoint.pt")
    encoder = load_encoder(model)
    assert encoder.aligned
    with ZooWriter(tmp_path / "second", zoo.layout, zoo.symmetry, splits=SPLITS) as writer:
        writer.append(aligned_rows(zoo, range(18)), properties(0, 18))
    expected = embed(encoder, Zoo.open(tmp_path / "second"), halo=None)
    assert torch.equal(embed(encoder, zoo, halo=None, aligned=True), expected)
    assert not torch.equal(embed(encoder, zoo, halo=None), expected)
    capsys.readouterr()
    main(["embed", "--model", model, "--zoo", str(zoo.path), "--out", str(tmp_path / "e"), "--device", "cpu"])
    assert "note: the model was trained on networks as aligned, these are embedded as stored" in capsys.readouterr().out
    options = ["--targets", "test_accuracy", "--features", "weights", "--device", "cpu", "--model", model]
    main(["predict", "--zoo", str(zoo.path), "--aligned", *options, "--out", str(tmp_path / "a")])
    main(["predict", "--zoo", str(tmp_path / "second"), *options, "--out", str(tmp_path / "b")])
    a, b = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in "ab")
    assert a == b and {entry["features"] for entry in a} == {"embedding", "weights"}


OWN_NETWORK = """
from torch import nn, zeros

def build():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), zeros(1, 5)

def build_network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def build_number():
    return 5

NOTHING = None
"""


def read_zoo(folder, make, count=4):
    """A zoo of files that know names and shapes only."""
    (folder / "files").mkdir()
    for number in range(count):
        torch.save(make().state_dict(), folder / f"files/net{number}.pt")
    return read_checkpoints(folder / "files", folder / "zoo")


@pytest.mark.parametrize(
    "make, options, units",
    [
        (lambda: build("cnn-s", (1, 28, 28)), ["--architecture", "cnn-s"], 38),
        (
            lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
            ["--architecture", "own_network:build"],
            4,
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
            ["--architecture", "own_network:build_network", "--image-shape", "1", "6", "6"],
            4,
        ),
    ],
)
def test_zoo_from_files_is_aligned_by_its_architecture(tmp_path, monkeypatch, make, options, units):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(OWN_NETWORK)
    zoo = read_zoo(tmp_path, make)
    assert zoo.symmetry is None
    first = zoo.properties["model"][0].as_py()
    command = ["zoo", "align", "--zoo", str(zoo.path), "--reference", first]
    with pytest.raises(SystemExit, match="zoo must have a symmetry, got none; give --architecture to fastws zoo align"):
        main(command)
    main([*command, *options])
    zoo = Zoo.open(zoo.path)
    assert sum(zoo.symmetry.sizes) == units
    expected = match(zoo.rows(range(4)), zoo.rows([0])[0], zoo.symmetry, zoo.layout)
    assert torch.equal(Alignment.open(zoo).permutations, expected[:, :units])
    main([*command, *options])  # the same again
    main(command)


@pytest.mark.parametrize(
    "architecture, sentence",
    [
        ("mlp", "zoo must be of the given architecture, got another one: symmetry: layout must hold"),
        ("cnn-xl", "architecture must be one of digits-cnn"),
        ("own_network:build_number", "own_network:build_number must return a network, or it and its inputs, got int"),
        ("own_network:NOTHING", "own_network:NOTHING must be a function, got NoneType"),
        ("own_network:missing", "function must be given as module:function .* got 'own_network:missing'"),
        ("no_such_module:build", "function must be given as module:function .* got 'no_such_module:build'"),
    ],
)
def test_architecture_of_other_networks(tmp_path, monkeypatch, architecture, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(OWN_NETWORK)
    zoo = read_zoo(tmp_path, lambda: build("cnn-s", (1, 28, 28)), 2)
    before = (zoo.path / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=sentence):
        align(Config(zoo=str(zoo.path), architecture=architecture))
    assert (zoo.path / MANIFEST).read_bytes() == before


def test_reference_and_file_can_be_named(tmp_path):
    zoo = make_zoo(tmp_path / "zoo")
    file = tmp_path / "to m1.safetensors"
    made = align(Config(zoo=str(zoo.path), out=str(file), reference="m1"))
    read = Alignment.open(zoo, file)
    assert (made.reference, made.chosen) == (read.reference, read.chosen) == ("m1", "named")
    assert torch.equal(aligned_rows(zoo, [13], read), zoo.rows([13])) and not (zoo.path / ALIGNMENT).exists()


def test_restarts_of_a_whole_zoo(tmp_path):
    zoo = make_zoo(tmp_path / "zoo")
    rows = torch.randn(20, zoo.layout.num_weights)
    with ZooWriter(tmp_path / "unlike", zoo.layout, zoo.symmetry) as writer:
        writer.append(rows, {"model": [f"m{number:02}" for number in range(20)]})
    once, often = (align(Config(zoo=str(tmp_path / "unlike"), reference="m00", restarts=count)) for count in (1, 4))
    assert (often.after >= once.after).all() and (often.after > once.after).any()


def test_models_that_came_later_are_named(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", splits=None)
    align(Config(zoo=str(zoo.path)))
    before = aligned_rows(zoo, range(18))
    with ZooWriter(zoo.path, zoo.layout, zoo.symmetry) as writer:
        writer.append(zoo.rows([0, 1]), properties(0, 2) | {"model": ["m0", "new"], "epoch": torch.tensor([9, 9])})
    zoo = Zoo.open(zoo.path)
    assert torch.equal(aligned_rows(zoo, range(18)), before)
    assert torch.equal(aligned_rows(zoo, [18]), before[:1])  # a later epoch of a known model
    with pytest.raises(ValueError, match="aligned_rows: models must be in the alignment, got 'new'"):
        aligned_rows(zoo, [18, 19])


def test_last_epoch_is_that_of_the_largest_number(tmp_path):
    module, inputs = architectures.mlp()
    layout, symmetry = Layout.from_checkpoint(module), Symmetry.trace(module, inputs)
    rows = torch.randn(4, layout.num_weights)
    with ZooWriter(tmp_path, layout, symmetry, splits={"train": ["a", "b"], "val": [], "test": []}) as writer:
        writer.append(rows, {"model": ["a", "b", "a", "b"], "epoch": [2, 2, 1, 1]})
    made = align(Config(zoo=str(tmp_path), reference="a"))
    assert torch.equal(made.permutations, match(rows[:2], rows[0], symmetry, layout))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(reference="m9"), "reference must be a model of .*: m0, m1, m2 ..; got 'm9'"),
        (dict(device="mps"), "device must be cpu where no GPU is, got 'mps'"),
        (dict(best="loss"), "best must be one of model, epoch, test_accuracy, got 'loss'; or name a reference"),
        (dict(best="model"), "property 'model' must be a number, got string"),
        (dict(sweeps=0), "sweeps must be at least 1, got 0"),
        (dict(restarts=-1), "restarts must be at least 1, got -1"),
    ],
)
def test_bad_configurations(tmp_path, options, sentence):
    zoo = make_zoo(tmp_path / "zoo")
    with pytest.raises(ValueError, match=f"zoo.*: {sentence}"):
        align(Config(zoo=str(zoo.path), **options))


@pytest.mark.parametrize("splits", [{}, {"fold0": ["m0", "m5"], "fold1": ["m1", "m2", "m3", "m4"]}])
def test_zoo_without_a_train_split_is_aligned_to_the_best_of_all(tmp_path, splits):
    zoo = make_zoo(tmp_path / "zoo", splits=splits or None)
    if not splits:  # of a stranger: a writer deals models to splits
        manifest = json.loads((zoo.path / MANIFEST).read_text())
        (zoo.path / MANIFEST).write_text(json.dumps(manifest | {"splits": {}}))
    made = align(Config(zoo=str(zoo.path)))
    assert (made.reference, made.chosen) == ("m5", "highest last test_accuracy of all models")


def test_epochs_that_are_no_numbers_are_refused(tmp_path):
    zoo = make_zoo(tmp_path / "zoo")
    with ZooWriter(tmp_path / "named", zoo.layout, zoo.symmetry) as writer:
        with pytest.raises(ValueError, match="column 'epoch' must hold whole numbers, got string"):
            writer.append(zoo.rows([0, 1]), {"model": ["a", "a"], "epoch": ["first", "last"]})
        writer.append(zoo.rows([0, 1]), {"model": ["a", "a"], "epoch": [0, 1]})
    assert len(Zoo.open(tmp_path / "named")) == 2


def test_zoo_without_symmetry_or_networks(tmp_path):
    make_zoo(tmp_path / "zoo", symmetry=False)
    with pytest.raises(
        ValueError, match="zoo: zoo must have a symmetry, got none; give --architecture to fastws zoo align"
    ):
        align(Config(zoo=str(tmp_path / "zoo")))
    module, inputs = architectures.mlp()
    with ZooWriter(tmp_path / "empty", Layout.from_checkpoint(module), Symmetry.trace(module, inputs)):
        pass
    with pytest.raises(ValueError, match="empty: zoo must hold networks, got none"):
        align(Config(zoo=str(tmp_path / "empty")))


def test_alignment_that_does_not_fit(tmp_path):
    zoo = make_zoo(tmp_path / "zoo")
    with pytest.raises(FileNotFoundError, match="alignment must be there, got none; run fastws zoo align"):
        aligned_rows(zoo, [0])
    align(Config(zoo=str(zoo.path)))
    module, inputs = architectures.mlp()
    with ZooWriter(tmp_path / "other", Layout.from_checkpoint(module), Symmetry.trace(module, inputs)):
        pass
    other = Zoo.open(tmp_path / "other")
    with pytest.raises(ValueError, match=f"alignment must be of the architecture {other.layout.fingerprint}"):
        Alignment.open(other, zoo.path / ALIGNMENT)
    content = (zoo.path / ALIGNMENT).read_bytes()
    strange = safetensors.torch.save({"weights": torch.zeros(1)})
    for damaged in (content[:-9], content[:40], b"", strange):
        (zoo.path / ALIGNMENT).write_bytes(damaged)
        with pytest.raises(ValueError, match="file must be an alignment"):
            Alignment.open(zoo)
