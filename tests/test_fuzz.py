"""A short round of the fuzzing job; ``make fuzz`` takes minutes."""

import sys

import pytest
from fuzz import CASES, fuzz


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_read_or_refused_in_one_sentence(name, tmp_path):
    assert fuzz(name, 12, seed=1, folder=tmp_path / "files") == []
