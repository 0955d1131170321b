"""A teacher for images that are not those that its checkpoint was trained on: CIFAR-10 as JPEGs, for one.

python experiments/nern_teacher.py --weights resnet20-12fca82f.th --data cifar10 --out runs/teacher20

Networks trained on lossless images lose ten points on images compressed at quality 75. A few epochs on the training
images bring most of them back. With --smoothness 1e-4 neighbouring kernels are also made alike, as in the published
regularisation of originals.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastws.devices import fast_format
from fastws.files.atomic import write_json, write_tensors
from fastws.nern.images import ImageSet, open_images
from fastws.nern.losses import SMOOTHNESS
from fastws.nern.teachers import load_teacher
from fastws.runs import processes
from fastws.runs.begun import plain
from fastws.terminal import one_sentence
from fastws.train import loop


@dataclass(frozen=True, kw_only=True)
class Config(loop.Config):
    """Goes on training a network on the images of a data set."""

    weights: str  # checkpoint to begin with
    data: str  # images: a folder of CIFAR-10, for one

    architecture: str = "cifar-resnet20-a"
    smoothness: float = 0.0  # factor of the smoothness of kernels, which is taken from the loss
    smooth: Literal["cosine", "distance"] = "cosine"  # what smoothness is
    smoke: bool = False  # a few images and steps, to see that everything works; its numbers mean nothing

    steps: int = 7040  # 20 epochs of 45,000 images
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-2
    eval_every: int = 704


SMOKE = {"steps": 2, "batch_size": 4, "eval_every": 2}


def run(config: Config) -> dict[str, float]:
    config = replace(config, **SMOKE) if config.smoke else config
    with processes.join(config.device) as device:
        images = open_images(config.data, limit=64 if config.smoke else None)
        network = load_teacher(config.architecture, config.weights).requires_grad_(True)
        network = network.to(device, memory_format=fast_format(network))
        results = {"test accuracy before": accuracy(network, images, "test", device)}
        network.train()
        loop.train(
            config,
            model=network,
            optimizer=loop.adamw(network, config),
            batch=lambda step: images.labelled_batch(config.batch_size, config.seed, step, device),
            loss=lambda model, batch: losses(config, model, *batch),
            evaluate=lambda model: {"accuracy": torch.tensor(accuracy(model, images, "val", device))},
        )
        network.eval()
        results |= {f"{part} accuracy": accuracy(network, images, part, device) for part in ("val", "test")}
        tensors = {name: x.contiguous() for name, x in network.state_dict().items()}
        write_tensors(Path(config.out, "teacher.safetensors"), tensors)
        write_json(Path(config.out, "results.json"), plain(config) | results)
    print(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
    print(f"teacher: {Path(config.out, 'teacher.safetensors')}")
    return results


def losses(config: Config, network: nn.Module, images: Tensor, labels: Tensor) -> loop.Metrics:
    loss = cross_entropy(network(images), labels)
    metrics = {"cross_entropy": loss}
    if config.smoothness:
        layers = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
        metrics["smoothness"] = SMOOTHNESS[config.smooth](layers)
        loss = loss - config.smoothness * metrics["smoothness"]
    return metrics | {"loss": loss}


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageSet, part: str, device: torch.device) -> float:
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in images.batches(part, 500, device))
    return right / len(images.parts[part].labels)


if __name__ == "__main__":
    with one_sentence("nern_teacher"):
        run(tyro.cli(Config))
