"""How tests run things: in one thread, in two processes, and so that every state of the disk is kept."""

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch


@contextmanager
def one_thread():
    """Sums depend on the number of threads; and where another program runs too, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# children of one process that has imported torch, which takes two seconds of each that begins anew
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch"])


def start(work, *arguments, said=os.devnull, **environment):
    """A process that runs a function of a module; what it prints goes to the file ``said``."""
    given = work, arguments, str(said), os.environ | environment
    process = CHILDREN.Process(target=begin, args=given, daemon=True)
    process.start()
    return process


def begin(work, arguments, said, environment):
    os.environ.clear()
    os.environ.update(environment)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have processes in the background ignore it
    torch.set_num_threads(1)
    work(*arguments)


def run_script(path, *words):
    """``python path words``"""
    sys.argv = [str(path), *map(str, words)]
    runpy.run_path(str(path), run_name="__main__")


def run_code(code):
    """``python -c code`` where torch is imported already."""
    exec(code, {})


def run_command(*words):
    """``python -m fastws words``"""
    sys.argv = ["fastws", *map(str, words)]
    runpy.run_module("fastws", run_name="__main__")


def finish(*processes, timeout=120):
    """The exit codes of processes that are waited for."""
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def run_two_processes(path, *words):
    """Runs a script in two processes that know of each other, as torchrun does."""
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with TemporaryDirectory() as folder:
        files = [Path(folder, number) for number in "01"]
        running = [
            start(run_script, path, *words, said=file, RANK=file.name, LOCAL_RANK=file.name, **shared) for file in files
        ]
        codes = finish(*running)
        assert codes == [0, 0], f"exit codes {codes}: {' / '.join(file.read_text()[-1500:] for file in files)}"


@contextmanager
def keep_moments(path, folder):
    """Copies of a zoo from whenever anything reached the disk, as a power cut would leave it."""
    moments, fsync = [], os.fsync

    def fsync_and_copy(file):
        fsync(file)
        if (path / "zoo.json").exists():
            moments.append(shutil.copytree(path, folder / f"moment {len(moments)}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync_and_copy)
        yield moments
