"""The 3 x 3 convolutions of ResNet-18 stored in a NeRN: what it costs, and what order does (arXiv 2212.13554).

python experiments/nern_resnet18_imagenet.py --weights resnet18-f37072fd.pth --images imagenet

--weights is a checkpoint of torchvision or timm; --images a folder with train/<class> and val/<class>. Without images
the network is distilled on noise, as in section 4.4 of the paper, and nothing but weights is compared.
"""

import tyro
from nern_study import Config, run

from fastws.terminal import one_sentence

PRESET = Config(
    weights=tyro.MISSING,
    architecture="resnet18",
    preset="imagenet-resnet18",
    hidden=(1256,),
    curve_hidden=1256,
    curve_orders=("crossfilter", "infilter", "none"),
    image_size=224,
    out="runs/nern-resnet18",
)

if __name__ == "__main__":
    with one_sentence("nern_resnet18_imagenet"):
        run(tyro.cli(Config, default=PRESET))
