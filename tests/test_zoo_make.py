"""fastws zoo make: recipes, folders, kills, ranks."""

import json
import time
from dataclasses import asdict

import numpy
import pytest
import torch
from running import finish, keep_moments, run_command, start
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from fastws.cli import main
from fastws.data.images import load
from fastws.devices import fast_format
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo import Zoo, ZooWriter
from fastws.zoo.making import ranks
from fastws.zoo.making.architectures import build, initialize
from fastws.zoo.making.grids import PRESETS
from fastws.zoo.making.make import MAY_CHANGE, Config, draw_recipes, make
from fastws.zoo.survey.progress import find_unfinished

pytestmark = pytest.mark.usefixtures("in_one_thread")


# --- recipes


def test_random_recipes_use_all_choices_and_do_not_depend_on_their_number():
    config = Config(out="", networks=200, dropouts=(0.0, 0.5), seed=3)
    recipes = draw_recipes(config)
    for name, choices in [("activation", config.activations), ("dropout", config.dropouts), ("lr", config.lrs)]:
        assert {getattr(one, name) for one in recipes} == set(choices)
    assert len({one.seed for one in recipes}) == 200 == len({one.model for one in recipes})
    assert draw_recipes(Config(out="", networks=20, dropouts=(0.0, 0.5), seed=3)) == recipes[:20]
    assert draw_recipes(Config(out="", networks=20, dropouts=(0.0, 0.5), seed=4)) != recipes[:20]


def test_grid_recipes_are_all_combinations_then_the_next_seed():
    choices = {"activations": ("tanh", "relu"), "inits": ("normal",), "optimizers": ("adam",), "lrs": (0.1, 0.2)}
    config = Config(out="", networks=8, sampling="grid", weight_decays=(0.0,), seed=5, **choices)
    recipes = draw_recipes(config)
    assert [one.seed for one in recipes] == [5] * 4 + [6] * 4
    assert [(one.activation, one.lr) for one in recipes[4:]] == [
        ("tanh", 0.1),
        ("tanh", 0.2),
        ("relu", 0.1),
        ("relu", 0.2),
    ]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"networks": 0}, "networks must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"lrs": ()}, "lrs must name at least one choice"),
        ({"dropouts": (1.0,)}, r"dropouts must be in \[0, 1\)"),
        ({"lrs": (float("nan"),)}, "lrs must be numbers from 0 on"),
        ({"lrs": (-1.0,)}, "lrs must be numbers from 0 on"),
        ({"weight_decays": (float("inf"),)}, "weight_decays must be numbers from 0 on"),
        ({"mean": (float("nan"),)}, "mean and std must be finite, std more than 0"),
        ({"seed": 2**63}, r"seed must be less than 2\^62"),
        ({"validation": -1}, "validation must be at least 0, got -1"),
        ({"schedule": "one-cycle"}, "optimizers must be momentum for a one-cycle schedule, got adam momentum"),
    ],
)
def test_config_errors(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(out="", **options)


# --- zoos


def tiny(path, **options):
    default = {"networks": 6, "epochs": 2, "limit": 96, "wave": 4, "threads": 1, "seed": 1}
    default |= {"activations": ("tanh", "relu"), "dropouts": (0.0, 0.2), "optimizers": ("adam",)}
    return Config(out=str(path), **default | options)


def assert_same(zoo, expected):
    assert torch.equal(zoo.weights, expected.weights)
    assert zoo.properties.equals(expected.properties) and zoo.splits == expected.splits
    assert not (zoo.path / "resume.safetensors").exists()


def test_zoo_holds_every_epoch_of_every_network(tmp_path):
    zoo = make(tiny(tmp_path))
    table = zoo.properties.to_pydict()
    assert table["model"] == [f"{number:06}" for number in [*range(4)] * 3 + [4, 5] * 3]
    assert table["epoch"] == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 2 + [1] * 2 + [2] * 2
    images = load("digits", limit=96, validation=PRESETS["digits"]["validation"])
    for row in range(len(zoo)):
        network = build("digits-cnn", (1, 8, 8), activation=table["activation"][row])
        network.load_state_dict(zoo.checkpoint(row))
        with torch.no_grad():
            logits = network.eval()(images.test_x)
        assert table["test_loss"][row] == pytest.approx(float(cross_entropy(logits, images.test_y)), rel=1e-5)
        accuracy = (logits.argmax(1) == images.test_y).float().mean()
        assert table["test_accuracy"][row] == pytest.approx(float(accuracy), abs=1e-6)
    initial = build("digits-cnn", (1, 8, 8))
    initialize(initial, table["init"][1], table["seed"][1])
    assert torch.equal(parameters_to_vector(initial.parameters()), zoo.weights[1])
    assert zoo.symmetry == Symmetry.trace(initial, torch.zeros(1, 1, 8, 8))
    assert zoo.provenance["config"] == json.loads(json.dumps(asdict(tiny(tmp_path))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_zoo_is_made_by_cuda(tmp_path):
    make(tiny(tmp_path / "cpu"))
    make(tiny(tmp_path / "cuda", device="cuda"))
    ours, theirs = Zoo.open(tmp_path / "cuda"), Zoo.open(tmp_path / "cpu")
    assert ours.weights.isfinite().all() and ours.weights.shape == theirs.weights.shape
    assert ours.splits == theirs.splits


def test_finished_zoo_is_not_made_again(tmp_path):
    zoo = make(tiny(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("weights-*")}
    assert_same(make(tiny(tmp_path)), zoo)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("weights-*")} == before
    with pytest.raises(ValueError, match=f"epochs must be 2, with which {tmp_path} was begun, got 3; give another"):
        make(tiny(tmp_path, epochs=3))
    assert set(MAY_CHANGE) == {"out", "threads", "explain"}
    with ZooWriter(tmp_path / "other", zoo.layout, provenance={"config": ["a", "b"]}):
        pass
    with pytest.raises(ValueError, match="zoo make: .*other must be a folder that it wrote, got another one; give"):
        make(tiny(tmp_path / "other"))


def test_zoo_is_the_same_on_two_threads_and_in_bf16(tmp_path):
    zoo = make(tiny(tmp_path / "one"))
    assert_same(make(tiny(tmp_path / "two", threads=2)), zoo)
    half = make(tiny(tmp_path / "half", dtype="bf16"))
    assert half.dtype == torch.bfloat16 and torch.equal(half.weights, zoo.weights.bfloat16())


def test_splits_do_not_depend_on_waves_and_stay(tmp_path, monkeypatch):
    splits = [make(tiny(tmp_path / f"wave {wave}", wave=wave, networks=9, epochs=0)).splits for wave in (2, 9)]
    assert splits[0] == splits[1] and sorted(sum(splits[0].values(), [])) == [f"{number:06}" for number in range(9)]
    create, append = ZooWriter._open, ZooWriter.append

    def append_and_die(writer, *args):
        append(writer, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # a zoo whose models were not known
        patch.setattr(ZooWriter, "_open", lambda writer, *args: create(writer, *args[:-1], ()))
        patch.setattr(ZooWriter, "append", append_and_die)
        make(tiny(tmp_path / "begun", wave=2, networks=9, epochs=0))
    before = Zoo.open(tmp_path / "begun").splits
    after = make(tiny(tmp_path / "begun", wave=2, networks=9, epochs=0)).splits
    assert sum(map(len, before.values())) == 2 and sum(map(len, after.values())) == 9
    assert all(members == after[name][: len(members)] for name, members in before.items())


def test_run_that_dies_at_any_moment_resumes_to_the_same_zoo(tmp_path):
    with keep_moments(tmp_path / "zoo", tmp_path) as moments:
        expected = make(tiny(tmp_path / "zoo"))
    assert len(moments) > 30
    for moment in moments[::5]:
        assert_same(make(tiny(moment)), expected)


def test_zoo_of_chosen_epochs_is_a_part_of_that_of_all(tmp_path):
    whole = make(tiny(tmp_path / "whole", epochs=4))
    with keep_moments(tmp_path / "zoo", tmp_path) as moments:
        zoo = make(tiny(tmp_path / "zoo", epochs=4, keep_epochs=(4, 1)))
    rows = [row for row, epoch in enumerate(whole.numbers("epoch")) if epoch in (1, 4)]
    assert torch.equal(zoo.weights, whole.rows(rows)) and zoo.splits == whole.splits
    assert zoo.properties.equals(whole.properties.take(rows).combine_chunks()) and not find_unfinished(zoo)
    for moment in moments[::5]:
        assert_same(make(tiny(moment, epochs=4, keep_epochs=(4, 1))), zoo)
    with pytest.raises(ValueError, match=r"keep_epochs must be epochs in \[0, 2\], got \(3,\)"):
        tiny(tmp_path / "other", keep_epochs=(3,))


RESNET = {"architecture": "cifar-resnet8-b-half", "networks": 2, "epochs": 1, "limit": 40, "activations": ("relu",)}
RESNET |= {"dropouts": (0.0,)}


def test_networks_train_one_by_one_in_half_precision(tmp_path):
    single = make(tiny(tmp_path / "single", **RESNET, keep_epochs=(1,)))
    half = make(tiny(tmp_path / "half", **RESNET, keep_epochs=(1,), precision="bf16"))
    difference = (half.weights - single.weights).norm() / single.weights.norm()
    assert 0 < difference < 0.02
    with pytest.raises(ValueError, match="precision must be fp32 and not compiled for digits-cnn, .* got bf16"):
        make(tiny(tmp_path / "small", precision="bf16"))


def test_networks_that_train_one_by_one_are_compiled_where_asked(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network, options: compiled.append((network, options)))
    plain = make(tiny(tmp_path / "plain", **RESNET))
    assert not compiled
    assert_same(make(tiny(tmp_path / "compiled", **RESNET, compile=True)), plain)
    # neither we nor the compiler may lay maps channels last where oneDNN then writes past its memory
    assert [options for _, options in compiled] == [{"layout_optimization": False}] * 2
    assert all(network.layer2[0].conv1.weight.is_contiguous() for network, _ in compiled)
    assert fast_format(build("resnet18", (3, 32, 32), activation="relu")) == torch.channels_last


def test_killed_command_resumes_to_the_same_zoo(tmp_path):
    config = tiny(tmp_path / "zoo", epochs=8, dropouts=(0.1,))
    options = ["--networks", "6", "--epochs", "8", "--limit", "96", "--threads", "1", "--wave", "4", "--seed", "1"]
    options += ["--activations", "tanh", "relu", "--dropouts", "0.1", "--optimizers", "adam"]
    process, log = start(run_command, "zoo", "make", "--out", config.out, *options), tmp_path / "zoo/log.jsonl"
    while process.is_alive() and (not log.exists() or log.read_text().count("\n") < 4):
        time.sleep(0.005)
    process.kill()
    assert finish(process)[0] < 0, "the command was over before it was killed"
    done = len(Zoo.open(config.out))
    assert 12 <= done < 6 * 9
    assert_same(make(config), make(tiny(tmp_path / "whole", epochs=8, dropouts=(0.1,))))


OTHER_WAYS = {
    "published": {"order": "published", "train_metrics": "running", "validation": 20, "sampling": "grid"},
    "one by one": {"schedule": "one-cycle", "optimizers": ("momentum",), "networks": 3, "validation": 0},
}


@pytest.mark.parametrize("options", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_other_ways_resume_too(tmp_path, monkeypatch, options):
    expected = make(tiny(tmp_path / "whole", **options))
    columns = expected.properties.column_names
    assert ("val_loss" in columns) == (options["validation"] > 0) and expected.dropped == 0
    append, dead = ZooWriter.append, 0
    while not (tmp_path / "zoo/done").exists():  # dies after every append, which is before it says so

        def append_and_die(writer, *args):
            append(writer, *args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ZooWriter, "append", append_and_die)
            try:
                make(tiny(tmp_path / "zoo", **options))
                (tmp_path / "zoo/done").touch()
            except KeyboardInterrupt:
                dead += 1
    waves = 3 if "schedule" in options else 2  # of 1 network, or of 4
    assert dead == 3 * waves
    assert_same(Zoo.open(tmp_path / "zoo"), expected)


def test_seed_zoo_has_the_published_initial_weights(tmp_path):
    zoo = make(tiny(tmp_path, sampling="grid", order="published", epochs=0, networks=2, inits=("uniform",)))
    for row, seed in enumerate(zoo.properties["seed"].to_pylist()):
        torch.manual_seed(seed)
        network = build("digits-cnn", (1, 8, 8))
        for parameter in network.parameters():
            torch.nn.init.uniform_(parameter) if parameter.dim() > 1 else parameter.data.fill_(0.01)
        assert torch.equal(zoo.weights[row], parameters_to_vector(network.parameters()))


# --- several processes


def by_model_and_epoch(zoo):
    table = zoo.properties.append_column("row", [numpy.arange(len(zoo))]).sort_by(
        [("model", "ascending"), ("epoch", "ascending")]
    )
    return zoo.weights[torch.from_numpy(table["row"].to_numpy().copy())], table.drop_columns(["row"])


def test_processes_make_one_zoo(tmp_path, monkeypatch):
    """The second process is one of its own; the first dies while it joins the parts, and is started again."""
    options = {"networks": 5, "optimizers": ("sgd",), "lrs": (0.1,), "weight_decays": (1e9, 0.0), "sampling": "grid"}
    path = tmp_path / "zoo"
    words = "--networks 5 --optimizers sgd --lrs 0.1 --weight-decays 1e9 0 --sampling grid --epochs 2 --limit 96"
    words += " --threads 1 --wave 4 --seed 1 --activations tanh relu --dropouts 0 0.2"
    command = ["zoo", "make", "--out", path, *words.split()]
    process = start(run_command, *command, said=tmp_path / "said", RANK="1", WORLD_SIZE="2")
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(ranks, "ROWS", 4)
        with monkeypatch.context() as dying:
            dying.setattr(ranks, "read_parts", die_after(ranks.read_parts, 2))
            with pytest.raises(KeyboardInterrupt):
                make(tiny(path, **options))
        assert 0 < len(Zoo.open(path)) < 12 and process.is_alive()
        joined = make(tiny(path, **options))
    codes, said = finish(process), (tmp_path / "said").read_text()
    assert codes == [0], said
    assert "states of" not in said and "states/s" not in said  # the first process speaks for all
    alone = make(tiny(tmp_path / "alone", **options))
    assert joined.dropped == alone.dropped > 0 and len(joined) == len(alone)
    assert joined.splits == alone.splits
    (weights, table), (expected, properties) = by_model_and_epoch(joined), by_model_and_epoch(alone)
    assert torch.equal(weights, expected) and table.equals(properties)
    files = {"log.jsonl", "models.parquet", "zoo.json"}
    assert {file.name for file in path.iterdir() if not file.match("weights-*")} == files
    assert_same(make(tiny(path, **options)), joined)


def die_after(pieces, count):
    def some(*args):
        for number, piece in enumerate(pieces(*args)):
            if number == count:
                raise KeyboardInterrupt
            yield piece

    return some


def test_number_of_processes_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "zoo/parts-of-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="WORLD_SIZE must be 3, the number of processes that began .*zoo, got 2"):
        make(tiny(tmp_path / "zoo"))
    zoo = Zoo.open(make_alone(tmp_path / "alone", monkeypatch))
    with ZooWriter(tmp_path / "begun", zoo.layout, zoo.symmetry, zoo.provenance):
        pass  # one process that was killed at once
    with pytest.raises(ValueError, match="WORLD_SIZE must be 1, the number of processes that began .*begun, got 2"):
        make(tiny(tmp_path / "begun"))


def make_alone(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("WORLD_SIZE")
        return make(tiny(path)).path


def test_parts_of_another_configuration_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(tiny(tmp_path / "zoo", lrs=(0.5,)))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"lrs must be \[0.5\], with which .*1 was begun, got \[0.1\]"):
        make(tiny(tmp_path / "zoo", lrs=(0.1,)))


def test_more_processes_than_networks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        with monkeypatch.context() as patch:
            if rank == "1":
                patch.setattr(ranks.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    make(tiny(tmp_path / "zoo", networks=1))
            else:
                zoo = make(tiny(tmp_path / "zoo", networks=1))
    assert len(zoo.properties["model"].unique()) == 1
    (tmp_path / "zoo/joined").mkdir()  # of a process that was killed at the end
    assert_same(make(tiny(tmp_path / "zoo", networks=1)), zoo)
    assert not (tmp_path / "zoo/joined").exists()


# --- the command


def test_explain_says_what_would_run(tmp_path, capsys):
    main(["zoo", "make", "--out", str(tmp_path / "zoo"), "--explain", "--limit", "96", "--validation", "20"])
    out = capsys.readouterr().out
    assert (
        "networks    240 of 1,486 weights; combinations of hyperparameters: 256" in out
        and "96 train, 20 val, 96 test, 1 x 8 x 8" in out
    )
    assert "states      6,240, 0.0371 GB on disk" in out and "side by side, small_cnn_step on cpu" in out
    assert "about" in out and "lrs             (0.01, 0.003, 0.001, 0.0003)" in out
    options = ["--limit", "40", "--schedule", "one-cycle", "--optimizers", "momentum", "--networks", "2"]
    main(["zoo", "make", "--out", str(tmp_path / "zoo"), "--explain", *options])
    out = capsys.readouterr().out
    assert "one network after the other in plain PyTorch, because schedule 'one-cycle' changes from step to step" in out
    assert not (tmp_path / "zoo").exists()


def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path):
    path = tmp_path / "zoo"
    with pytest.raises(
        ValueError, match="data must be the folder of the images of mnist-s-seed, got none; give --data"
    ):
        make(Config(out=str(path), preset="mnist-s-seed"))
    with pytest.raises(ValueError, match="batch_size must be at most 20, the images, got 32"):
        make(tiny(path, limit=20))
    with pytest.raises(ValueError, match="resnet18 must have relu and no dropout"):
        make(tiny(path, architecture="resnet18"))
    with pytest.raises(ValueError, match="order must be seeded where networks train one by one: schedule"):
        make(tiny(path, schedule="one-cycle", optimizers=("momentum",), order="published"))
    assert not path.exists()


def test_commands(tmp_path, capsys):
    options = ["--networks", "4", "--epochs", "1", "--limit", "64", "--lrs", "1e-2", "1e-3", "--threads", "1"]
    main(["zoo", "make", "--out", str(tmp_path), *options])
    out = capsys.readouterr().out
    assert f"{tmp_path}: 8 states of 4 networks, 0 left out as not finite" in out
    main(["zoo", "info", "--zoo", str(tmp_path)])
    out = capsys.readouterr().out
    assert "models: 4, states: 8" in out and "module_list.5.weight  [16, 48]" in out
    accuracy = Zoo.open(tmp_path).properties["test_accuracy"].to_numpy()
    (line,) = [line for line in out.splitlines() if line.startswith("test_accuracy")]
    assert [float(value) for value in line.split()[1:]] == pytest.approx(
        numpy.quantile(accuracy, [0, 0.25, 0.5, 0.75, 1]).tolist(), rel=1e-3
    )
