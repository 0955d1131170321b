"""Two checkpoints: what same says of them, against what was done to them."""

import json
import math

import numpy
import pytest
import relatives
import torch
from scipy import stats

import fastws
from fastws.cli import main
from fastws.compare.changes import find_change
from fastws.compare.differences import compare_tensors
from fastws.compare.kinds import Levels, find_levels, find_pattern, find_rank, stored_wider
from fastws.compare.kinship import (
    agreement,
    discoveries,
    find_families,
    in_words,
    log_empirical,
    log_fisher,
    log_poisson_tail,
    spaced,
)
from fastws.compare.modules import Words
from fastws.compare.paired import corresponding

KNOWN = Words(architecture="relatives:factory")
BASE = relatives.network(0)
MADE = {
    "tuned": (relatives.tuned(BASE), "fine-tuned", None),
    "pruned": (relatives.pruned(BASE), "pruned: 50% of b are zero, the rest is unchanged", "b"),
    "int4": (relatives.quantised(BASE), "quantised: b has 4 bits, a scale for each tensor", "b"),
    "lora": (relatives.low_rank(BASE), "low rank: rank 2 in 3 of 3 changed matrices", None),
    "frozen": (BASE | {"4.bias": torch.zeros(10)}, "frozen: 5 of 6 tensors", None),
}


@pytest.fixture
def base(tmp_path):
    return relatives.save(tmp_path, "base", BASE)


@pytest.mark.parametrize("name", MADE)
def test_relatives_are_told_with_what_was_done(tmp_path, base, name):
    state, kind, child = MADE[name]
    found = fastws.same(base, relatives.save(tmp_path, name, state))
    assert found.verdict == "relative" and found.log_p < math.log(1e-6)
    assert any(line.startswith(kind) for line in found.kinds), found.kinds
    assert found.child == child and "permutations were not looked at" in found.notes[-1]
    back = fastws.same(relatives.save(tmp_path, name, state), base)
    assert back.verdict == "relative" and back.child == (child and "a")


def test_equal_bytes_and_equal_numbers(tmp_path, base):
    assert fastws.same(base, relatives.save(tmp_path, "copy", BASE)).verdict == "identical"
    half = relatives.save(tmp_path, "half", {name: x.bfloat16() for name, x in BASE.items()})
    found = fastws.same(base, half)
    assert found.verdict == "same numbers" and "float32 and bfloat16" in found.sentence
    prefixed = relatives.save(tmp_path, "prefixed", {f"model.{name}": x for name, x in BASE.items()})
    assert fastws.same(base, prefixed).verdict == "identical"


def test_strangers_are_none(tmp_path, base):
    found = [fastws.same(base, relatives.save(tmp_path, "other", relatives.network(seed))) for seed in range(1, 21)]
    assert {one.verdict for one in found} == {"stranger"}


def test_moved_networks_need_a_module_and_a_null(tmp_path, base):
    other = relatives.save(tmp_path, "moved", relatives.moved(BASE))
    assert fastws.same(base, other).verdict == "stranger"
    assert fastws.same(base, other, words=KNOWN).verdict == "same network"
    tuned = relatives.save(tmp_path, "tuned", relatives.moved(relatives.tuned(BASE)))
    without = fastws.same(base, tuned, words=KNOWN)
    assert without.verdict == "undecided" and "0 pairs of strangers are given" in without.notes[-1]
    for seed in range(6):
        relatives.save(tmp_path / "null", str(seed), relatives.network(100 + seed))
    found = fastws.same(base, tuned, words=KNOWN, null=tmp_path / "null")
    assert found.verdict == "relative" and "27 pairs of strangers" in found.notes[-1]
    assert found.distances["matched"] < 0.2 < found.distances["raw"]
    stranger = relatives.save(tmp_path, "stranger", relatives.network(50))
    assert fastws.same(base, stranger, words=KNOWN, null=tmp_path / "null").verdict == "stranger"


def test_what_was_tuned_within_the_rounding_of_half_precision_is_not_the_same(tmp_path):
    half = {name: x.bfloat16() for name, x in BASE.items()}
    base = relatives.save(tmp_path, "half", half)
    moved = relatives.save(tmp_path, "moved", relatives.moved(half))
    assert fastws.same(base, moved, words=KNOWN).verdict == "same network"
    tuned = {name: x.bfloat16() for name, x in relatives.tuned(BASE, 0.005).items()}
    found = fastws.same(base, relatives.save(tmp_path, "tuned", tuned), words=KNOWN)
    assert 0 < found.distances["matched"] < 0.0069 and found.verdict == "relative"


def test_null_may_lie_beside_the_two(tmp_path, base):
    tuned = relatives.save(tmp_path, "tuned", relatives.moved(relatives.tuned(BASE)))
    for seed in range(6):
        relatives.save(tmp_path, f"stranger{seed}", relatives.network(100 + seed))
    found = fastws.same(base, tuned, words=KNOWN, null=tmp_path)
    assert found.verdict == "relative" and "27 pairs of strangers" in found.notes[-1]


def test_scaled_networks_are_the_same_at_the_whole_group(tmp_path, base):
    other = relatives.save(tmp_path, "scaled", relatives.scaled(relatives.moved(BASE)))
    found = fastws.same(base, other, words=KNOWN)
    assert found.verdict == "same network" and "the whole group (P, S+)" in found.sentence
    found = fastws.same(base, other, words=KNOWN, whole=False)
    assert found.verdict == "undecided" and found.distances["matched"] > 0.1
    for seed in range(6):
        relatives.save(tmp_path / "null", str(seed), relatives.network(100 + seed))
    tuned = relatives.save(tmp_path, "tuned", relatives.scaled(relatives.moved(relatives.tuned(BASE))))
    found = fastws.same(base, tuned, words=KNOWN, null=tmp_path / "null")
    assert found.verdict == "relative" and found.distances["whole group"] < 0.2 < found.distances["matched"]


def test_other_heads_and_other_architectures(tmp_path, base):
    head = {"4.weight": torch.randn(12, 24), "4.bias": torch.randn(12)}
    found = fastws.same(base, relatives.save(tmp_path, "head", relatives.tuned(BASE) | head))
    assert found.verdict == "relative"
    assert "'4.weight' has 10 rows in a and 12 in b; they are not alike" in found.notes
    other = {"0.weight": torch.randn(7, 5)}
    found = fastws.same(base, relatives.save(tmp_path, "other", other))
    assert (
        found.verdict == "not comparable" and "'0.weight' is [24, 32] in one and [7, 5] in the other" in found.sentence
    )
    found = fastws.same(base, relatives.save(tmp_path, "names", {"else": torch.randn(7, 5)}))
    assert found.verdict == "not comparable" and "'0.bias' is in" in found.sentence


def test_bad_input_is_one_sentence(tmp_path, base, monkeypatch):
    broken = BASE | {"2.weight": BASE["2.weight"].index_fill(0, torch.tensor(3), math.nan)}
    with pytest.raises(ValueError, match="'2.weight' of .* must be finite, got 24 NaN or infinite numbers"):
        fastws.same(base, relatives.save(tmp_path, "nan", broken))
    packed = relatives.save(tmp_path, "packed", BASE | {"0.weight": torch.ones(24, 32, dtype=torch.int8)})
    with pytest.raises(ValueError, match="must hold its weights as floats, got 768 quantised"):
        fastws.same(base, packed)
    with pytest.raises(ValueError, match="checkpoint must fit relatives:factory, but '2.weight' must be"):
        small = {name: x for name, x in BASE.items() if not name.startswith("2")}
        where = relatives.save(tmp_path, "small", small)
        fastws.same(where, relatives.save(tmp_path, "small2", relatives.tuned(small)), words=KNOWN)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="null must be a folder of unrelated networks of the architecture, got none"):
        fastws.same(base, relatives.save(tmp_path, "b", relatives.tuned(BASE)), words=KNOWN, null=tmp_path / "none")
    monkeypatch.delenv("FASTWS_DEBUG", raising=False)
    with pytest.raises(SystemExit, match="checkpoint must be a file, got nothing"):
        main(["same", base, str(tmp_path / "nothing.safetensors")])


def test_command(tmp_path, base, capsys):
    other = relatives.save(tmp_path, "tuned", relatives.tuned(BASE))
    main(["same", base, other])
    assert capsys.readouterr().out.startswith("relatives: strangers are as close with p = ")
    main(["same", base, other, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "relative" and found["child"] == "unknown" and len(found["tensors"]) == 6
    assert found["units"] == {"own": 72, "compared": 72} and found["log10_p"] < -20


# --- the parts


def test_one_pass_against_plain_sums():
    random = torch.Generator().manual_seed(0)
    a = torch.randn(700, 500, generator=random)
    b = torch.where(torch.rand(a.shape, generator=random) < 0.2, 0.0, a + 0.1)
    b[0] = a[0]
    a[1, 0] = math.inf
    for x, y in ((a, b), (a.bfloat16(), b.double())):
        (found,) = compare_tensors({"x": (x, y)}, progress=False)
        if x.dtype == torch.bfloat16:
            y = y.bfloat16()
        x, y = x.double().index_put((torch.tensor(1), torch.tensor(0)), torch.zeros(()).double()), y.double()
        y[1, 0] = 0
        assert found.nonfinite == 1 and found.unequal == int((x != y).sum())
        assert found.new_zeros == (int(((y == 0) & (x != 0)).sum()), int(((x == 0) & (y != 0)).sum()))
        assert found.dot == pytest.approx(float((x * y).sum()), rel=1e-5)
        assert found.gap == pytest.approx(float((x - y).square().sum()), rel=1e-5)
        assert found.squares == pytest.approx((float(x.square().sum()), float(y.square().sum())), rel=1e-5)


def test_probabilities():
    for count in (1, 3, 7):
        assert log_poisson_tail(count) == pytest.approx(stats.poisson.logsf(count - 1, 1))
    assert log_poisson_tail(0) == 0 and log_poisson_tail(128) == pytest.approx(-1 - math.lgamma(129), rel=1e-4)
    some = [0.3, 0.01, 0.7]
    assert log_fisher([math.log(p) for p in some]) == pytest.approx(math.log(stats.combine_pvalues(some)[1]))
    assert in_words(log_poisson_tail(400)) == "10^-869" and in_words(None) == "unknown"
    logs = [math.log(p) for p in (0.001, 0.02, 0.04, 0.9)]
    assert discoveries(logs, 0.05) == [True, True, False, False]
    assert log_empirical(0.5, [1.0] * 19) is None
    assert log_empirical(0.5, [1.0] * 1999) == pytest.approx(math.log(1 / 2000))
    null = numpy.exp(numpy.random.default_rng(0).normal(0, 0.1, 50))
    assert log_empirical(float(numpy.exp(-0.3)), null) == pytest.approx(stats.norm.logcdf(-3), abs=1.5)


def test_exact_test_is_calibrated_among_strangers():
    shapes = {name: tuple(x.shape) for name, x in BASE.items()}
    families = find_families(shapes)
    assert [(one.tensor, one.axis) for one in families] == [("0.weight", 0), ("2.weight", 0), ("4.weight", 1)]
    others = [relatives.network(seed) for seed in range(40)]
    logs = [agreement(a, b, families).log_p for a in others[:20] for b in others[20:]]
    assert numpy.mean([log < math.log(0.05) for log in logs]) < 0.05 and min(logs) > math.log(1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_of_a_merged_adapter(dtype):
    random = torch.Generator().manual_seed(0)
    a = torch.randn(256, 320, generator=random).to(dtype)
    change = torch.randn(256, 8, generator=random) @ torch.randn(8, 320, generator=random)

    def rank(change):
        b = (a.float() + change).to(dtype)
        return find_rank(a, b, *compare_tensors({"x": (a, b)}, progress=False))

    for size in (0.1, 0.01):
        assert rank(change * size * a.float().norm() / change.norm()).rank == 8
    assert rank(0.05 * torch.randn(256, 320, generator=random)).full
    small = rank(change * 1e-3 * a.float().norm() / change.norm())
    assert small.rank == (8 if dtype == torch.float32 else None) and not small.full


def test_scalar_that_was_zero_is_changed():
    a, b = torch.zeros(()), torch.ones(())
    for pair in ((a, b), (b, a)):
        assert find_change(*pair, *compare_tensors({"x": pair}, progress=False)).kind == "changed"


def test_places_of_large_tensors_are_inside():
    count = 25088 * 4096  # between these float32 has no odd numbers
    found = spaced(count, 1024)
    assert found[-1] == count - 1 and len(found.unique()) == 1024


def test_levels():
    random = torch.Generator().manual_seed(0)
    w = torch.randn(64, 1024, generator=random)

    def rounded(rows, bits):
        step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((rows / step).round() * step).reshape(w.shape)

    assert find_levels(w) is None and find_levels(w.bfloat16()) is None
    assert find_levels(rounded(w.reshape(1, -1), 8)) == Levels(8, "tensor")
    assert find_levels(rounded(w, 4).bfloat16()) == Levels(4, "row")
    assert find_levels(rounded(w.reshape(-1, 64), 4)) == Levels(4, "block of 64")
    assert stored_wider(w.half().float()) == torch.float16 and stored_wider(w) is None
    sparse = w.reshape(-1, 4).scatter(1, w.reshape(-1, 4).abs().argsort(1)[:, :2], 0.0).reshape(w.shape)
    assert find_pattern(sparse) == "2:4" and find_pattern(w) is None


def test_names_correspond_without_what_all_begin_with():
    ours, theirs = {"0.weight": 0, "2.weight": 0}, {"a.b.0.weight": 0, "a.b.2.weight": 0}
    assert corresponding(ours, theirs) == {"0.weight": "a.b.0.weight", "2.weight": "a.b.2.weight"}
    assert corresponding(ours, ours | {"3.weight": 0}) == {"0.weight": "0.weight", "2.weight": "2.weight"}


def test_units_that_are_equal_are_no_sign_of_kinship(tmp_path):
    families = find_families({name: tuple(x.shape) for name, x in BASE.items()})

    def erased(seed, share):  # whole units, as structured pruning takes them away
        state = relatives.network(seed)
        for rows in ("0.weight", "2.weight"):
            state[rows][torch.rand(24, generator=relatives.generator(seed)) < share] = 0
        state["4.weight"][:, torch.rand(24, generator=relatives.generator(seed)) < share] = 0
        return state

    for share in (0.5, 1.1):
        others = [erased(seed, share) for seed in range(1, 21)]
        logs = [agreement(a, b, families).log_p for a in [*others[:10], BASE] for b in others[10:]]
        assert numpy.mean([log < math.log(0.05) for log in logs]) <= 0.06 and min(logs) > math.log(1e-4)
    zeros = relatives.save(tmp_path, "zeros", {name: torch.zeros_like(x) for name, x in BASE.items()})
    assert fastws.same(relatives.save(tmp_path, "base", BASE), zeros).verdict == "stranger"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_networks_of_two_dtypes_at_the_whole_group(tmp_path, dtype):
    one = relatives.save(tmp_path, "one", BASE)
    other = relatives.save(tmp_path, "other", {name: x.to(dtype) for name, x in relatives.network(1).items()})
    assert fastws.same(one, other, words=KNOWN, whole=True).verdict != "relative"
