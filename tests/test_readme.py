"""The README's code runs, in order, and its commands are there."""

import re
from pathlib import Path

from fastws.cli import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_readme_code_runs(capsys):
    exec("\n".join(re.findall(r"```python\n(.*?)```", README, re.S)), {})
    assert "conv1.weight" in capsys.readouterr().out


def test_readme_commands_exist():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    used = re.findall(r"^fastws ([a-z]+(?: [a-z]+)?)(?= |$)", shell, re.M)
    assert len(used) >= 8 and [command for command in used if command not in COMMANDS] == []
