"""Turns results/*.json into the table of README.md, between its marks. No number there is typed by hand.

python experiments/tables.py                                             # writes the table anew
python experiments/tables.py --add quickstart-0 runs/quickstart/results.json   # first keeps the results of a run

A name begins with the kind of its experiment (KINDS). Long lists, which are only for plots, are not kept, and of
absolute paths only the last part: the rest is of one machine.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
LONGEST = 400  # entries of a list that is kept


def quickstart(found: dict) -> str:
    scores = {row["features"]: row["test_r2"] for row in found["probe"]["r2"] if row["target"] == "test_accuracy"}
    before, after = found["nern"]["accuracy"]
    seconds = sum(stage["seconds"] for stage in found["stages"].values())
    return (
        f"seed {found['config']['seed']}: R² of accuracy on unseen networks "
        + ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        + f"; a permuted copy moves {found['permutations']['SANE']['ratio']:.2f} times as far as another network is"
        + f"; stored in a NeRN: accuracy {before:.3f} before, {after:.3f} after; new networks: "
        + ", ".join(
            f"{name} {one['accuracy'][0]:.3f} (novelty {one['novelty'][0]:.2f})"
            for name, one in found["new"]["sets"].items()
        )
        + f"; {seconds:.0f} s"
    )


def zoo(found: dict) -> str:
    """Accuracies of states, at the epochs that were published and at the last."""
    lines = [line for line in found["epochs"] if line["published mean"] is not None] or found["epochs"][-1:]
    about = f"{found['preset']}: {found['states']:,} states, {found['dropped']} not finite"
    for line in lines:
        published = "" if line["published mean"] is None else f" (published {line['published mean']})"
        about += f"; epoch {line['epoch']}: accuracy {line['mean']:.3f}{published}, std {line['std']:.3f}"
    return about + minutes(found)


def minutes(found: dict) -> str:
    return "; minutes an epoch: at least {least:.1f}, median {median:.1f}".format(**found["minutes"])


def twins(found: dict) -> str:
    last = found["epochs"][-1]
    cells = (f"{name} {value:.3f}" for name, value in last.items() if isinstance(value, float))
    return f"{found['states']:,} states; epoch {last['epoch']}: {', '.join(cells)}{minutes(found)}"


def probes(found: dict) -> str:
    """What each set of features says of each target, on the test split."""
    targets: dict[str, list[str]] = {}
    for row in found["results"]:
        targets.setdefault(f"{row['score']} of {row['target']}", []).append(f"{row['features']} {row['test']:.3f}")
    return "; ".join(f"{target}: {', '.join(scores)}" for target, scores in targets.items())


def teacher(found: dict) -> str:
    before, after = found["test accuracy before"], found["test accuracy"]
    return f"{found['steps']:,} steps: test accuracy {before:.4f} before, {after:.4f} after"


def nern(found: dict) -> str:
    """Accuracies on the test images by precision of the predictor, and the last error of each curve."""
    parts = []
    for run in found["stored"]:
        schedule = f"{run['steps']:,} steps, {run['warmup']:,} of them of reconstruction alone, {run['objective']}"
        accuracies = (
            f"{name} {one['accuracy']:.4f} in {one['share']:.0%} of the bytes"
            for name, one in run["precisions"].items()
        )
        original = run["precisions"]["fp32"]["original_accuracy"]
        training = run.get("training", "fp32")  # before results said it, all were
        about = f"h = {run['hidden']}, seed {run['seed']}, {schedule}, in {training}, {run['hours']:.1f} h"
        parts.append(f"{about}: accuracy {original:.4f} before; after: {', '.join(accuracies)}")
    for order, points in found["curves"].items():
        parts.append(f"{order}: relative error of the weights {points[-1][1]:.4f} at step {points[-1][0]:,}")
    return "; ".join(parts)


def hyperrep(found: dict) -> str:
    """Accuracy at epoch 0 and after training, novelty and spread of each set of sampled networks."""
    parts = []
    for name, row in found["sets"].items():
        accuracies = [f"{value:.3f}" for key, value in row.items() if key.startswith("epoch ")]
        if accuracies:
            where = f" (novelty {row['novelty']:.2f}, spread {row['spread']:.2f})" if "novelty" in row else ""
            parts.append(f"{name} {', '.join(accuracies)}{where}")
    epochs = ", ".join(["0", *(key.removeprefix("epoch ") for key in found["scratch"])])
    scratch = ", ".join(f"{value:.3f}" for value in found["scratch"].values())
    about = f"seed {found['seed']}, {found['networks']} networks: zoo {found['zoo']:.3f}; scratch {scratch}"
    for line in found.get("results", []):
        if line["target"] == "test_accuracy":
            about += "; {features}: R² of accuracy {test_r2:.3f}, tau {test_tau:.3f}".format(**line)
    return f"{about}; accuracy at epochs {epochs}: {'; '.join(parts)}; {found['seconds'] / 60:.0f} min"


def curve(found: dict) -> str:
    """Accuracy of each method over the number of networks that it learned from."""
    parts = []
    for size in dict.fromkeys(line["networks"] for line in found["lines"]):
        cells = [
            "{method} {accuracy:.3f} (novelty {novelty:.2f}, spread {spread:.2f})".format(**line)
            for line in found["lines"]
            if line["networks"] == size
        ]
        parts.append(f"{size} networks: {', '.join(cells)}")
    return f"seed {found['seed']}; {'; '.join(parts)}; {found['seconds'] / 60:.0f} min"


def lwln(found: dict) -> str:
    parts = [
        "{run}: R² of layers {layers}, reconstructed networks {held_out:.3f}, learned from {train:.3f}".format(
            **line, layers=", ".join(f"{value:.2f}" for value in line["r2"])
        )
        for line in found["lines"]
    ]
    return f"seed {found['seed']}; {'; '.join(parts)}; {found['seconds'] / 60:.0f} min"


def embeddings(found: dict) -> str:
    """Rank correlation of accuracy, for each zoo, each run and each probe."""
    parts = [
        "{zoo}, {run}, {features} by {probe}: R² {test_r2:.3f}, tau {test_tau:.3f}".format(**line)
        for line in found["lines"]
        if line["target"] == "test_accuracy"
    ]
    return f"seed {found['seed']}; accuracy: {'; '.join(parts)}; {found['seconds'] / 60:.0f} min"


def verdicts(found: dict) -> str:
    """Sentences on samples of several zoos, judged together."""
    return " ".join(found["verdicts"].values())


def barriers(found: dict) -> str:
    """Barriers by alignment, as means over pairs and half the width of their 95 % intervals."""

    def said(value: dict) -> str:
        return f"{value['mean']:.3f}" + ("" if value["half"] is None else f" ± {value['half']:.3f}")

    about, cells = found["config"], found["barriers"].items()
    return (
        f"{found['pairs']} pairs of {about['network']} {about['width']} wide on {about['data']}, "
        f"{found['images']:,} test images, loss of the ends {said(found['ends'])}; loss barriers: "
        + ", ".join(f"{name.replace(', ', ' and ')} {said(one['loss'])}" for name, one in cells)
    )


def lineage(found: dict) -> str:
    """Trees first, then of how many relatives each signal is larger than for all strangers."""
    lines = [
        f"seed {found['seed']}, accuracy {found['accuracy']:.3f}, strangers alone: "
        f"{found['strangers']['called relatives']} of {found['strangers']['pairs']:,} pairs called relatives"
    ]
    for tree, signals in zip(found["trees"], found["signals"], strict=True):
        cells = (f"{name} {value:.2f}" for name, value in signals.items() if name != "networks")
        lines.append(
            f"{tree['networks']}: {tree['relatives']} pairs of relatives, precision {tree['precision']:.2f}, recall "
            f"{tree['recall']:.2f}, parents right {tree['parents right']:.2f}, {tree['certain directions']} certain "
            f"directions of which right {tree['of them right']:.2f}; relatives above all strangers: {', '.join(cells)}"
        )
    return f"{'. '.join(lines)}; {found['seconds'] / 60:.0f} min"


def hub(found: dict) -> str:
    """How many models have a nearest neighbour of their own family, by what is compared."""
    parts = [
        "{features} ({metric}) {accuracy:.3f}, of the same shapes {same shapes:.3f}".format(**line)
        for line in found["lines"]
    ]
    families = ", ".join(name if x is None else f"{name} {x:.3f}" for name, x in found["families"].items())
    return (
        f"seed {found['seed']}, {found['models']} models of {len(found['families'])} families (test accuracy: "
        f"{families}), {found['same shapes']} of them with the shapes of another family; {found['steps']:,} steps; "
        f"nearest neighbour of the same family: {'; '.join(parts)}; {found['seconds'] / 60:.0f} min"
    )


KINDS = {
    "hub": hub,
    "barriers": barriers,
    "lineage": lineage,
    "verdicts": verdicts,
    "embeddings": embeddings,
    "lwln": lwln,
    "curve": curve,
    "hyperrep": hyperrep,
    "sane": hyperrep,
    "quickstart": quickstart,
    "zoo": zoo,
    "twins": twins,
    "probes": probes,
    "teacher": teacher,
    "nern": nern,
}


def kind(name: str) -> str:
    found = name.partition("-")[0]
    if found not in KINDS:
        sys.exit(f"tables: name must begin with one of {', '.join(KINDS)}, got {name!r}")
    return found


def count(found: Any) -> int:
    """Entries of a list and of the lists in it."""
    return sum(map(count, found)) if isinstance(found, list) else 1


def without_long_lists(found: Any) -> Any:
    if isinstance(found, dict):
        kept = {name: without_long_lists(value) for name, value in found.items()}
        return {name: value for name, value in kept.items() if value is not None or found[name] is None}
    if isinstance(found, list):
        return None if count(found) > LONGEST else [without_long_lists(value) for value in found]
    return found


def without_machine(text: str) -> str:
    return re.sub(r'(?<=[" ])/(?:[^"/ ]+/)*([^"/ ]+)', r"\1", text)


def table() -> str:
    lines = ["| run | result |", "| --- | --- |"]
    for path in sorted((HERE / "results").glob("*.json")):
        lines.append(f"| [{path.stem}](results/{path.name}) | {KINDS[kind(path.stem)](json.loads(path.read_text()))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "FILE"), help="keep the results of a run under a name")
    added = parser.parse_args().add
    if added:
        name, path = added
        kind(name)
        found = without_long_lists(json.loads(Path(path).read_text()))
        (HERE / f"results/{name}.json").write_text(without_machine(json.dumps(found, indent=1)) + "\n")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
