from itertools import permutations, product

import pytest
import torch
from torch import nn

import fastws
from fastws.matching.packing import packing_of
from fastws.ops.matched_distance import matched_distance_reference
from fastws.symmetry.symmetry import Symmetry
from fastws.testing import devices, implementations
from fastws.zoo.making.architectures import build


def cnn():
    network = build("digits-cnn", (1, 8, 8), activation="tanh")
    return fastws.Layout.from_checkpoint(network), Symmetry.trace(network, torch.zeros(1, 1, 8, 8))


def perceptron(widths=(3, 4, 3, 2)):
    layers = [nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)]
    network = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])
    return fastws.Layout.from_checkpoint(network), Symmetry.trace(network, torch.zeros(1, widths[0])), network


def flip(network, signs):
    """A perceptron with hidden units multiplied by -1: their rows and biases, and the columns that read them."""
    linears = [module for module in network if isinstance(module, nn.Linear)]
    for before, after, sign in zip(linears[:-1], linears[1:], signs, strict=True):
        before.weight.data *= sign[:, None]
        before.bias.data *= sign
        after.weight.data *= sign


def distances(packing, queries, references, candidates, flips=False, function=torch.ops.fastws.matched_distance):
    marks = [torch.full((len(x),), flips) for x in (queries, references)]
    packed = packing.pack(queries), packing.pack(references)
    return function(*packed, candidates, *marks, packing.groups, packing.parts, packing.once)


def example(flips, count=5):
    layout, symmetry = cnn()
    packing = packing_of(symmetry, layout, (flips,) * len(symmetry.sizes))
    generator = torch.Generator().manual_seed(0)
    queries, references = (torch.randn(n, layout.num_weights, generator=generator) for n in (count, 4))
    queries[0] = symmetry.permute(references[1:2], symmetry.random(1, seed=3), layout)[0]
    candidates = torch.randint(0, 4, (count, 3), generator=generator)
    candidates[0] = torch.tensor([1, 0, 1])
    marks = torch.ones(count, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    packed = packing.pack(queries), packing.pack(references)
    return (*packed, candidates, *marks, packing.groups, packing.parts, packing.once)


@pytest.mark.parametrize("name, function, device", implementations("matched_distance"))
@pytest.mark.parametrize("flips", [False, True])
def test_matched_distance_is_the_reference(name, function, device, flips):
    args = [x.to(device) for x in example(flips)]
    torch.testing.assert_close(function(*args), matched_distance_reference(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flips", [False, True])
def test_moved_copies_are_found(flips):
    """A permuted, flipped and hardly disturbed copy is no distance away; without matching it is far."""
    layout, symmetry, network = perceptron((6, 12, 10, 3))
    packing = packing_of(symmetry, layout, (flips, flips))
    original = layout.flatten(network)
    if flips:
        flip(network, [torch.randn(12).sign(), torch.randn(10).sign()])
    moved = symmetry.permute(layout.flatten(network)[None], symmetry.random(1, seed=1), layout)
    moved = moved + 1e-4 * torch.randn_like(moved)
    others = torch.randn(20, layout.num_weights)
    references = torch.cat([others[:7], original[None], others[7:]])
    found = distances(packing, moved, references, torch.arange(21)[None], flips)[0]
    assert found.argmin() == 7 and found[7].sqrt() < 1e-3 * original.norm()
    assert (moved[0] - original).norm() > 0.5 * original.norm()


def test_smallest_distance_of_all_group_elements():
    """Of a network of 3, 2 and 2 units all 2! permutations and 2^2 signs are tried; local search finds the best one."""
    layout, symmetry, network = perceptron((3, 2, 2))
    packing = packing_of(symmetry, layout, (True,))
    generator = torch.Generator().manual_seed(1)
    queries, references = (torch.randn(6, layout.num_weights, generator=generator) for _ in range(2))
    found = distances(packing, queries, references, torch.arange(6).repeat(6, 1), True)
    for row, column in product(range(6), range(6)):
        best = torch.inf
        for order, signs in product(permutations(range(2)), product((-1.0, 1.0), repeat=2)):
            network.load_state_dict(layout.unflatten(references[column]))
            flip(network, [torch.tensor(signs)])
            element = torch.tensor([order], dtype=torch.int32)
            moved = symmetry.permute(layout.flatten(network)[None], symmetry.expand(element), layout)
            best = min(best, (queries[row] - moved[0]).double().square().sum().item())
        assert found[row, column].item() == pytest.approx(best, rel=1e-5)


def test_without_flips_it_is_weight_matching():
    """The distance after fastws' own matching of whole networks, which is the same algorithm."""
    layout, symmetry = cnn()
    packing = packing_of(symmetry, layout)
    generator = torch.Generator().manual_seed(2)
    queries, references = (torch.randn(4, layout.num_weights, generator=generator) for _ in range(2))
    found = distances(packing, queries, references, torch.arange(4)[:, None])[:, 0]
    start = (queries - references).double().square().sum(1)
    assert (found < start).all()
    for row in range(4):
        rows = fastws.matching.match.match(references[row : row + 1], queries[row], symmetry, layout)
        moved = symmetry.permute(references[row : row + 1], rows, layout)[0]
        expected = (queries[row] - moved).double().square().sum()
        assert found[row].item() == pytest.approx(expected.item(), rel=0.02)  # sweeps meet groups in the same order


def test_packed_networks_keep_their_norm():
    layout, symmetry = cnn()
    packing = packing_of(symmetry, layout)
    flat = torch.randn(3, layout.num_weights)
    torch.testing.assert_close((packing.pack(flat) * packing.once).norm(dim=1), flat.norm(dim=1))


def test_networks_with_concatenations_are_refused():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = (3, 4), (3, 5), (9, 4), (4, 2)
            self.a, self.b, self.c, self.d = (nn.Linear(*pair) for pair in sizes)

        def forward(self, x):
            return self.d(self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).relu())

    network = Joined()
    symmetry = Symmetry.trace(network, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="packing: groups must be whole axes"):
        packing_of(symmetry, fastws.Layout.from_checkpoint(network))


@pytest.mark.parametrize("device", devices())
def test_matched_distance_opcheck(device):
    args = [x.to(device) for x in example(True)]
    torch.library.opcheck(torch.ops.fastws.matched_distance.default, tuple(args))
    leaf = args[0].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="matched_distance: weights are data"):
        torch.ops.fastws.matched_distance(leaf, *args[1:]).sum().backward()


def test_matched_distance_names_the_wrong_argument():
    queries, references, candidates, first, second, *tables = example(False)
    with pytest.raises(ValueError, match=r"queries must be \[B, .*\] float32 on one device, got .* torch.float64"):
        fastws.matched_distance(queries.double(), references, candidates, *tables)
    with pytest.raises(ValueError, match=r"candidates must be \[5, K\] int64"):
        fastws.matched_distance(queries, references, candidates.int(), *tables)
    with pytest.raises(ValueError, match=r"query_flips must be \[5\] bool, got \[4\]"):
        fastws.matched_distance(queries, references, candidates, *tables, query_flips=first[1:])
    if "matched_distance" in fastws._native.COMPILED["cpu"]:
        with pytest.raises(RuntimeError, match=r"candidates must be in \[0, 4\), got [4-7]"):
            fastws.matched_distance(queries, references, candidates + 4, *tables)
