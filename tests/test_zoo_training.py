"""Networks that train together become what each becomes alone; published orders; networks that train one by one."""

from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from fastws.data.images import load
from fastws.layout.layout import Layout
from fastws.random.philox import philox_reference
from fastws.zoo.making.architectures import build, initialize
from fastws.zoo.making.large import augment
from fastws.zoo.making.minibatches import Orders
from fastws.zoo.making.recipes import Plan, Recipe, TrainingData
from fastws.zoo.making.training import Wave, minibatches

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, **options: torch.optim.SGD(p, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


pytestmark = pytest.mark.usefixtures("in_one_thread")


@pytest.fixture(scope="module")
def data():
    return TrainingData.of(load("digits", limit=150))


def digits_plan(**options):
    return Plan(
        **{"architecture": "digits-cnn", "image_shape": (1, 8, 8), "num_classes": 10, "batch_size": 32} | options
    )


def recipe(number, **options):
    default = {"activation": "tanh", "dropout": 0.0, "init": "kaiming_uniform", "optimizer": "adam"}
    return Recipe(**{"model": str(number), "seed": number, "lr": 3e-3, "weight_decay": 0.0} | default | options)


MIXED = [
    recipe(1, optimizer="sgd", lr=0.1, weight_decay=0.01),
    recipe(2, optimizer="adam", lr=0.01, weight_decay=0.1, activation="relu"),
    recipe(3, optimizer="momentum", lr=0.03, activation="gelu", dropout=0.2),
    recipe(4, optimizer="adamw", lr=3e-3, weight_decay=0.3, activation="sigmoid"),
    recipe(5, optimizer="adam", lr=1e-3, dropout=0.5),
]


def drop(x, rate, words, first_unit, units):
    """Inverted dropout with the random words of one step: that of unit u of sample b is number b * units + u."""
    kept = words.view(len(x), units)[:, first_unit : first_unit + x[0].numel()] >= round(rate * 2**32)
    return x * kept.view(x.shape) / (1 - rate)


def train_alone(recipe, data, epochs, batch_size=32):
    """The plain loop: one network, one minibatch after the other; gives the mean loss of the last epoch too."""
    network = build("digits-cnn", (1, 8, 8), activation=recipe.activation)
    initialize(network, recipe.init, recipe.seed)
    optimizer = OPTIMIZERS[recipe.optimizer](network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    function = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}.get(recipe.activation, nn.GELU())
    first, second, _, hidden, last = (m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Flatten))
    step, units = 0, 8 * 9 + 12 * 4 + 16
    for epoch in range(1, epochs + 1):
        order = torch.from_numpy(numpy.random.default_rng([recipe.seed, epoch]).permutation(len(data.train.y)))
        losses = []
        for rows in order.split(batch_size):
            words = philox_reference(recipe.seed, step, len(rows) * units, torch.device("cpu"))
            x = drop(function(first(data.train.x[rows])), recipe.dropout, words, 0, units)
            x = drop(function(second(x)), recipe.dropout, words, 72, units).flatten(1)
            x = drop(function(hidden(x)), recipe.dropout, words, 120, units)
            loss = cross_entropy(last(x), data.train.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(rows))
            step += 1
    return parameters_to_vector(network.parameters()).detach(), sum(losses) / len(data.train.y)


def train_wave(recipes, data, epochs=2, side_by_side=True, **options):
    wave = Wave(digits_plan(epochs=epochs, **options), recipes, data, side_by_side)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(epochs + 1):
            properties = wave.advance(pool)
    return wave.state, properties


@pytest.mark.parametrize("side_by_side", [True, False])
def test_training_is_that_of_each_network_alone(data, side_by_side):
    recipes = [one for one in MIXED if side_by_side or not one.dropout]  # alone, dropout is torch's
    state, properties = train_wave(recipes, data, side_by_side=side_by_side, train_metrics="running")
    for row, one, loss in zip(state[0], recipes, properties["train_loss"], strict=True):
        expected, running = train_alone(one, data, epochs=2)
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-5)
        assert float(loss) == pytest.approx(running, rel=1e-4)


def test_network_does_not_depend_on_its_neighbours(data):
    together, _ = train_wave(MIXED, data)
    reverse, _ = train_wave(MIXED[::-1], data)
    torch.testing.assert_close(reverse.flip(1), together, rtol=0, atol=1e-6)
    other, _ = train_wave([one._replace(seed=one.seed + 100) for one in MIXED], data)
    assert (other[0] - together[0]).abs().amax(1).min() > 1e-2


def test_properties_are_measured_on_the_right_images(data):
    images = load("digits", limit=150, validation=40)
    data = TrainingData.of(images)
    state, properties = train_wave([recipe(1), recipe(2)], data)
    network = build("digits-cnn", (1, 8, 8))
    layout = Layout.from_checkpoint(network)
    parts = {"train": images[:2], "val": (images.val_x, images.val_y), "test": images[2:4]}
    for place, row in enumerate(state[0]):
        network.load_state_dict(layout.unflatten(row))
        for name, (x, y) in parts.items():
            logits = network(x)
            assert float(properties[f"{name}_loss"][place]) == pytest.approx(cross_entropy(logits, y).item(), rel=1e-5)
            accuracy = float((logits.argmax(1) == y).float().mean())
            assert float(properties[f"{name}_accuracy"][place]) == pytest.approx(accuracy)
    gap = properties["train_accuracy"] - properties["test_accuracy"]
    torch.testing.assert_close(properties["generalisation_gap"], gap)


def test_network_that_diverges_harms_nobody(data):
    wild = recipe(1, optimizer="sgd", lr=0.1, weight_decay=1e9)
    tame = recipe(2, optimizer="sgd", lr=0.1)
    together, _ = train_wave([wild, tame], data, epochs=3)
    alone, _ = train_wave([tame], data, epochs=3)
    assert not together[0, 0].isfinite().all()
    torch.testing.assert_close(together[:, 1], alone[:, 0], rtol=0, atol=1e-6)


def test_minibatches_are_all_images_in_order():
    orders = torch.arange(2 * 5007).view(2, 5007)
    parts = list(minibatches(orders, 10))
    assert [tuple(part.shape) for part in parts] == [(2, 500, 10), (2, 1, 7)]
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], 1), orders)
    assert [part.shape[1] for part in minibatches(orders[:, :5000], 5)] == [500, 500]


def test_good_recipes_learn_the_digits():
    _, properties = train_wave([recipe(1), recipe(2, activation="gelu")], TrainingData.of(load("digits")), epochs=10)
    assert properties["test_accuracy"].min() > 0.93


# --- the published order


def published_orders(network, one, num_images, batch_size, epochs):
    """What the published code does, with torch's own generator: build, initialize, evaluate, train."""
    torch.manual_seed(one.seed)
    layers = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size))
        elif isinstance(layer, nn.Linear):
            layers.append(nn.Linear(layer.in_features, layer.out_features))
    for layer in layers:
        getattr(nn.init, f"{one.init}_")(layer.weight)
        layer.bias.data.fill_(0.01)
    weights = torch.cat([parameter.detach().flatten() for layer in layers for parameter in layer.parameters()])
    torch.randperm(num_images)  # the loader shuffles what is evaluated first, too
    orders, network = [], network.train()
    for _ in range(epochs):
        orders.append(torch.randperm(num_images))
        for begin in range(0, num_images, batch_size):
            network(torch.zeros(min(batch_size, num_images - begin), 1, 28, 28))
    return weights, torch.stack(orders)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_published_order(dropout):
    plan = Plan("cnn-s", (1, 28, 28), 10, 10, 3, order="published")
    one = recipe(7, init="uniform", dropout=dropout)
    network = plan.build(one.activation, one.dropout)
    weights, expected = published_orders(network, one, 47, 10, 3)
    orders = Orders(plan, [recipe(1), one], 47)
    mine = plan.build()
    orders.initialize(1, mine)
    assert torch.equal(parameters_to_vector(mine.parameters()), weights)
    assert torch.equal(orders.next(1, 1), expected[0])
    kept = orders.state
    assert torch.equal(torch.stack([orders.next(1, epoch) for epoch in (2, 3)]), expected[1:])
    resumed = Orders(plan, [recipe(1), one], 47)
    resumed.state = kept
    assert torch.equal(resumed.next(1, 2), expected[1])


def test_seeded_orders_are_permutations_of_their_own():
    orders = Orders(digits_plan(epochs=1), MIXED, 50)
    drawn = [orders.next(member, epoch) for member in range(5) for epoch in (1, 2)]
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in drawn)
    assert len({tuple(order.tolist()) for order in drawn}) == 10


# --- one by one


def test_resnet_trains_as_published():
    """Two epochs of one network, against the plain loop with torch's scheduler and the same augmentation."""
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, 8, 8, generator=random), torch.randint(10, (20,), generator=random)
    data = TrainingData.of(load("digits", limit=5))._replace(black=torch.tensor([-1.0, -2.0, -3.0]))
    data = data._replace(train=type(data.train)(x, y), test=type(data.train)(x[:10], y[:10]))
    plan = Plan("resnet18", (3, 8, 8), 10, 16, 2, "one-cycle", "crop-flip")
    one = recipe(3, activation="relu", optimizer="momentum", lr=0.05, weight_decay=5e-4)
    network = plan.build()
    initialize(network, one.init, one.seed)
    network.to(memory_format=torch.channels_last)  # other sums: after four such steps they are other weights
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, epochs=2, steps_per_epoch=2)
    for epoch in (1, 2):
        order = torch.from_numpy(numpy.random.default_rng([3, epoch]).permutation(20))
        torch.manual_seed(int(numpy.random.SeedSequence([3, epoch]).generate_state(1)[0]))
        network.train()
        for rows in order.split(16):
            images = augment(x[rows], "crop-flip", data.black).contiguous(memory_format=torch.channels_last)
            loss = cross_entropy(network(images), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    wave = Wave(plan, [one], data, side_by_side=False)
    assert wave.state.shape[1:] == (1, 11_183_562)
    before = torch.random.get_rng_state()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            properties = wave.advance(pool)
    expected = Layout.from_checkpoint(network).flatten(network.state_dict())
    torch.testing.assert_close(wave.state[0, 0], expected, rtol=0, atol=1e-6)
    accuracy = (network.eval()(x[:10]).argmax(1) == y[:10]).float().mean()
    assert float(properties["test_accuracy"]) == pytest.approx(float(accuracy))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_crops_and_flips_are_parts_of_the_image():
    x, black = torch.arange(1.0, 4 * 3 * 36 + 1).view(4, 3, 6, 6).repeat(25, 1, 1, 1), torch.tensor([-1.0, -2.0, -3.0])
    changed = augment(x, "crop-flip", black)
    framed = black.view(1, 3, 1, 1).expand(100, 3, 14, 14).clone()
    framed[:, :, 4:10, 4:10] = x
    places = set()
    for image, whole in zip(changed, framed, strict=True):
        found = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(whole[:, top : top + 6, left : left + 6], image.flip(2) if mirrored else image)
        ]
        assert found
        places.update(found[:1])
    tops, lefts, mirrors = (len(set(column)) for column in zip(*places, strict=True))
    assert tops >= 8 and lefts >= 8 and mirrors == 2


def test_turned_images_keep_their_middle_and_have_black_corners():
    x = torch.ones(64, 3, 33, 33)
    x[:, :, 16] = 5
    changed = augment(x, "flip-rotate", torch.tensor([-1.0, -2.0, -3.0]))
    assert (changed[:, :, 16, 16] == 5).all() and set(changed[:, 1].unique().tolist()) == {-2.0, 1.0, 5.0}
    ends = (changed[:, 0, :, 1] == 5).int().argmax(1) - 16  # where the line through the middle meets the border
    assert ends.min() < -2 and ends.max() > 2 and ends.abs().max() <= 6  # 15 tan 20 degrees
    assert torch.equal(augment(x, "none", torch.zeros(3)), x)
