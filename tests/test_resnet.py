import pytest
import torch

from fastws.layout.layout import Layout
from fastws.nn.resnet import CIFARResNet, ResNet


@pytest.mark.parametrize(
    "depth, classes, stem, parameters",
    [  # those of the published networks
        (18, 10, "cifar", 11_173_962),
        (18, 1000, "imagenet", 11_689_512),
        (34, 1000, "imagenet", 21_797_672),
        (50, 1000, "imagenet", 25_557_032),
    ],
)
def test_resnets_have_the_published_sizes(depth, classes, stem, parameters):
    with torch.device("meta"):
        network = ResNet(depth, classes, stem)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, classes)


def test_resnets_have_the_published_names():
    with torch.device("meta"):
        names = list(ResNet(18).state_dict())
    expected = ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
    assert names[:5] == expected and names[-2:] == ["fc.weight", "fc.bias"] and len(names) == 122
    assert "layer2.0.downsample.0.weight" in names and "layer2.0.downsample.1.running_var" in names


@pytest.mark.parametrize("norm, tokens, layers", [("keep", 53_524, 81), ("skip", 39_124, 21)])
def test_resnet18_has_the_published_tokens(norm, tokens, layers):  # specs of SANE, table of token sizes
    with torch.device("meta"):
        layout = Layout.from_checkpoint(ResNet(18), 288, norm)
    assert (layout.num_tokens, len(layout.layers)) == (tokens, layers)
    assert layout.positions[-1].tolist() == [tokens - 1, layers - 1, 9]
    assert abs(layout.mask.double().mean().item() - {"keep": 0.726, "skip": 0.991}[norm]) < 0.0005


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match=r"resnet: depth must be one of \[18, 34, 50, 101, 152\], got 20"):
        ResNet(20)


@pytest.mark.parametrize(
    "depth, option, parameters", [(20, "a", 269_722), (32, "a", 464_154), (56, "a", 853_018), (110, "a", 1_727_962)]
)
def test_cifar_resnets_have_the_published_sizes(depth, option, parameters):
    with torch.device("meta"):
        network = CIFARResNet(depth, option)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_cifar_resnets_have_the_published_names():
    with torch.device("meta"):
        names = list(CIFARResNet(20, "b").state_dict())
    assert names[:2] == ["conv1.weight", "bn1.weight"] and names[-2:] == ["linear.weight", "linear.bias"]
    assert "layer2.0.shortcut.0.weight" in names and "layer3.0.shortcut.1.running_var" in names
    assert names.index("layer2.0.conv2.weight") < names.index("layer2.0.shortcut.0.weight")


def test_shortcuts_without_weights_pad_channels():
    torch.manual_seed(0)
    network = CIFARResNet(20, "a").eval()
    block, x = network.layer2[0], torch.randn(1, 16, 8, 8)
    side = torch.zeros(1, 32, 4, 4)
    side[:, 8:24] = x[:, :, ::2, ::2]
    expected = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + side)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("depth, option", [(21, "a"), (20, "c")])
def test_an_unknown_cifar_resnet_is_refused(depth, option):
    with pytest.raises(ValueError, match="resnet: depth must be one of .* and option a or b, got"):
        CIFARResNet(depth, option)
