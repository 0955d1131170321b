"""``fastws bench``, in a file of its own: what runs benchmarks works without the library of the command line, too."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from fastws.benchmarks.harness import Options
from fastws.benchmarks.run import run as run_benchmarks

Names = Annotated[tuple[str, ...], tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Times operators and what is made of them against their references, compiled references and published ways.

    fastws bench token_views --quick
    fastws bench --threads 2 --out benchmarks/results
    """

    names: Names = ()  # benchmarks to run, named after operators; all if none is given


def run(config: Config) -> None:
    run_benchmarks(config.names, config)
