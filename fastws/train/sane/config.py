"""What is pretrained, and how: the options of ``fastws train sane``, and what each size gives them."""

from dataclasses import dataclass
from typing import Any, Literal

from fastws.layout.entries import Span
from fastws.layout.moments import Statistic
from fastws.nn.sane import Positions
from fastws.train import loop
from fastws.train.sane.behaviour import QueriesFrom

STEPS = 10_000  # unless passes say otherwise
# what a size gives every option that is not given; 10,000 steps are about the 50 published passes over 7,000 windows
COMMON: dict[str, Any] = {"batch_size": 32, "lr": 1e-4, "clip": None, "cycle": 1.0, "precision": "auto"}
COMMON |= {"statistic": "std", "permute": "second", "noise": 0.1, "gamma": 0.05, "normalize": "none"}
COMMON |= {"passes": None, "windows": "random", "max_positions": None}
MULTIZOO = {"lr": 2e-5, "statistic": "none", "normalize": "batch", "passes": 60 * 50}
MULTIZOO |= {"max_positions": (60_000, 150, 600)}
# the rate's cycle is made for 10,000 passes, of which the first 100 or 600 are trained
WEIGHTCLIP = {"lr": 1e-3, "clip": 1.0, "precision": "bf16", "permute": "none", "noise": 0.0, "gamma": 0.0}
WEIGHTCLIP |= {"normalize": "batch", "windows": "covering"}
OPTIONS: dict[str, dict[str, Any]] = {
    "tiny": COMMON,
    "small": COMMON,
    "cnn": COMMON,
    "resnet18": COMMON,
    "multizoo": COMMON | MULTIZOO,
    "weightclip": COMMON | WEIGHTCLIP | {"passes": 100, "cycle": 100.0},
    "weightclip-cnn": COMMON | WEIGHTCLIP | {"batch_size": 240, "passes": 600, "cycle": 10_000 / 600},
}
Size = Literal["tiny", "small", "cnn", "resnet18", "multizoo", "weightclip", "weightclip-cnn"]
Normalize = Literal["none", "masked", "token", "window", "batch"]


@dataclass(frozen=True, kw_only=True)
class Config(loop.Config):
    """Pretrains SANE on zoos, or a folder of models. The published code runs with --permute none --shared-window.

    fastws train sane --zoo zoos/digits --aligned --steps 2000 --out runs/sane
    fastws train sane --hub models --steps 2000 --out runs/hub
    """

    zoo: tuple[str, ...] = ()  # folders of zoos, which may be of several architectures
    hub: str | None = None  # in place of zoos, a folder of safetensors files of any architectures, read in place
    epochs: tuple[int, int] | None = None  # first and last epoch of the states to train on; all by default
    aligned: bool = False  # networks in the order that fastws zoo align found; views permute them from there
    memory: float | None = None  # gigabytes that networks may take; more are read as needed; by default half of all
    shard: bool = False  # under torchrun: each process holds a part of the model, for one that fits no GPU

    size: Size = "small"  # of the model, with options; all but the first two are published
    width: int | None = None  # of the transformers; by default that of the size
    heads: int | None = None  # of the attention; by default those of the size
    depth: int | None = None  # blocks of the encoder, and of the decoder; by default those of the size
    latent: int | None = None  # entries per token embedding; by default those of the size
    window: int | None = None  # tokens per training sample; by default those of the size
    dropout: float | None = None  # probability of dropout in the model; by default that of the size
    positions: Positions | None = None  # learned, or sines, bound to no architecture; by default of the size or hub
    relative: bool = False  # positions are parts of the network, of 1024, whatever its size
    layer_types: bool = False  # whether tokens are told what kind of layer they are of
    max_positions: tuple[int, int, int] | None = None  # most tokens, layers and units; by default what the zoo has
    token_size: int | None = None  # weights per token; by default the longest row of the architectures, 288 of a hub
    norm: Literal["keep", "skip"] = "skip"  # whether norm layers have tokens
    span: Span = "row"  # what a token may span; layer: dense tokens, which rows share

    standardize: bool = True  # scale each layer's weights by a statistic of the training split; of each model of a hub
    statistic: Statistic | Literal["none"] | None = None  # std, to [-1, 1], to length 1, none; by default of the size
    permute: Literal["none", "second", "both"] | None = None  # views whose neurons are permuted at random
    flips: bool = True  # where neurons are permuted, change their signs at random too, if the network allows it
    noise: float | None = None  # std of the factors that all weights of a view are multiplied by; 0.1 by default
    additive: float = 0.0  # std of what is added to all weights of a view, after scaling
    erase: float = 0.0  # share of the weights of a view that are set to 0
    rectangle: float = 0.0  # probability with which a rectangle of each view is set to 0: tokens by entries
    target: Literal["view", "clean"] = "view"  # to reconstruct: what the encoder saw, or that without noise
    shared_window: bool = False  # windows of a batch begin at the same token
    windows: Literal["random", "covering"] | None = None  # covering: a pass sees all tokens, by windows in a row
    gamma: float | None = None  # weight of the contrastive loss; reconstruction gets 1 - gamma; 0.05 by default
    temperature: float = 0.1  # of the contrastive loss
    normalize: Normalize | None = None  # reconstruction: over entries that are there, in units of whose variance
    val_batches: int = 8  # batches per evaluation of a zoo, which always has the same windows

    behaviour: float = 0.0  # share of what networks compute in the loss of reconstruction; 0.9 as published
    queries: int = 256  # images of a step on which networks are compared with their reconstructions
    queries_from: QueriesFrom = "images"  # of the comparison: training images of the zoo, random pixels, or both
    sample_every: int | None = None  # steps between looks at networks that are sampled by then; never by default

    steps: int | None = None  # of training, those before an interruption included; by default passes, else 10,000
    passes: int | None = None  # over all networks, a window of each, in place of steps; published sizes have theirs
    batch_size: int | None = None  # samples per step, over all processes; by default that of the size
    lr: float | None = None  # peak of the one-cycle schedule; by default that of the size
    cycle: float | None = None  # length of the schedule, in runs: one of 100 ends while the rate still rises
    clip: float | None = None  # largest norm of the gradient
    precision: Literal["auto", "bf16", "fp32"] | None = None  # auto: bf16 on CUDA, fp32 elsewhere

    def __post_init__(self):
        # one folder may be given as such
        object.__setattr__(self, "zoo", (self.zoo,) if isinstance(self.zoo, str) else tuple(self.zoo))
        for name, value in OPTIONS[self.size].items():
            if getattr(self, name) is None and not (name == "passes" and self.steps is not None):
                object.__setattr__(self, name, value)
        if self.steps is None and self.passes is None:
            object.__setattr__(self, "steps", STEPS)
        if self.hub is not None and self.positions is None:
            object.__setattr__(self, "positions", "sinusoidal")
        super().__post_init__()
        if len(set(self.zoo)) < len(self.zoo) or not (self.zoo or self.hub):
            raise ValueError(f"train sane: zoo must be folders, each once, got {', '.join(self.zoo) or 'none'}")
        if self.hub is not None:
            self.check_hub()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"train sane: gamma must be in [0, 1], got {self.gamma}")
        if self.batch_size < 2:
            raise ValueError(f"train sane: batch_size must be at least 2, for contrast, got {self.batch_size}")
        for name in ("val_batches", "passes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train sane: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rectangle <= 1:
            raise ValueError(f"train sane: rectangle must be in [0, 1], got {self.rectangle}")
        if self.cycle < 1 or (self.memory is not None and self.memory < 0):
            got = f"{self.cycle} and {self.memory}"
            raise ValueError(f"train sane: cycle must be at least 1 and memory at least 0, got {got}")
        if not 0 <= self.behaviour <= 1 or self.queries < 1:
            got = f"{self.behaviour} and {self.queries}"
            raise ValueError(f"train sane: behaviour must be in [0, 1] and queries at least 1, got {got}")
        if self.sample_every is not None and self.sample_every < 1:
            raise ValueError(f"train sane: sample_every must be at least 1, got {self.sample_every}")
        if self.span == "network" and len(self.zoo) > 1:
            raise ValueError(f"train sane: span must be row or layer for {len(self.zoo)} zoos, got network")

    def check_hub(self) -> None:
        """Raises ValueError if something is asked of a folder of models that only zoos have."""
        if self.zoo:
            raise ValueError(f"train sane: hub must be left out where there are zoos, got {self.hub} and {self.zoo[0]}")
        if self.span == "network" or self.statistic not in ("std", "none"):
            got = f"{self.span} and {self.statistic}"
            raise ValueError(f"train sane: span must be row or layer, and statistic std or none, for a hub, got {got}")
        asked = {"epochs": self.epochs, "aligned": self.aligned, "behaviour": self.behaviour, "memory": self.memory}
        for name, value in (asked | {"sample_every": self.sample_every}).items():
            if value not in (None, False, 0):
                raise ValueError(f"train sane: {name} must be left out for a hub, got {value}")
