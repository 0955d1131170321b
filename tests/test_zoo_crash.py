"""A writer may die at any byte: what it had confirmed is there, readers read it, and another writer goes on."""

import io
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import finish, start
from test_zoo import LAYOUT, assert_holds, describe, numbered

from fastws.files import atomic
from fastws.zoo import Zoo, ZooWriter
from fastws.zoo.format import writer


class Death(BaseException):
    """Nobody handles it, as nobody handles SIGKILL."""


class Disk:
    """Lets a process live until it has done so many things to the disk; afterwards nothing that it does counts.

    A thing is a byte written, a file renamed or removed, or an fsync. What happened before is on the disk.
    """

    def __init__(self, budget: int):
        self.left, self.dead = budget, False

    def spend(self, things: int) -> int:
        """How many of these are done."""
        if self.dead or things > self.left:
            done, self.left, self.dead = 0 if self.dead else self.left, 0, True
            return done
        self.left -= things
        return things

    def guard(self, function):
        def guarded(*args, **options):
            if self.spend(1) < 1:
                raise Death
            return function(*args, **options)

        return guarded

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(atomic, "open", lambda path, mode: MortalFile(self, path, mode), raising=False)
        self.patch.setattr(writer, "MERGE", 2)
        self.patch.setattr(os, "fsync", self.guard(lambda file: None))
        for name in ("unlink", "replace"):
            self.patch.setattr(Path, name, self.guard(getattr(Path, name)))
        return self

    def __exit__(self, *_):
        self.patch.undo()


class MortalFile(io.FileIO):
    def __init__(self, disk: Disk, path, mode: str):
        super().__init__(path, mode)
        self.disk = disk

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        done = self.disk.spend(len(data))
        super().write(data[:done])
        if done < len(data):
            raise Death
        return done


def work(path, confirmed: list[int]) -> None:
    """Two writers, one after the other; ``confirmed`` gets the number of states that each append has promised."""
    for appends in ((2, 1, 3), (1, 2)):
        with ZooWriter(path, LAYOUT, shard_bytes=200) as zoo:
            for count in appends:
                zoo.append(numbered(len(zoo), count), describe(len(zoo), count))
                confirmed.append(len(zoo))


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> int:
    """How many things a writer that lives does."""
    with Disk(10**9) as disk:
        work(tmp_path_factory.mktemp("zoo") / "zoo", [])
    return 10**9 - disk.left


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_writer_may_die_at_any_byte(tmp_path_factory, things, data):
    path, confirmed = tmp_path_factory.mktemp("zoo") / "zoo", []
    with Disk(data.draw(st.integers(0, things))), suppress(Death):
        work(path, confirmed)
    if not (path / "zoo.json").exists():
        assert not confirmed
        with pytest.raises(FileNotFoundError, match="zoo must be a folder with a zoo.json"):
            Zoo.open(path)
    else:
        zoo = Zoo.open(path)
        assert_holds(zoo, len(zoo))
        assert len(zoo) in (max(confirmed, default=0), {0: 2, 2: 3, 3: 6, 6: 7, 7: 9, 9: 9}[max(confirmed, default=0)])
    with ZooWriter(path, LAYOUT) as zoo:
        count = len(zoo)
        zoo.append(numbered(count, 2), describe(count, 2))
    assert_holds(Zoo.open(path), count + 2)
    assert sorted(file.name[:6] for file in path.iterdir()) == ["models", "weight", "zoo.js"]


def write_without_end(path, pipe):
    with ZooWriter(path, LAYOUT) as zoo:
        while True:
            zoo.append(numbered(len(zoo), 3), describe(len(zoo), 3))
            os.write(pipe, b"%d\n" % len(zoo))


def apply(path, pipe):
    try:
        writer = ZooWriter(path, LAYOUT)
        os.write(pipe, b"accepted\n")
        time.sleep(60)
        writer.close()
    except BlockingIOError:
        os.write(pipe, b"refused\n")
        time.sleep(60)


def fork(work, path):
    reader, pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        work(path, pipe)
    os.close(pipe)
    return pid, reader


def compete(folder):
    """Prints the last answer of each of five writers and six that apply for one zoo, which are killed."""
    chance = random.Random(0)
    children = [fork(write_without_end, folder / str(number)) for number in range(5)]
    children += [fork(apply, folder / "crowd") for _ in range(6)]
    answers = [os.read(reader, 9) for _, reader in children]  # all are at work
    for (pid, reader), answer in zip(children, answers, strict=True):
        time.sleep(chance.random() / 20)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while part := os.read(reader, 2**16):
            answer += part
        print(answer.split()[-1].decode())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_compete_and_are_killed(tmp_path):
    assert finish(start(compete, tmp_path, said=tmp_path / "said")) == [0]
    answers = (tmp_path / "said").read_text().split()
    assert sorted(answers[5:]) == ["accepted", *["refused"] * 5]
    for number, confirmed in enumerate(map(int, answers[:5])):
        zoo = Zoo.open(tmp_path / str(number))
        assert_holds(zoo, len(zoo))
        assert len(zoo) - confirmed in (0, 3)
        with ZooWriter(tmp_path / str(number), LAYOUT) as again:
            again.append(numbered(len(zoo), 1), describe(len(zoo), 1))
        assert_holds(Zoo.open(tmp_path / str(number)), len(zoo) + 1)
    ZooWriter(tmp_path / "crowd", LAYOUT).close()  # the lock of a dead writer is none
