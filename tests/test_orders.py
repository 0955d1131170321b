import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import fastws
from fastws.nern.orders import Infilter, content_key, coordinates, load_orders, network_orders, save_orders
from fastws.ops.kernel_order import unit_rows

CHECKPOINTS = Path(__file__).parents[2] / "shared/data/resnets_cifar10"
SHAPES = [(6, 3, 3, 3), (8, 6, 3, 3), (5, 8, 1, 1), (4, 5, 5, 5), (3, 4)]


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def greedy(similarity):
    """Along a matrix of similarities, the first of equals."""
    order = [0]
    while len(order) < len(similarity):
        left = [j for j in range(len(similarity)) if j not in order]
        order.append(max(left, key=lambda j: (similarity[order[-1]][j], -j)))
    return order


def published_infilter(weight):
    """As the published code does: channels of each filter, then filters by the sum of the cosines of their kernels."""
    filters = weight.double().reshape(*weight.shape[:2], -1)
    cosines = filters / filters.norm(dim=2, keepdim=True)
    if filters.shape[2] == 1:
        channels = [greedy((-((x - x.T) ** 2)).tolist()) for x in filters]
    else:
        channels = [greedy((x @ x.T).tolist()) for x in cosines]
    ordered = torch.stack([x[order] for x, order in zip(cosines, channels, strict=True)]).flatten(1)
    return greedy((ordered @ ordered.T).tolist()), channels


def test_crossfilter_orders_are_those_of_kernel_order():
    for weight, order in zip(network(), network_orders(network(), "crossfilter"), strict=True):
        kernels = weight.reshape(weight.shape[0] * weight.shape[1], -1)
        assert torch.equal(order, fastws.kernel_order(kernels))


def test_infilter_orders_are_published():
    for weight, order in zip(network(), network_orders(network(), "infilter"), strict=True):
        assert (order.filters.tolist(), order.channels.tolist()) == published_infilter(weight)


def test_infilter_orders_of_equal_values():
    weight = torch.tensor([[3.0, 1.0, 5.0, 3.0, 1.0], [0.0, 0.0, -1.0, 2.0, 0.5]])[..., None, None]
    (order,) = network_orders([weight], "infilter")
    assert order.channels.tolist() == [[0, 3, 1, 4, 2], [0, 1, 4, 2, 3]]


def test_orders_improved_are_paths_and_better():
    weights = [torch.randn(16, 32, 3, 3, generator=torch.Generator().manual_seed(0))]
    rows = unit_rows(weights[0].flatten(2))
    (greedy_path,), (path,) = (network_orders(weights, "crossfilter", improve=improve) for improve in (False, True))
    assert path.sort().values.tolist() == list(range(512)) and path[0] == 0

    def similarity(order):
        ordered = rows.flatten(0, 1)[order]
        return (ordered[1:] * ordered[:-1]).sum(1).mean()

    assert similarity(path) > similarity(greedy_path) + 0.005

    (order,) = network_orders(weights, "infilter")
    (better,) = network_orders(weights, "infilter", improve=True)
    for number in range(16):
        ordered = [rows[number][x.channels[number]] for x in (order, better)]
        before, after = ((x[1:] * x[:-1]).sum() for x in ordered)
        assert after >= before


TRAINED = {
    "resnet20-12fca82f.th": "c04c9790dbbfb82d91a809357bcef4d7a908068ababa6b9f5638d8571c95bbde",
    "resnet56-4bfd9763.th": "83b4ca5207583d964a13a49a9cdd6484e1db798716037fa29a3e176df0c0ea7a",
}


@pytest.mark.parametrize("name", TRAINED)
def test_infilter_orders_of_trained_networks_are_published(name):
    if not (CHECKPOINTS / name).exists():
        pytest.skip(f"needs {name} of akamaster/pytorch_resnet_cifar10")
    state = torch.load(CHECKPOINTS / name, map_location="cpu", weights_only=True)["state_dict"]
    weights = [weight for weight in state.values() if weight.dim() == 4]
    orders = network_orders(weights, "infilter")
    numbers = torch.cat([torch.cat([order.filters, order.channels.flatten()]) for order in orders])
    assert hashlib.sha256(numbers.numpy().astype("<i4").tobytes()).hexdigest() == TRAINED[name]


def test_coordinates_are_ranks():
    weight = torch.empty(2, 3, 3, 3)
    identity = coordinates(None, weight.shape)
    assert identity[1, 2].tolist() == [1, 2] and identity[0, 1].tolist() == [0, 1]
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    found = coordinates(order, weight.shape)
    for position, kernel in enumerate(order.tolist()):
        assert found[kernel // 3, kernel % 3].tolist() == [position // 3, position % 3]
    infilter = Infilter(torch.tensor([1, 0]), torch.tensor([[0, 2, 1], [2, 0, 1]]))
    found = coordinates(infilter, weight.shape)
    assert found[0].tolist() == [[1, 0], [1, 2], [1, 1]]
    assert found[1].tolist() == [[0, 1], [0, 2], [0, 0]]


@pytest.mark.parametrize("mode", ["crossfilter", "infilter"])
def test_coordinates_cover_the_grid(mode):
    for weight, order in zip(network(), network_orders(network(), mode), strict=True):
        filters, channels = weight.shape[:2]
        cells = coordinates(order, weight.shape).flatten(0, 1).tolist()
        assert sorted(cells) == [[f, c] for f in range(filters) for c in range(channels)]


def equal(orders, others):
    flat = [
        [x for order in one for x in (order if isinstance(order, Infilter) else [order])] for one in (orders, others)
    ]
    return all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


@pytest.mark.parametrize("mode", ["crossfilter", "infilter"])
def test_orders_are_kept_and_refused_for_other_weights(tmp_path, mode):
    weights = network()
    orders = network_orders(weights, mode)
    save_orders(tmp_path / "orders", orders, weights, mode)
    assert equal(load_orders(tmp_path / "orders", weights, mode), orders)
    with pytest.raises(ValueError, match="key must be .* orders of other weights"):
        load_orders(tmp_path / "orders", network(seed=1), mode)
    other = {"crossfilter": "infilter", "infilter": "crossfilter"}[mode]
    with pytest.raises(ValueError, match=f"orders must be {other}, got {mode}"):
        load_orders(tmp_path / "orders", weights, other)
    save_orders(tmp_path / "orders", orders, weights, mode, improve=True)  # replaces
    assert json.loads((tmp_path / "orders/orders.json").read_text())["improve"]
    assert [path.name for path in tmp_path.iterdir()] == ["orders"]


def test_cache_is_keyed_by_content(tmp_path):
    weights = network()
    orders = network_orders(weights, "crossfilter", cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    torch.save(list(reversed(range(18))), folder / "layer_0.pt")  # what is read is what is kept
    cached = network_orders([weight.clone() for weight in weights], "crossfilter", cache=tmp_path)
    assert cached[0].tolist() == list(reversed(range(18))) and torch.equal(cached[1], orders[1])
    weights[0][0, 0, 0, 0] += 1e-6
    network_orders(weights, "crossfilter", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    keys = {content_key(weights, mode, improve) for mode in ("crossfilter", "infilter") for improve in (False, True)}
    assert len(keys) == 4
    assert content_key(weights, "infilter", False) != content_key([w.bfloat16() for w in weights], "infilter", False)


def test_published_files_are_read(tmp_path):
    weights = network()[:2]
    torch.save((list(range(6)), [[2, 0, 1]] * 6), tmp_path / "layer_0.pt")
    torch.save((list(range(8)), [list(range(6))] * 8), tmp_path / "layer_1.pt")
    orders = load_orders(tmp_path, weights, "infilter")
    assert orders[0].channels[3].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"layer_0.pt: file must hold the crossfilter order of a layer"):
        load_orders(tmp_path, weights, "crossfilter")
    with pytest.raises(ValueError, match=r"must hold layer_0.pt to layer_2.pt, got no layer_2.pt"):
        load_orders(tmp_path, network()[:3], "infilter")
    with pytest.raises(ValueError, match=r"must hold orders of 1 layers, got layer_1.pt too"):
        load_orders(tmp_path, weights[:1], "infilter")
    torch.save(([0] * 6, [[2, 0, 1]] * 6), tmp_path / "layer_0.pt")
    with pytest.raises(ValueError, match=r"layer_0.pt: order must hold each number below 6 once"):
        load_orders(tmp_path, weights, "infilter")


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_order_files_are_not_executed(tmp_path, capsys):
    with open(tmp_path / "layer_0.pt", "wb") as file:
        pickle.dump(Malicious(), file, protocol=2)
    with pytest.raises(ValueError, match="layer_0.pt: file must hold the crossfilter order"):
        load_orders(tmp_path, network()[:1], "crossfilter")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"key": "x"}'])
def test_damaged_manifest(tmp_path, text):
    (tmp_path / "orders.json").write_text(text)
    with pytest.raises(ValueError, match="orders.json: file must hold key, mode and improve"):
        load_orders(tmp_path, network(), "crossfilter")


@pytest.mark.parametrize(
    "weight, mode, message",
    [
        (torch.ones(3, 2, 3, 3), "random", "mode must be one of .* got 'random'"),
        (torch.ones(3), "infilter", r"weights\[0\] must be \[C_out, C_in, ...\] floating point, got \[3\]"),
        (torch.ones(3, 2, 0, 3), "infilter", r".* got \[3, 2, 0, 3\]"),
        (torch.full((3, 2, 3, 3), torch.nan), "crossfilter", r"weights\[0\] must be finite, got 54 values"),
    ],
)
def test_orders_refuse(weight, mode, message):
    with pytest.raises(ValueError, match=f"nern orders: {message}"):
        network_orders([weight], mode)


def test_orders_show_progress(capsys):
    network_orders(network(), "infilter", progress=True)
    total = sum(shape[0] * shape[1] for shape in SHAPES)
    assert "infilter orders: 100%" in (text := capsys.readouterr().err) and f"{total}/{total}" in text
    network_orders(network(), "infilter")
    assert capsys.readouterr().err == ""


def test_orders_of_a_faster_process_stay(tmp_path, monkeypatch):
    weights = [torch.randn(4, 3, 3, 3)]
    orders, replace = network_orders(weights, "infilter"), os.replace

    def replace_second(source, target):
        shutil.copytree(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_second)
    save_orders(tmp_path / "orders", orders, weights, "infilter")
    found = load_orders(tmp_path / "orders", weights, "infilter")
    assert all(torch.equal(x, y) for x, y in zip(found[0], orders[0], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["orders"]


def test_orders_that_cannot_be_written_are_one_sentence(tmp_path):
    weights = [torch.randn(4, 3, 3, 3)]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="nern orders: folder must be on a disk with room, got '.*/file/orders'"):
        save_orders(tmp_path / "file/orders", network_orders(weights, "infilter"), weights, "infilter")
