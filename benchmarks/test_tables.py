"""The harness, the runner and the tables, which are what the rows say."""

import json

import pytest
import torch

from fastws.benchmarks import run, tables
from fastws.benchmarks.harness import Case, Options, race


def test_tables_are_those_of_the_rows():
    assert tables.RESULTS.read_text() == tables.results()
    assert tables.readme_table() in (tables.ROOT / "README.md").read_text()
    assert tables.readme_table().count("\n| ") == 2 + 8


def test_others_are_compared_with_the_kernel_warm_and_cold():
    about = {"threads": 1, "load": 7.0}
    rows = {"kernel": about | {"us": 10.0, "cold_us": 100.0, "gb_per_s": 2.0}}
    rows |= {"published": about | {"us": 430.0, "cold_us": 1900.0}, "copy": about | {"us": 1.0}}
    (*_, line) = tables.table({("op", "case"): rows}).splitlines()
    assert line == "| op | case * | 10 us | 100 us | 2.0 GB/s |  |  |  | published: 43 x (19 x cold) |"


def double_case(wrong: float = 2.0) -> Case:
    return Case(
        op="double",
        name="small",
        make_args=lambda: (torch.ones(1000),),
        runs={"kernel": lambda x: wrong * x, "reference": lambda x: x + x},
        truth=lambda x: x + x,
        check=lambda actual, truth, x: torch.testing.assert_close(actual, truth(x)),
        work=lambda x: 2 * x.nbytes,
        units={"": 10},
    )


def test_every_row_has_a_cold_twin():
    rows = {row["implementation"]: row for row in race(double_case(), Options(quick=True))}
    assert rows.keys() == {"kernel", "reference", "copy", "copy in place"}
    for row in rows.values():
        assert row["us"] > 0 and row["cold_us"] > 0 and {"iqr", "cold_iqr", "gb_per_s", "of copy"} <= row.keys()
    ours = rows["kernel"]
    assert ours["gb_per_s"] == pytest.approx(8000 / 10 / ours["us"] / 1e3)


def test_what_is_wrong_is_not_timed():
    with pytest.raises(AssertionError):
        next(race(double_case(wrong=2.1), Options(quick=True)))


def test_rows_are_printed_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load", lambda name: type("Module", (), {"cases": lambda options: [double_case()]}))
    run.run(["tokenize"], Options(quick=True, out=tmp_path))
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4 == len(capsys.readouterr().out.splitlines())
    assert all({"device", "threads", "torch", "commit", "date", "load", "us", "cold_us"} <= row.keys() for row in rows)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="bench: names must be of align, .*, got token_vues"):
        run.run(["token_vues"], Options())
