"""The 41 published configurations of NeRN, by name: "cifar10-resnet20-180-crossfilter" and the like.

What none of them changes, as the frequencies of the encoding or the optimizer's settings, is a default elsewhere.
"""

from typing import Any

CIFAR10_EPOCH = 196  # steps: 50,000 images in batches of 256
SHARED = {"batch_size": 256, "kernel_batch": 4096, "eval_every": CIFAR10_EPOCH, "greedy_window": 20, "greedy_every": 10}
IMAGENET = {
    "architecture": "resnet18",
    "sizes": (3,),
    "image_size": 224,
    "augment": "rand",
    "batch_size": 32,
    "kernel_batch": 2**16,
    "steps": 160_000,
    "feature_weight": 1e-6,
    "distillation_weight": 1e-6,
    "warmup": 20_000,
    "eval_every": 4000,
    "greedy_window": 100,
    "greedy_every": 20,
    "maps": "doubled_after",
}


def cifar(depth: int, epochs: int, weight: float, warmup: int) -> dict[str, Any]:
    steps = {"steps": epochs * CIFAR10_EPOCH, "warmup": warmup}
    return {
        "architecture": f"cifar-resnet{depth}-b",
        "feature_weight": weight,
        "distillation_weight": weight,
        **SHARED,
        **steps,
    }


GROUPS = {  # name: widths, orders, and what the group shares
    "cifar10-resnet20": ((140, 160, 180, 200), ("none", "infilter", "crossfilter"), cifar(20, 350, 1e-4, 0)),
    "cifar10-resnet56": ((240, 280, 320, 360), ("none", "infilter", "crossfilter"), cifar(56, 350, 1e-5, 10_000)),
    "cifar100-resnet56": ((320, 360, 400), ("none", "infilter", "crossfilter"), cifar(56, 450, 1e-5, 10_000)),
    "imagenet-resnet18": ((1024, 1140, 1256, 1372), ("infilter", "crossfilter"), IMAGENET),
}
PRESETS = {  # name: fields of fastws.train.nern.Config
    f"{group}-{hidden}-{order}": {"maps": "doubled", **shared, "hidden": hidden, "order": order}
    for group, (widths, orders, shared) in GROUPS.items()
    for hidden in widths
    for order in orders
}
DEFAULTS = {  # of fields for which neither a value nor a preset is given
    **SHARED,
    "architecture": None,
    "hidden": None,
    "order": "crossfilter",
    "sizes": (),
    "image_size": None,
    "augment": "crop",
    "steps": 20_000,
    "feature_weight": 1e-4,
    "distillation_weight": 1e-4,
    "warmup": 0,
    "greedy_window": 0,
    "maps": "clean",
}


def fields_of(preset: str | None) -> dict[str, Any]:
    """The fields of a configuration that a preset, or none, decides.

    Raises:
        ValueError: If there is no such preset.
    """
    if preset is None:
        return DEFAULTS
    if preset not in PRESETS:
        groups = "; ".join(
            f"{group}-{'|'.join(map(str, widths))}-{'|'.join(orders)}" for group, (widths, orders, _) in GROUPS.items()
        )
        raise ValueError(f"train nern: preset must be one of {groups}, got {preset!r}")
    return DEFAULTS | PRESETS[preset]
