"""ResNet-20 stored in NeRNs of three widths: what it costs, and what order does (arXiv 2212.13554, CIFAR-10).

python experiments/nern_resnet20_cifar10.py --weights runs/teacher20/teacher.safetensors --images cifar10

--weights is a checkpoint of akamaster/pytorch_resnet_cifar10 or, for JPEG images, what nern_teacher.py makes of it.
"""

import tyro
from nern_study import Config, run

from fastws.terminal import one_sentence

PRESET = Config(
    weights=tyro.MISSING,
    architecture="cifar-resnet20-a",
    preset="cifar10-resnet20",
    hidden=(160, 180, 200),
    curve_hidden=180,
    out="runs/nern-resnet20",
)

if __name__ == "__main__":
    with one_sentence("nern_resnet20_cifar10"):
        run(tyro.cli(Config, default=PRESET))
