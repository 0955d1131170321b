"""What ``fastws zoo compare`` is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastws.runs.begun import former_names


@former_names(zoo="train", report="out")
@dataclass(frozen=True, kw_only=True)
class Config:
    """Says whether sampled networks are new, and whether they are better than cheap baselines that are as new.

    fastws zoo compare zoos/kde30 zoos/pca64 --train zoos/mnist --out runs/compare.html
    fastws zoo compare --reports runs/compare-0 runs/compare-1 runs/compare-2 --out runs/compare

    Give samples and the zoo they were made from, or reports of several zoos, whose verdicts are then joined, or with
    --continued zoos of networks whose training went on, whose accuracies are compared epoch by epoch.
    """

    samples: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # folders of sampled networks
    out: str  # folder for report.html and results.json; or the page itself, which ends with .html
    train: str | None = None  # folder of the zoo that the samples were made from, aligned
    continued: tuple[str, ...] = ()  # zoos of networks that were trained on; others are tested against the first
    reports: tuple[str, ...] = ()  # what zoo compare wrote of samples of the same names from other zoos

    epochs: tuple[int, int] | None = None  # first and last epoch of the training states; by default all
    best: float = 1.0  # share of the training networks that are anchors, and whose accuracy held-out networks must have
    model: str | None = None  # checkpoint of train ae or train sane: reconstructed anchors are then a set as well
    baselines: bool = True  # measures noise, averages and Gaussians of principal components as well
    flow: bool = False  # also a flow in the space of principal components, of a minute for each number of components
    count: int = 200  # networks of each baseline, and held-out networks at most; samples are all looked at
    images: int = 2000  # test images, at most, that predictions are compared on
    seed: int = 0  # of the random numbers of the baselines
    json: bool = False  # print the results as JSON
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if not (self.samples or self.reports or self.continued):
            raise ValueError(
                "zoo compare: samples must name at least one folder, got none; or give --reports or --continued"
            )
        names = [Path(path).name for path in self.samples]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"zoo compare: samples must be folders of different names, got {twice[0]!r} more than once"
            )
        if (self.train is None) != (not self.samples):
            got = f"--train {self.train} and {len(self.samples)} samples"
            raise ValueError(f"zoo compare: train must be given with samples, and samples with train, got {got}")
        if self.reports and (self.samples or len(self.reports) < 2):
            got = f"{len(self.reports)} reports and {len(self.samples)} samples"
            raise ValueError(f"zoo compare: reports must be two or more, and without samples, got {got}")
        for name in ("count", "images"):
            if getattr(self, name) < 2:
                raise ValueError(f"zoo compare: {name} must be at least 2, got {getattr(self, name)}")
        if not 0 < self.best <= 1:
            raise ValueError(f"zoo compare: best must be in (0, 1], got {self.best}")
