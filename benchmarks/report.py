"""Turns results/*.jsonl into the tables of README.md, between its marks. No number there is typed by hand.

Run: python benchmarks/report.py
"""

import json
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
RATES = {"gb_per_s": "GB/s", "gflop_per_s": "GFLOP/s"}
NOT_RIVALS = ("kernel", "compiled", "Triton", "triton", "reference", "copy")


def tables() -> str:
    parts = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.jsonl")):
        machines = defaultdict(dict)  # machine and threads: (op, case): implementation: the latest row
        for line in path.read_text().splitlines():
            row = json.loads(line)
            races = machines[row["device"], row.get("threads"), row.get("isa")]
            races.setdefault((row["op"], row["case"]), {})[row["implementation"]] = row
        for (device, threads, isa), races in machines.items():
            about = f"{device}, {isa}, {threads} thread{'s' * (threads > 1)}" if threads else device
            newest = max((row for race in races.values() for row in race.values()), key=lambda row: row["date"])
            parts.append(f"**{about}**, torch {newest['torch']}, {newest['date']}\n\n{table(races)}")
    return "\n\n".join(parts)


def table(races: dict) -> str:
    lines = ["| op | case | time | rate | of a copy | compiled reference | reference | others |"]
    lines.append("| --- | --- | --: | --: | --: | --: | --: | --- |")
    for (op, case), rows in sorted(races.items(), key=lambda race: race[0][0]):
        ours = next((rows[name] for name in ("kernel", "Triton", "triton") if name in rows), None)
        if ours is None:
            for row in rows.values():
                memory = f"{row['mb']:.0f} MB" if "mb" in row else ""
                lines.append(f"| {op} | {case} | {time(row['us'])} | | | | | {row['implementation']} {memory} |")
            continue
        times = [times_slower(rows.get(name), ours) for name in ("compiled", "reference")]
        others = [name for name in rows if not name.startswith(NOT_RIVALS)]
        others = ", ".join(f"{name}: {times_slower(rows[name], ours)}" for name in others)
        copies = f"{ours['of copy']:.2f} ({ours['of copy in place']:.2f} in place)" if "of copy" in ours else ""
        lines.append(
            f"| {op} | {case} | {time(ours['us'])} | {rate(ours)} | {copies} | {' | '.join(times)} | {others} |"
        )
    return "\n".join(lines)


def rate(row: dict) -> str:
    return next((f"{row[name]:.1f} {unit}" for name, unit in RATES.items() if name in row), "")


def times_slower(row: dict | None, ours: dict) -> str:
    return "" if row is None else f"{row['us'] / ours['us']:.3g} x"


def time(us: float) -> str:
    value, unit = (us / 1e6, "s") if us >= 1e6 else (us / 1e3, "ms") if us >= 1e3 else (us, "us")
    return f"{value:.3g} {unit}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}")
