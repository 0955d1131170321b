"""What ``fastws train nern`` refuses, each with one sentence, and nothing half done."""

from dataclasses import replace

import pytest
import torch
from damages import damaged
from test_nern_train import CONFIG, CPU, NOTHING, make_images, make_teacher, train
from torch import nn

from fastws.nern.checkpoint import load_nern
from fastws.nern.layers import find_layers
from fastws.nern.orders import network_orders, save_orders
from fastws.train.nern import train as nern


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden": 0}, "train nern: hidden must be at least 1, got 0"),
        ({"kernel_batch": 0}, "train nern: kernel_batch must be at least 1, got 0"),
        ({"warmup": -1}, "train nern: warmup must be at least 0, got -1"),
        ({"feature_weight": -1.0}, "train nern: feature_weight must be at least 0, got -1.0"),
        ({"images": None}, "train nern: images must be given to distil on, or --data-free, or both weights 0"),
        ({"reconstruction_weight": 0.0, **NOTHING}, "a loss must be on in each step, got weights that are 0 in step 0"),
        ({"reconstruction_weight": 0.0, "warmup": 1}, "must be on in each step, got weights that are 0 in step 0"),
        ({"objective": "phases", "warmup": 1, **NOTHING}, "must be on in each step, got weights that are 0 in step 9"),
        ({"order": "none", "orders": "x"}, "train nern: orders must be left out with the order none, got 'x'"),
        (
            {"improve": True, "orders": "x"},
            "train nern: improve must be off with orders that were made before, got both",
        ),
        ({"distillation_weight": float("nan")}, "train nern: distillation_weight must be at least 0, got nan"),
        ({"weight_decay": -1.0}, "train nern: weight_decay must be at least 0, got -1.0"),
        ({"image_size": 0}, "train nern: image_size must be positive, or left out, got 0"),
        ({"clip_each": -1.0}, "train nern: clip_each must be positive, or left out, got -1.0"),
        ({"clip_value": 0.0}, "train nern: clip_value must be positive, or left out, got 0.0"),
        ({"levels": 0}, "NeRN: levels must be positive, got 0"),
        ({"preset": "resnet20"}, "train nern: preset must be one of cifar10-resnet20-140|160|180|200-none"),
    ],
)
def test_bad_numbers_are_one_sentence(fields, message):
    with pytest.raises(ValueError) as caught:
        replace(CONFIG, **fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_architecture_or_preset_must_be_given():
    with pytest.raises(ValueError, match="train nern: hidden must be given, or a preset, got neither"):
        nern.Config(out="x", weights="y", architecture="resnet18", data_free=True)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = make_teacher()

    def forward(self, x, y):
        return self.network(x + y)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = make_teacher()

    def forward(self, x):
        return self.network(x), x


def colourless():
    network = make_teacher()
    network.conv1 = nn.Conv2d(1, 4, 3)
    return network


@pytest.mark.parametrize(
    "network, fields, message",
    [
        (colourless, {}, r"network must take images \[3, 8, 8\], got .* expected input.* to have 1 channels"),
        (TwoInputs, {}, r"network must take images \[3, 8, 8\], got .*missing 1 required positional argument: 'y'"),
        (Pair, {}, r"network must give logits \[B, 5\], got tuple"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), {}, r"must give logits \[B, 5\], got \[1, 4\]"),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), {}, "must have activations for its feature maps"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {"linear": True}, r"logits \[B, 5\], got \[1, 4\]"),
        (make_teacher, {"linear": True, "learn_classifier": True}, "exclude must name linear, which is learned as it"),
    ],
)
def test_networks_that_do_not_fit_the_images_are_one_sentence(tmp_path, network, fields, message):
    config = replace(CONFIG, out=str(tmp_path), order="none", **fields)
    with pytest.raises(ValueError, match=message):
        nern.train(config, network(), make_images(), CPU)


def test_folder_must_be_writable_before_anything_is_computed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="train: out must be a folder that can be written"):
        train(tmp_path / "file")


def test_bad_networks_are_one_sentence(tmp_path):
    teacher = make_teacher()
    teacher.conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="nern: conv1.weight must be finite, got 1 values that are NaN or infinite"):
        nern.train(replace(CONFIG, out=str(tmp_path)), teacher, make_images(), CPU)
    with pytest.raises(ValueError, match="network must have 2-d convolutions, got none"):
        nern.train(replace(CONFIG, out=str(tmp_path)), nn.Linear(3, 4), make_images(), CPU)
    weights = [torch.randn(layer.shape) for layer in find_layers(make_teacher())]
    save_orders(tmp_path / "orders", network_orders(weights, "crossfilter"), weights, "crossfilter")
    with pytest.raises(ValueError, match="these are orders of other weights, so make them anew"):
        train(tmp_path / "run", orders=str(tmp_path / "orders"))
    with pytest.raises(ValueError, match=r"NeRN: layers.0.weight must be \[24, 240\], got \[8, 240\]; was it of anoth"):
        train(tmp_path / "run", init=str(save_other_preset(tmp_path)))
    with pytest.raises(ValueError, match="file must be a checkpoint of fastws train nern, got"):
        load_nern(save_other_preset(tmp_path))


def save_other_preset(folder):
    torch.save({"layers.0.weight": torch.zeros(8, 240)}, folder / "other.pth")
    return folder / "other.pth"


def test_checkpoints_from_strangers_are_refused_or_harmless(tmp_path):
    train(tmp_path, steps=1)
    path, refused = tmp_path / "strange.pt", 0
    whole = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    plain = {name: value for name, value in whole["extra"].items() if name != "rows"}
    for place, value, broken in damaged(plain):
        torch.save({"model": whole["model"], "extra": broken | {"rows": whole["extra"]["rows"]}}, path)
        try:
            model, stored, _ = load_nern(path)
            stored.weights(model()[stored.rows])
        except ValueError as error:
            assert "\n" not in str(error), (place, value)
            refused += 1
    assert refused > 300
