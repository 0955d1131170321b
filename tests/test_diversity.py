from types import SimpleNamespace

import numpy
import pytest
import torch
from small_zoo import MODELS, make_small_zoo
from torch.nn.functional import cosine_similarity

import fastws
from fastws.zoo import Zoo, ZooWriter
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import aligned_rows
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import make
from fastws.zoo.survey import diversity


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_small_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Networks that learned something, with their recipes."""
    options = {"networks": 5, "epochs": 2, "limit": 300, "threads": 1, "lrs": (1e-2,), "inits": ("kaiming_uniform",)}
    return make(MakeConfig(out=str(tmp_path_factory.mktemp("made") / "zoo"), **options))


# --- samples


def test_sample_holds_all_states_of_its_networks(zoo):
    sample = diversity.draw_sample(zoo, 7, seed=3)
    models, epochs = (zoo.properties[name].to_pylist() for name in ("model", "epoch"))
    assert len(set(sample.models)) == 7 and sample.epochs == [1, 2] and sample.rows.shape == (7, 2)
    for model, rows in zip(sample.models, sample.rows.tolist(), strict=True):
        assert [(models[row], epochs[row]) for row in rows] == [(model, 1), (model, 2)]
    assert torch.equal(sample.last(), sample.rows[:, 1])
    again, other = diversity.draw_sample(zoo, 7, seed=3), diversity.draw_sample(zoo, 7, seed=4)
    assert again.models == sample.models != other.models
    assert len(diversity.draw_sample(zoo, 1000, seed=0).models) == MODELS


def test_sample_fits_into_memory(zoo, monkeypatch):
    monkeypatch.setattr(diversity, "AT_ONCE", 5 * zoo.layout.num_weights)
    assert len(diversity.draw_sample(zoo, 1000, seed=0).models) == 5


def test_sample_says_which_states_are_missing(tmp_path):
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})
    with ZooWriter(tmp_path, layout) as writer:
        writer.append(torch.arange(12.0).view(3, 4), {"model": ["a", "b", "a"], "epoch": [0, 0, 5]})
    zoo = Zoo.open(tmp_path)
    sample = diversity.draw_sample(zoo, 10, seed=0)
    assert sample.rows.tolist() == [[0, 2], [1, -1]] and sample.last().tolist() == [2, 1]
    weights = diversity.measure_weights(zoo, sample)
    assert weights.steps[0].tolist() == [16] and weights.steps[1].isnan().all()
    assert weights.statistics[1, 1].isnan().all() and weights.statistics[1, 0, 0, 0] == 9.5


# --- weights


def test_offsets_are_those_of_all_tensors(zoo):
    state = zoo.checkpoint(3)
    names, offsets = diversity.tensor_names(zoo.layout), diversity.tensor_offsets(zoo.layout)
    assert names == list(state)
    for name, (begin, end) in zip(names, offsets.tolist(), strict=True):
        assert torch.equal(zoo.weights[3, begin:end], state[name].flatten())


def test_weights_of_a_sample(zoo):
    sample = diversity.draw_sample(zoo, 6, seed=0)
    found = diversity.measure_weights(zoo, sample)
    first, last = (zoo.rows(rows).double() for rows in sample.rows.unbind(1))
    for epoch, weights in enumerate((first, last)):
        expected = fastws.layer_statistics(weights, diversity.tensor_offsets(zoo.layout))
        torch.testing.assert_close(found.statistics[epoch], expected)
    torch.testing.assert_close(found.steps[:, 0], (last - first).norm(dim=1))
    torch.testing.assert_close(found.std, last.std(0, correction=0))
    assert list(found.distances) == ["raw"] and found.permuted.repeated == 0


@pytest.mark.parametrize("columns", [7, 1000])  # at a time
def test_distances_of_all_pairs(monkeypatch, columns):
    monkeypatch.setattr(diversity, "WEIGHTS_AT_A_TIME", columns)
    weights = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    weights[3] = 2 * weights[1]
    found = diversity.pairwise_distances(weights)
    chosen = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = torch.tensor([(weights[i] - weights[j]).norm() for i, j in chosen]).double()
    torch.testing.assert_close(found.l2, expected, rtol=1e-5, atol=1e-6)
    angles = torch.tensor([1 - cosine_similarity(weights[i], weights[j], 0) for i, j in chosen]).double()
    torch.testing.assert_close(found.cosine, angles, rtol=1e-5, atol=1e-6)
    assert found.cosine[chosen.index((1, 3))].abs() < 1e-6


def test_alignment_brings_networks_nearer(tmp_path):
    zoo = make_small_zoo(tmp_path)
    align(AlignConfig(zoo=str(tmp_path)))
    sample = diversity.draw_sample(zoo, 8, seed=0)
    distances = diversity.measure_weights(zoo, sample).distances
    expected = diversity.pairwise_distances(aligned_rows(zoo, sample.last()))
    assert list(distances) == ["raw", "aligned"] and torch.equal(distances["aligned"].l2, expected.l2)


# --- duplicates


def test_duplicates_are_found(tmp_path, zoo):
    rows = zoo.rows(range(6))
    permutation = zoo.symmetry.random(1, seed=1)
    permuted = zoo.symmetry.permute(rows[2:3], permutation, zoo.layout)
    assert not torch.equal(permuted, rows[2:3])
    several = torch.cat([rows, rows[4:5], permuted, rows[4:5] * (1 + 1e-6)])
    with ZooWriter(tmp_path, zoo.layout, zoo.symmetry, shard_bytes=3 * 4 * zoo.layout.num_weights) as writer:
        writer.append(several, {"model": [f"m{number}" for number in range(9)]})
    copied = Zoo.open(tmp_path)
    assert diversity.find_duplicates(copied) == (9, 1, (4, 6))
    weights = diversity.measure_weights(copied, diversity.draw_sample(copied, 9, seed=0))
    assert weights.permuted[:2] == (9, 2)  # the copy, and the one with other neurons first
    assert diversity.find_duplicates(zoo) == (len(zoo), 0, None)


# --- functions


def test_agreement_by_hand():
    predictions = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [2, 0, 1, 1]])
    expected = torch.tensor([[4, 2, 0], [2, 4, 2], [0, 2, 4]]) / 4
    assert torch.equal(diversity.agreement(predictions), expected.double())
    assert diversity.pairs(expected).tolist() == [0.5, 0, 0.5]


def centred_alignment(x, y):
    """An independent statement: the alignment of centred Gram matrices."""
    centre = numpy.eye(len(x)) - 1 / len(x)
    k, other = (centre @ z @ z.T @ centre for z in (x, y))
    return (k * other).sum() / numpy.sqrt((k * k).sum() * (other * other).sum())


def test_cka_is_the_alignment_of_gram_matrices():
    features = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0)) + 5
    features[2] = features[0] @ torch.linalg.qr(torch.randn(3, 3)).Q * 7 - 1  # turned, scaled and moved: the same
    found = diversity.linear_cka(features)
    expected = [[centred_alignment(x.numpy(), y.numpy()) for y in features] for x in features]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)
    assert found[0, 2] == pytest.approx(1, abs=1e-5) and found[0, 1] < 0.5


def test_functions_are_those_of_the_networks(made):
    sample = diversity.draw_sample(made, 5, seed=0)
    found = diversity.measure_functions(made, sample)
    recorded = torch.tensor(made.properties["test_accuracy"].to_pylist())[sample.last()]
    torch.testing.assert_close(found.accuracy.float(), recorded.float())  # the right networks on the right images
    assert found.agreement.diagonal().eq(1).all() and found.accuracy.max() > 0.3
    assert diversity.measure_functions(made, sample, limit=20).images == 20


def test_large_networks_are_run_one_by_one(made, monkeypatch):
    sample, prepare = diversity.draw_sample(made, 5, seed=0), diversity.prepare
    small, labels = diversity.compute_logits(made, sample, None, 30)
    monkeypatch.setattr(diversity, "prepare", lambda config: prepare(config)._replace(one_by_one="too large"))
    large, _ = diversity.compute_logits(made, sample, None, 30)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-4)
    assert large.shape == (5, 30, 10) and len(labels) == 30


def test_functions_need_activations_that_there_are(made, tmp_path):
    with ZooWriter(tmp_path, made.layout, made.symmetry, made.provenance) as writer:
        writer.append(made.rows([0, 1]), {"model": ["a", "b"], "activation": ["tanh", "swish"]})
    zoo = Zoo.open(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: activation must be one of tanh, .*, got 'swish'"):
        diversity.measure_functions(zoo, diversity.draw_sample(zoo, 2, seed=0))


def test_functions_need_to_know_the_networks(zoo):
    foreign = SimpleNamespace(path=zoo.path, provenance={"config": {"lab": "other"}})
    for unknown in (zoo, foreign):
        with pytest.raises(ValueError, match="provenance must be that of fastws zoo make, which says what networks"):
            diversity.measure_functions(unknown, diversity.draw_sample(zoo, 3, seed=0))
