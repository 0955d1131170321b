"""How tests run things: in one thread, in two processes, and so that every state of the disk is kept."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryFile

import pytest
import torch


@contextmanager
def one_thread():
    """Sums depend on the number of threads; and where another program runs too, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_two_processes(*command):
    """Runs a script in two processes that know of each other, as torchrun does."""
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environments = [os.environ | shared | {"RANK": number, "LOCAL_RANK": number} for number in "01"]
    command = [sys.executable, *map(str, command)]
    with ExitStack() as stack:
        said = [stack.enter_context(TemporaryFile("w+")) for _ in environments]
        running = [
            subprocess.Popen(command, env=env, stderr=file) for env, file in zip(environments, said, strict=True)
        ]
        codes = [process.wait(timeout=120) for process in running]
        if codes != [0, 0]:
            for file in said:
                file.seek(0)
            raise AssertionError(f"exit codes {codes}: {' / '.join(file.read()[-1500:] for file in said)}")


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
