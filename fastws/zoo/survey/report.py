"""The report of a zoo: one HTML file with its figures and tables inside."""

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy
from torch import Tensor

from fastws import pages
from fastws.files.atomic import write_file
from fastws.pages import number, table
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.survey.diversity import Duplicates, Functions, Sample, Weights, pairs
from fastws.zoo.survey.figures import function_figures, measure_of, measured_figures, weight_figures


class Findings(NamedTuple):
    """All that a report tells."""

    zoo: Zoo
    sample: Sample
    seed: int  # of the sample
    weights: Weights
    duplicates: Duplicates
    functions: Functions | None
    no_functions: str  # why there are none


def write(path: Path, findings: Findings) -> None:
    content = pages.document(f"zoo {findings.zoo.path.name}", body(findings)).encode()
    write_file(path, content)


def body(findings: Findings) -> Iterable[str]:
    zoo, sample = findings.zoo, findings.sample
    yield f"<h1>Model zoo {html.escape(zoo.path.name)}</h1>"
    yield f"<p>{html.escape(headline(findings))}</p>"
    yield overview(zoo)
    yield from figures(measured_figures(zoo, sample))
    yield "<h2>Weights</h2>"
    yield from figures(weight_figures(zoo, sample, findings.weights))
    if findings.weights.not_aligned:
        yield f"<p>Not compared as aligned: {html.escape(findings.weights.not_aligned)}</p>"
    yield diversity_table(findings)
    yield "<h2>Functions</h2>"
    if findings.functions is None:
        yield f"<p>Not compared: {html.escape(findings.no_functions)}</p>"
    elif len(sample.models) == 1:
        yield "<p>Not compared: the zoo holds one network.</p>"
    else:
        yield from figures(function_figures(findings.functions))
    yield "<h2>What the zoo holds</h2>"
    yield f"<pre>{html.escape(zoo.layout.describe())}</pre>"
    yield table(("provenance", ""), [(name, f"{value}") for name, value in flatten(zoo.provenance)])


def figures(found: Iterable) -> Iterable[str]:
    for drawn, caption in found:
        yield pages.figure(drawn, caption)


def headline(findings: Findings) -> str:
    zoo, sample = findings.zoo, findings.sample
    models = zoo.properties["model"].combine_chunks().unique()
    text = (
        f"{len(zoo):,} states of {len(models):,} networks of {zoo.layout.num_weights:,} weights. Weights and functions "
        f"are those of {len(sample.models):,} networks, drawn with seed {findings.seed}."
    )
    best = measure_of(zoo, sample, "test_accuracy")
    if best is None:
        return text
    last = best.gather_last()
    mean, std = numpy.nanmean(last), numpy.nanstd(last)
    return f"{text} They reach a test accuracy of {mean:.3f} on average, with a standard deviation of {std:.3f}."


def overview(zoo: Zoo) -> str:
    rows = [
        ("weights", f"{zoo.dtype}"),
        ("symmetry", f"{zoo.symmetry or 'unknown'}"),
        ("left out as not finite", f"{zoo.dropped:,}"),
    ]
    rows += [(f"networks in {name}", f"{zoo.count_models(name):,}") for name in zoo.splits]
    return table(("zoo", ""), rows)


def flatten(nested: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name} ")
        elif value is not None:
            yield f"{prefix}{name}", value


def diversity_table(findings: Findings) -> str:
    weights, models = findings.weights, len(findings.sample.models)
    rows = []
    for kind, found in weights.distances.items():
        rows += [
            (f"{title} between two networks, {kind}", spread(values))
            for title, values in zip(("Euclidean distance", "cosine distance"), found, strict=True)
        ]
    rows.append(("standard deviation of a weight over the networks", spread(weights.std)))
    rows.append(("length of a step between states", spread(weights.steps)))
    if findings.functions is not None:
        functions = findings.functions
        rows += [
            ("agreement of two networks", spread(pairs(functions.agreement))),
            ("linear CKA of their logits", spread(pairs(functions.cka))),
            (f"accuracy on {functions.images} test images", spread(functions.accuracy)),
        ]
    rows.append((f"of {findings.duplicates.states:,} states, equal to an earlier one", repeated(findings.duplicates)))
    rows.append((f"of {models:,} last states, equal but for the order of neurons", repeated(weights.permuted)))
    return table(("", "mean (standard deviation)"), rows)


def spread(values: Tensor) -> str:
    known = values[values.isfinite()].double()
    if len(known) == 0:
        return "-"
    return f"{number(known.mean().item(), 4)} ({number(known.std(correction=0).item(), 4)})"


def repeated(duplicates: Duplicates) -> str:
    where = f", such as rows {duplicates.example[0]} and {duplicates.example[1]}" if duplicates.example else ""
    return f"{duplicates.repeated:,}{where}"
