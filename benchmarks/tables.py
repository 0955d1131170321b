"""Turns results/*.jsonl into RESULTS.md and, eight rows of it, into README.md between its marks.

No number there is typed by hand. Run: python benchmarks/tables.py
"""

import json
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/RESULTS.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
RATES = {"gb_per_s": "GB/s", "gflop_per_s": "GFLOP/s"}
OURS = ("kernel", "Triton", "triton", "fastws")  # the first of these that has a row is what others are compared with
ABOUT = """# Results of the benchmarks

Written by `python benchmarks/tables.py` from [results](results), to which `fastws bench --out benchmarks/results`
adds rows. Times are medians of single calls, of one thread those of the processor, "cold" those with 64 MB touched
before each. "Of a copy" compares with `clone` of as many bytes, which makes a new tensor as most operators do, and
with a copy into memory that is there already. The columns behind it say how many times as long others take, warm and
cold. "Published" is what the authors' code computes, restated in PyTorch or numpy in the benchmark's own file without
their loading, logging and configuration; only "published code" is their program. Rows with a * were measured beside
other work on the machine: of these only the ratios count, for whatever is compared takes turns. Rows without a cold
time are from before there was one.
"""
README_MACHINE = ("AMD EPYC", 1, "AVX2")
README_ROWS = [
    ("token_views", "resnet18 float32 noise=0.0"),
    ("tokenize_out", "resnet18 norm=keep"),
    ("masked_mse", "views"),
    ("weighted_sample", "4,096 of resnet18"),
    ("kernel_order", "131072 x 9"),
    ("coordinate_mlp", "ResNet-20, h = 180, float32"),
    ("small_cnn_step", "cnn-s per network and step"),
    ("nern_step", "ResNet-20, h 180, joint"),
]


def read_machines() -> dict[tuple, dict]:
    """Of device, threads and instruction set: of operator and case: of each implementation the latest row."""
    machines = defaultdict(dict)
    for path in sorted((ROOT / "benchmarks/results").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            races = machines[row["device"], row.get("threads"), row.get("isa")]
            races.setdefault((row["op"], row["case"]), {})[row["implementation"]] = row
    return machines


def results() -> str:
    parts = [f"## {title(machine, races)}\n\n{table(races)}\n" for machine, races in read_machines().items()]
    return "\n".join([ABOUT, *parts])


def readme_table() -> str:
    races = read_machines()[README_MACHINE]
    chosen = {row: races[row] for row in README_ROWS}
    return f"{BEGIN}\n{title(README_MACHINE, chosen)}:\n\n{table(chosen)}\n{END}"


def title(machine: tuple, races: dict) -> str:
    device, threads, isa = machine
    about = f"{device}, {isa}, {threads} thread{'s' * (threads > 1)}" if threads else device
    newest = max((row for race in races.values() for row in race.values()), key=lambda row: row["date"])
    return f"{about}, torch {newest['torch']}, {newest['date']}"


def table(races: dict) -> str:
    lines = ["| op | case | time | cold | rate | of a copy | compiled reference | reference | others |"]
    lines.append("| --- | --- | --: | --: | --: | --: | --: | --: | --- |")
    for (op, case), rows in sorted(races.items(), key=lambda race: race[0][0]):
        ours = next((rows[name] for name in OURS if name in rows), None)
        if ours is None:
            for name, row in rows.items():
                memory = f" {row['mb']:.0f} MB" if "mb" in row else ""
                lines.append(f"| {op} | {starred(case, row)} | {times(row)} | | | | | {name}{memory} |")
            continue
        slower = [times_slower(rows.get(name), ours) for name in ("compiled", "reference")]
        rivals = [name for name in rows if not name.startswith((*OURS, "reference", "copy")) and name != "compiled"]
        others = ", ".join(f"{name}: {times_slower(rows[name], ours)}" for name in rivals)
        copies = f"{ours['of copy']:.2f} ({ours['of copy in place']:.2f} in place)" if "of copy" in ours else ""
        cells = [op, starred(case, ours), times(ours), rate(ours), copies, *slower, others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def starred(case: str, row: dict) -> str:
    """A row says how many processes wanted to run when it was measured: ours, and those of others."""
    return case + " *" * (row.get("load", 0) > row.get("threads", 1) + 0.5)


def rate(row: dict) -> str:
    return next((f"{row[name]:.1f} {unit}" for name, unit in RATES.items() if name in row), "")


def times(row: dict) -> str:
    """Of a call with warm and with cold caches: two cells."""
    return f"{time(row['us'])} | {time(row['cold_us']) if 'cold_us' in row else ''}"


def times_slower(row: dict | None, ours: dict) -> str:
    if row is None:
        return ""
    cold = f" ({row['cold_us'] / ours['cold_us']:.3g} x cold)" if "cold_us" in row and "cold_us" in ours else ""
    return f"{row['us'] / ours['us']:.3g} x{cold}"


def time(us: float) -> str:
    value, unit = (us / 1e6, "s") if us >= 1e6 else (us / 1e3, "ms") if us >= 1e3 else (us, "us")
    return f"{value:.3g} {unit}"


def main() -> None:
    RESULTS.write_text(results())
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + readme_table() + after)


if __name__ == "__main__":
    main()
