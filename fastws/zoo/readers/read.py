"""``fastws zoo read``: other people's populations of networks as zoo folders."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastws.files.torch_file import TorchFile
from fastws.files.values import Refused
from fastws.layout.layout import Layout
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.given import trace_network
from fastws.zoo.readers.checkpoints import find_repositories, read_checkpoints, read_hub
from fastws.zoo.readers.collect import ReadOptions
from fastws.zoo.readers.names import Expected
from fastws.zoo.readers.pickled import find_parts, read_pickle
from fastws.zoo.readers.ray import find_trials, read_ray
from fastws.zoo.readers.reasons import REASONS
from fastws.zoo.readers.record import REPORT, Bad, read_report
from fastws.zoo.readers.states import Like
from fastws.zoo.readers.unterthiner import METRICS, WEIGHTS, read_unterthiner

Kind = Literal["ray", "pickle", "checkpoints", "hub", "unterthiner"]
MAX_NAMED, MAX_SKIPPED = 3, 20  # bad states per reason, and skipped folders, that are printed


@dataclass(frozen=True, kw_only=True)
class Config:
    """Reads a population of networks into a zoo folder; the same command resumes one that was stopped.

    fastws zoo read --paths tune_zoo_mnist --out zoos/published
    fastws zoo read --paths checkpoints --architecture cifar-resnet20-a --image-shape 3 32 32 --out zoos/resnets
    """

    paths: tuple[str, ...]  # folders or files; several raw zoos or checkpoints become one zoo
    out: str  # zoo folder to write

    kind: Kind | Literal["auto"] = "auto"  # ray: raw model zoos; pickle: a file of data sets; auto: by content
    epochs: tuple[int, ...] = ()  # to read from raw zoos; by default all
    properties: tuple[str, ...] = ()  # to read from raw zoos; by default all
    like: str | None = None  # checkpoint that gives the architecture; by default the first that is readable
    key: str | None = None  # under which torch files hold the network; by default the only or the usual one
    architecture: str | None = None  # instead of like: that of zoo make, or module:function; gives the zoo a symmetry
    image_shape: tuple[int, int, int] = (1, 28, 28)  # channels, height and width that the architecture takes
    num_classes: int = 10  # logits of the architecture, if it is one of zoo make
    activation: str | None = None  # of all networks, a property from then on; that of tanh and its kin allows signs
    model: Literal["file", "folder"] = "file"  # what one network is in a folder of checkpoints
    layout: Literal["fixed", "reference"] = "fixed"  # of Unterthiner zoos; reference: tensors at the published offsets
    on_bad: Literal["drop", "raise"] = "drop"  # leave states out that are damaged or not finite, or stop
    threshold: float = float("inf")  # states with a larger weight are bad
    threads: int = 0  # that read files; 0: one per processor core

    def __post_init__(self):
        if not self.paths:
            raise ValueError("zoo read: --paths must name at least one folder or file, got none")
        if self.architecture is not None and self.like is not None:
            raise ValueError(f"zoo read: --like must be left out where --architecture is given, got {self.like!r}")
        ReadOptions(self.on_bad, self.threshold, self.threads)

    def options(self) -> tuple[Like | None, ReadOptions]:
        """What the networks are like, and what all readers have in common."""
        like, symmetry = self.like, None
        if self.architecture is not None:
            network, symmetry = trace_network(
                self.architecture, self.image_shape, self.num_classes, self.activation or "relu"
            )
            like = Expected(Layout.from_checkpoint(network), f"--architecture {self.architecture}")
        given = {"symmetry": symmetry, "activation": self.activation, "key": self.key}
        return like, ReadOptions(self.on_bad, self.threshold, self.threads, **given)


def read(config: Config) -> Zoo:
    """Reads what ``config.paths`` are, recognised by their content if no kind is given.

    Raises:
        FileNotFoundError: If a path is not there.
        ValueError: If there is nothing to read, or a kind needs one path and several are given.
    """
    kind = recognise(config.paths) if config.kind == "auto" else config.kind
    like, options = config.options()
    if kind == "ray":
        chosen = {"epochs": config.epochs or None, "properties": config.properties or None}
        return read_ray(config.paths, config.out, **chosen, like=like, options=options)
    if kind == "checkpoints":
        return read_checkpoints(config.paths, config.out, model=config.model, like=like, options=options)
    if kind == "hub":
        return read_hub(config.paths, config.out, like=like, options=options)
    if len(config.paths) > 1:
        raise ValueError(f"zoo read: --paths must be one for {kind}, got {len(config.paths)}")
    if kind == "pickle":
        return read_pickle(config.paths[0], config.out, like=like, options=options)
    return read_unterthiner(config.paths[0], config.out, layout=config.layout, options=options)


def recognise(paths: Sequence[str | os.PathLike]) -> Kind:
    """The kind of the first path.

    Raises:
        FileNotFoundError: If it is not there.
    """
    path = Path(paths[0])
    if not path.exists():
        raise FileNotFoundError(f"{path}: source must be a folder or a file, got nothing")
    if path.is_file():
        return "pickle" if holds_data_sets(path) else "checkpoints"
    if (path / WEIGHTS).is_file() and (path / METRICS).is_file():
        return "unterthiner"
    if find_trials(path):
        return "ray"
    return "hub" if find_repositories(path) else "checkpoints"


def holds_data_sets(path: Path) -> bool:
    if path.suffix not in (".pt", ".pth"):
        return False
    try:
        return bool(find_parts(TorchFile(path).content))
    except Refused as refused:
        return refused.published  # the reader of data sets says why
    except ValueError:
        return False  # the reader of checkpoints says what is wrong with it


def run(config: Config) -> None:
    with warnings.catch_warnings():
        # of torch, about files that it refuses anyway; they would break the progress bar
        warnings.filterwarnings("ignore", "Detected pickle protocol|'torch.load' received a zip file")
        zoo = read(config)
    print(f"{zoo.path}: {zoo!r}")
    report = read_report(zoo.path)
    if told := report.told():
        print(f"{'; '.join(told)}; {zoo.path / REPORT} names them")
    for path, reason in report.skipped[:MAX_SKIPPED]:
        print(f"  skipped: {path}: {reason}")
    if len(report.skipped) > MAX_SKIPPED:
        print(f"  skipped: {len(report.skipped) - MAX_SKIPPED:,} more, which {zoo.path / REPORT} names")
    for line in explain(report.bad):
        print(line)


def explain(bad: Sequence[Bad]) -> Iterator[str]:
    """Why states were left out, reason by reason, with the first few of each."""
    by_reason: dict[str, list[Bad]] = {}
    for entry in bad:
        by_reason.setdefault(entry.reason.partition(":")[0], []).append(entry)
    for reason, entries in by_reason.items():
        yield f"  {len(entries):,} {reason}: {REASONS.get(reason, 'a reason of another version')}"
        for entry in entries[:MAX_NAMED]:
            details = entry.reason.partition(": ")[2]
            yield f"    {entry.state}: {details}" if details else f"    {entry.state}"
