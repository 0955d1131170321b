import html
import json
import re

import numpy
import pytest
import torch
from small_zoo import make_small_zoo

import fastws
from fastws import pages
from fastws.cli import main
from fastws.zoo import Zoo, ZooWriter
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import make
from fastws.zoo.making.training import Wave
from fastws.zoo.survey import figures, info
from fastws.zoo.survey.progress import find_unfinished


def read(path):
    return html.unescape(path.read_text())


@pytest.fixture
def no_images(monkeypatch):
    """Figures are drawn but not rendered, which takes most of the time."""
    monkeypatch.setattr(pages, "image", lambda drawn, caption: "")


def table_of(page):
    return dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page))


def test_info_prints_what_is_there(tmp_path, capsys):
    zoo = make_small_zoo(tmp_path)
    main(["zoo", "info", "--zoo", str(tmp_path)])
    out = capsys.readouterr().out
    assert "models: 36, states: 72, left out as not finite: 0" in out
    accuracy = zoo.properties["test_accuracy"].to_numpy()
    assert re.search(rf"test_accuracy +{accuracy.min():.4g} .* {accuracy.max():.4g}\n", out)
    assert "report:" not in out and sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".html") == []


def test_info_counts_models_that_are_there(tmp_path, capsys, no_images):
    models = [f"m{number}" for number in range(9)]
    with ZooWriter(tmp_path, fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)}), models=models) as writer:
        writer.append(torch.ones(4, 4), {"model": ["m0", "m0", "m1", "m1"]})
    info.run(info.Config(zoo=str(tmp_path), out=str(tmp_path / "report.html")))
    counts = {name: len({"m0", "m1"} & set(members)) for name, members in Zoo.open(tmp_path).splits.items()}
    told = "; ".join(f"{name} {count} models, {2 * count} states" for name, count in counts.items())
    assert f"splits: {told}\n" in capsys.readouterr().out
    assert {name: table_of(read(tmp_path / "report.html"))[f"networks in {name}"] for name in counts} == {
        name: str(count) for name, count in counts.items()
    }


def test_info_of_properties_that_are_neither_numbers_nor_names(tmp_path, capsys):
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})
    properties = {"widths": [[1, 2]] * 2, "made": [{"by": "me"}] * 2, "unknown": [None] * 2, "good": [True, False]}
    with ZooWriter(tmp_path, layout) as writer:
        writer.append(torch.ones(2, 4), {"model": ["a", "b"], "seed": [2**62 + 1, 0]} | properties)
    main(["zoo", "info", "--zoo", str(tmp_path)])
    out = capsys.readouterr().out
    assert "widths             list<element: int64>" in out and "made               struct<by: string>" in out
    assert "unknown                   nan" in out and "good               False, True" in out


@pytest.mark.parametrize("config", ["configs/a.yaml", ["a"], {"preset": "none"}, {"lab": "other"}, None])
def test_report_of_a_zoo_with_a_provenance_of_its_own(tmp_path, no_images, config):
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})
    with ZooWriter(tmp_path / "zoo", layout, provenance={"config": config}) as writer:
        writer.append(torch.ones(2, 4), {"model": ["a", "b"]})
    info.run(info.Config(zoo=str(tmp_path / "zoo"), out=str(tmp_path / "report.html")))
    told = f"provenance must be that of fastws zoo make, which says what networks are, got the config {config}"
    assert told in read(tmp_path / "report.html")


def test_states_without_an_epoch_are_in_no_table(tmp_path, no_images):
    zoo = make_small_zoo(tmp_path / "zoo")
    epochs = [None if row % 5 < 2 else epoch for row, epoch in enumerate(zoo.properties["epoch"].to_pylist())]
    properties = {name: zoo.properties[name] for name in zoo.properties.column_names} | {"epoch": epochs}
    with ZooWriter(tmp_path / "some", zoo.layout, zoo.symmetry) as writer:
        writer.append(zoo.weights, {name: list(map(plain, column)) for name, column in properties.items()})
    info.run(info.Config(zoo=str(tmp_path / "some"), out=str(tmp_path / "report.html")))
    assert "72 states of 36 networks" in read(tmp_path / "report.html")
    align(AlignConfig(zoo=str(tmp_path / "some"), reference="m1"))  # its last state is one that is dated
    with pytest.raises(ValueError, match="zoo info: out must be a file to write, got the folder .*some"):
        info.run(info.Config(zoo=str(tmp_path / "some"), out=str(tmp_path / "some")))


def plain(value):
    return value.as_py() if hasattr(value, "as_py") else value


def test_report_of_a_zoo_that_was_made(tmp_path, capsys):
    options = {"networks": 6, "epochs": 2, "limit": 300, "threads": 1, "lrs": (1e-2,), "inits": ("kaiming_uniform",)}
    zoo = make(MakeConfig(out=str(tmp_path / "zoo"), **options))
    align(AlignConfig(zoo=str(tmp_path / "zoo")))
    path = tmp_path / "new" / "report.html"
    info.run(info.Config(zoo=str(tmp_path / "zoo"), out=str(path), images=50))
    page = read(path)
    assert f"report: {path}" in capsys.readouterr().out
    assert "18 states of 6 networks of 1,486 weights" in page and "drawn with seed 0" in page
    assert page.count("<img ") == 7 and "http" not in page.replace("http://www.w3.org", "")
    last = torch.tensor(zoo.properties["test_accuracy"].to_pylist())[-6:]
    assert f"a test accuracy of {last.mean():.3f} on average" in page
    found = table_of(page)
    assert (
        found["Euclidean distance between two networks, aligned"]
        < found["Euclidean distance between two networks, raw"]
    )
    assert (
        found["of 18 states, equal to an earlier one"] == found["of 6 last states, equal but for the order of neurons"]
    )
    assert 0 < float(found["agreement of two networks"].split()[0]) < 1
    assert "accuracy on 50 test images" in found and found["config networks"] == "6"


def test_alignment_without_a_model_is_left_out(tmp_path, no_images):
    zoo = make_small_zoo(tmp_path / "zoo")
    with ZooWriter(tmp_path / "more", zoo.layout, zoo.symmetry) as writer:
        writer.append(zoo.rows([0, 1]), {"model": ["a", "b"], "test_accuracy": [0.5, 0.6]})
        align(AlignConfig(zoo=str(tmp_path / "more"), reference="a"))
        writer.append(zoo.rows([2]), {"model": ["c"], "test_accuracy": [0.7]})
    info.run(info.Config(zoo=str(tmp_path / "more"), out=str(tmp_path / "report.html")))
    page = read(tmp_path / "report.html")
    assert "Not compared as aligned: aligned_rows: models must be in the alignment, got 'c'" in page
    assert [name for name in table_of(page) if "between two networks" in name and "aligned" in name] == []


def test_report_of_a_zoo_of_unknown_origin(tmp_path, no_images):
    make_small_zoo(tmp_path / "zoo")
    path = tmp_path / "report.html"
    info.run(info.Config(zoo=str(tmp_path / "zoo"), out=str(path), models=9, seed=5))
    page = read(path)
    assert "Not compared: " in page and "fastws zoo make, which says what networks are, got the config None" in page
    assert "those of 9 networks, drawn with seed 5" in page and "agreement of two networks" not in table_of(page)


def test_report_of_a_zoo_that_knows_next_to_nothing(tmp_path, no_images):
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})
    with ZooWriter(tmp_path / "zoo", layout) as writer:
        writer.append(torch.ones(2, 4), {"model": ["<a>", "b"]})
    path = tmp_path / "report.html"
    info.run(info.Config(zoo=str(tmp_path / "zoo"), out=str(path)))
    found = table_of(read(path))
    assert found["of 2 states, equal to an earlier one"] == "1, such as rows 0 and 1"
    assert found["length of a step between states"] == "-"
    assert found["Euclidean distance between two networks, raw"] == "0.0000 (0.0000)"


def test_one_epoch_is_drawn_as_an_interval():
    statistics = torch.randn(1, 9, 4, 7).sort(-1).values
    drawn = figures.draw_layers([7], statistics, ["a", "b", "c", "d"], [0, 1, 2, 3])
    measure = figures.Measure("test_accuracy", [7], numpy.linspace(0, 1, 9)[:, None])
    for axis in (*drawn.axes[:4], *figures.draw_trajectories([measure]).axes):
        (low, _), (high, _) = axis.collections[0].get_datalim(axis.transData).get_points()
        assert (low, high) == pytest.approx((6.7, 7.3)) and axis.lines[-1].get_xdata() == pytest.approx([6.7, 7.3])
        assert [tick for tick in axis.get_xticks() if low < tick < high] == [7]
    assert [axis.get_visible() for axis in drawn.axes] == [True] * 4 + [False] * 2


def test_report_of_one_network(tmp_path, no_images):
    options = {"networks": 1, "epochs": 1, "limit": 64, "threads": 1}
    zoo = make(MakeConfig(out=str(tmp_path / "zoo"), **options))
    info.run(info.Config(zoo=str(zoo.path), out=str(tmp_path / "report.html")))
    page = read(tmp_path / "report.html")
    assert "Not compared: the zoo holds one network." in page and "All pairs" not in page


def test_report_of_nothing_is_refused(tmp_path):
    with ZooWriter(tmp_path / "zoo", fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})):
        pass
    with pytest.raises(ValueError, match="zoo info: zoo must hold networks for a report, got none"):
        info.write_report(info.Config(zoo="", out=str(tmp_path / "r.html")), Zoo.open(tmp_path / "zoo"))
    assert not (tmp_path / "r.html").exists()


def test_images_that_were_named_must_be_there(tmp_path):
    options = {"networks": 2, "epochs": 1, "limit": 64, "threads": 1}
    make(MakeConfig(out=str(tmp_path / "zoo"), **options))
    with pytest.raises(SystemExit, match="nowhere"):
        main(["zoo", "info", "--zoo", str(tmp_path / "zoo"), "--report", str(tmp_path / "r"), "--data", "nowhere"])
    assert not (tmp_path / "r").exists()


def test_missing_matplotlib_is_named_first(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="zoo info: matplotlib must be installed for the report, got none"):
        info.run(info.Config(zoo=str(tmp_path / "none"), out="r.html"))


@pytest.mark.parametrize("option, value, least", [("models", 1, 2), ("seed", -1, 0), ("images", 0, 1)])
def test_options_must_be_in_range(option, value, least):
    with pytest.raises(ValueError, match=f"zoo info: {option} must be at least {least}, got {value}"):
        info.Config(zoo="zoo", **{option: value})


# --- what is printed of a zoo


def told(path, capsys, name):
    capsys.readouterr()
    main(["zoo", "info", "--zoo", str(path)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    return line


def test_info_says_whether_zoo_make_is_done(tmp_path, capsys, monkeypatch):
    options = {"networks": 3, "epochs": 2, "limit": 60, "threads": 1, "wave": 2}
    advance, calls = Wave.advance, []

    def advance_and_stop(wave, *args, **options):
        calls.append(wave)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return advance(wave, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Wave, "advance", advance_and_stop)
        make(MakeConfig(out=str(tmp_path), **options))
    count = len(Zoo.open(tmp_path))
    again = "run the command that writes it again"
    assert told(tmp_path, capsys, "finished") == f"finished: no, zoo make has {count} states so far; {again}"
    (tmp_path / "resume.safetensors").rename(tmp_path / "kept")  # killed before its first epoch
    assert told(tmp_path, capsys, "finished") == f"finished: no, {count} of 9 states are there; {again}"
    (tmp_path / "kept").rename(tmp_path / "resume.safetensors")
    make(MakeConfig(out=str(tmp_path), **options))
    assert told(tmp_path, capsys, "finished") == "finished: yes"
    assert told(tmp_path, capsys, "aligned") == "aligned: no; fastws zoo align does that"


def test_info_says_whether_a_writer_closed_the_zoo_and_all_was_read(tmp_path, capsys):
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})
    with ZooWriter(tmp_path, layout) as writer:
        writer.append(torch.ones(2, 4), {"model": ["a", "b"]})
        assert "a writer is at work, or was killed" in told(tmp_path, capsys, "finished")
    assert told(tmp_path, capsys, "finished") == "finished: yes"
    content = {"digest": "", "states": 3, "batches": 1, "submitted": 2, "bad": [[0, "c.pt", "damaged"]]}
    (tmp_path / "read.json").write_text(json.dumps(content))
    assert told(tmp_path, capsys, "finished") == "finished: yes"
    (tmp_path / "read.json").write_text(json.dumps(content | {"states": 5}))
    assert "finished: no, 2 of 4 states are there" in told(tmp_path, capsys, "finished")
    (tmp_path / "read.json").write_text("[]")
    with pytest.raises(SystemExit, match="read.json: file must be that of zoo read, got TypeError"):
        main(["zoo", "info", "--zoo", str(tmp_path)])


def test_sample_is_finished_whatever_its_origin_wanted(tmp_path):
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})
    provenance = {"config": {"networks": 100, "epochs": 5}, "sampled": {}}
    with ZooWriter(tmp_path, layout, provenance=provenance) as writer:
        writer.append(torch.ones(2, 4), {"model": ["a", "b"]})
    assert find_unfinished(Zoo.open(tmp_path)) == ""


def test_info_says_whether_a_zoo_is_aligned(tmp_path, capsys):
    small, path = make_small_zoo(tmp_path / "small"), tmp_path / "zoo"
    with ZooWriter(path, small.layout, small.symmetry) as writer:
        writer.append(small.rows(range(4)), {"model": ["a", "b", "c", "d"], "test_accuracy": [0.1, 0.2, 0.4, 0.3]})
    align(AlignConfig(zoo=str(path), reference="b"))
    assert told(path, capsys, "aligned").startswith("aligned: matching, reference model b, ")
    with ZooWriter(path, small.layout) as writer:
        writer.append(small.rows([5]), {"model": ["new"], "test_accuracy": [0.5]})
    assert told(path, capsys, "aligned").endswith("; 1 models were added since: run fastws zoo align again")
    (path / "alignment.safetensors").write_bytes(b"damaged")
    assert re.match("aligned: no, .*file must be an alignment, got", told(path, capsys, "aligned"))


def test_info_gives_figures_of_last_states_too(tmp_path, capsys):
    zoo = make_small_zoo(tmp_path)
    main(["zoo", "info", "--zoo", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("test_accuracy "))
    last = zoo.numbers("test_accuracy")[zoo.numbers("epoch") == 2]
    for line, values in ((lines[place], zoo.numbers("test_accuracy")), (lines[place + 1], last)):
        expected = numpy.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        assert [float(word) for word in line.split()[-5:]] == pytest.approx(expected, rel=1e-3)
    assert lines[place + 1].startswith("  of last states ")
    place = next(number for number, line in enumerate(lines) if line.startswith("generalisation_gap"))
    assert not lines[place + 1].startswith("  of last states")  # it is the same in all states of a network
