"""Presets: the grids of the published model zoos (arXiv 2209.14764, its code and section 3), and one of digits.

A preset gives ``fastws zoo make`` a value for every option that is not given. A *seed* zoo has one combination of
hyperparameters and 1,000 seeds; a *hyp* zoo has all combinations of a grid with ten seeds each, which are 1 to 10
(``-fix``) or drawn for each network (``-rand``). Seed zoos have the initial weights and the orders of the published
code. Where a generator of a hyp zoo has a transform that its networks cannot take (SVHN), that of the seed zoo stands
here.
"""

from typing import Literal

DIGITS = {
    "data": "digits",
    "gray": False,
    "crop": 0,
    "resize": 0,
    "mean": (),
    "std": (),
    "validation": 287,  # a fifth of the training images
    "architecture": "digits-cnn",
    "networks": 240,
    "epochs": 25,
    "batch_size": 32,
    "sampling": "random",
    "activations": ("tanh", "relu", "gelu", "sigmoid"),
    "dropouts": (0.0,),
    "inits": ("kaiming_uniform", "kaiming_normal", "xavier_uniform", "normal"),
    "optimizers": ("adam", "momentum"),
    "lrs": (1e-2, 3e-3, 1e-3, 3e-4),
    "weight_decays": (0.0, 1e-3),
    "schedule": "constant",
    "augment": "none",
    "seed": 0,
    "order": "seeded",
    "train_metrics": "evaluated",
}
PUBLISHED = DIGITS | {"data": "", "epochs": 50, "batch_size": 10, "sampling": "grid", "seed": 1}
PUBLISHED |= {"order": "published", "train_metrics": "running"}
HALF = {"mean": (0.5,), "std": (0.5,)}
MNIST_PIXELS = {"mean": (0.1307,), "std": (0.3081,)}
IMAGES = {  # data set and size of the network: what its networks see
    "mnist-s": MNIST_PIXELS | {"architecture": "cnn-s", "validation": 10_000},
    "fmnist-s": HALF | {"architecture": "cnn-s", "validation": 10_000},
    "svhn-s": HALF | {"architecture": "cnn-s", "validation": 13_257, "gray": True, "crop": 28},
    "usps-s": MNIST_PIXELS | {"architecture": "cnn-s", "validation": 1_291, "resize": 28},
    "cifar10-s": HALF | {"architecture": "cnn-s", "validation": 8_000, "resize": 28},
    "cifar10-l": HALF | {"architecture": "cnn-l", "validation": 8_000},
    "stl10-s": HALF | {"architecture": "cnn-s", "validation": 800, "resize": 28},
    "stl10-l": HALF | {"architecture": "cnn-l", "validation": 800, "resize": 32},
}
SEEDS = {  # data set and size: activation, init, learning rate and weight decay of its seed zoo, all of them by Adam
    "mnist-s": ("tanh", "uniform", 3e-4, 0.0),
    "fmnist-s": ("tanh", "uniform", 3e-4, 0.0),
    "svhn-s": ("tanh", "uniform", 3e-3, 0.0),
    "usps-s": ("tanh", "uniform", 3e-4, 1e-3),
    "cifar10-s": ("gelu", "kaiming_uniform", 1e-4, 1e-2),
    "cifar10-l": ("gelu", "kaiming_uniform", 1e-4, 1e-2),
    "stl10-s": ("tanh", "kaiming_uniform", 1e-4, 1e-3),
    "stl10-l": ("tanh", "kaiming_uniform", 1e-4, 1e-3),
}
BOTH, LRS, STRONG = ("adam", "momentum"), (1e-3, 1e-4), (1e-2, 1e-3)
HYPERPARAMETERS = {  # data set and size: dropouts, optimizers, learning rates and weight decays of its hyp zoos
    "mnist-s": ((0.0, 0.5), BOTH, LRS, (1e-3, 1e-4)),
    "fmnist-s": ((0.0, 0.5), BOTH, LRS, (1e-3, 1e-4)),
    "svhn-s": ((0.0, 0.3, 0.5), ("momentum",), (1e-2, 1e-3, 1e-4), (0.0, 1e-3, 1e-1)),
    "usps-s": ((0.0, 0.5), BOTH, LRS, STRONG),
    "cifar10-s": ((0.0, 0.5), BOTH, (1e-3,), STRONG),
    "cifar10-l": ((0.0, 0.5), BOTH, (1e-3,), STRONG),
    "stl10-s": ((0.0, 0.5), BOTH, LRS, STRONG),
    "stl10-l": ((0.0, 0.5), BOTH, LRS, STRONG),
}
NETWORKS_PER_COMBINATION = 10
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
CIFAR10 = {  # the published pixels are from 0 to 255
    "mean": tuple(x / 255 for x in (125.3, 123.0, 113.9)),
    "std": tuple(x / 255 for x in (63.0, 62.1, 66.7)),
}
RESNETS = {  # images, images held out, augmentation, largest learning rate, batch size, epochs
    "cifar10-resnet18": (CIFAR10, 10_000, "crop-flip", 0.05, 256, 50),
    "cifar100-resnet18": (CIFAR100, 10_000, "crop-flip", 0.1, 128, 60),
    "tiny-imagenet-resnet18": (IMAGENET, 0, "flip-rotate", 0.1, 128, 60),
}


def seed_zoo(name: str) -> dict:
    activation, init, lr, weight_decay = SEEDS[name]
    one = {"activations": (activation,), "inits": (init,), "optimizers": ("adam",), "lrs": (lr,)}
    return PUBLISHED | IMAGES[name] | one | {"weight_decays": (weight_decay,), "networks": 1000}


def hyp_zoo(name: str, sampling: str) -> dict:
    grid = dict(zip(("dropouts", "optimizers", "lrs", "weight_decays"), HYPERPARAMETERS[name], strict=True))
    grid["activations"] = ("tanh", "relu", "sigmoid", "gelu")
    grid["inits"] = ("uniform", "normal", "kaiming_uniform", "kaiming_normal")
    networks = NETWORKS_PER_COMBINATION
    for choices in grid.values():
        networks *= len(choices)
    # half of its networks have dropout, whose published masks take longer to draw than the network to train
    return PUBLISHED | IMAGES[name] | grid | {"sampling": sampling, "networks": networks, "order": "seeded"}


def resnet_zoo(name: str) -> dict:
    pixels, validation, augment, lr, batch_size, epochs = RESNETS[name]
    one = {"activations": ("relu",), "inits": ("kaiming_uniform",), "optimizers": ("momentum",), "lrs": (lr,)}
    one |= {"architecture": "resnet18", "weight_decays": (5e-4,), "schedule": "one-cycle", "augment": augment}
    # batches of these come from another loader, whose workers also draw the augmentation
    size = {"validation": validation, "batch_size": batch_size, "epochs": epochs, "order": "seeded"}
    return PUBLISHED | pixels | one | size | {"networks": 1000}


PRESETS = {"digits": DIGITS}
for name in IMAGES:
    PRESETS[f"{name}-seed"] = seed_zoo(name)
    PRESETS[f"{name}-hyp-fix"] = hyp_zoo(name, "grid")
    PRESETS[f"{name}-hyp-rand"] = hyp_zoo(name, "grid-random-seeds")
for name in RESNETS:
    PRESETS[f"{name}-seed"] = resnet_zoo(name)
Preset = Literal[*PRESETS]
