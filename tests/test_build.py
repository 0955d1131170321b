"""setup.py compiles what changed, for the compiler and the flags that are asked for, and says what it misses."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_tools = pytest.mark.skipif(not shutil.which("c++") or not find_spec("ninja"), reason="needs c++ and ninja")
# setup.py, where shutil.which does not find the program that is named first
WITHOUT = """import runpy, shutil, sys
which, missing = shutil.which, sys.argv.pop(1)
shutil.which = lambda name, **options: None if name == missing else which(name, **options)
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")"""


@pytest.fixture
def checkout(tmp_path):
    """A small one: two sources, of which one includes a header."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastws/version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    sources = {"cpu/plain.cpp": "int one() { return 1; }", "two.h": "int two();", "three.h": "int three();"}
    sources["cpu/with_header.cpp"] = '#include "two.h"\nint two() { return 2; }'
    for name, text in sources.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return tmp_path


def build(checkout, *command, **variables):
    command = command or ("setup.py", "build_ext", "--inplace")
    variables = os.environ | {"FASTWS_BUILD": "cpu"} | variables
    return subprocess.run([sys.executable, *command], cwd=checkout, env=variables, capture_output=True, text=True)


def compiled(done):
    """The sources that were compiled."""
    assert done.returncode == 0, done.stderr
    return {Path(line.split()[-1]).stem for line in done.stdout.splitlines() if line.endswith(".cpp")}


@needs_tools
def test_what_changed_is_compiled(checkout):
    assert compiled(build(checkout)) == {"plain", "with_header"}
    library = checkout / "fastws/_C.so"
    assert library.exists()
    assert compiled(build(checkout)) == set()
    (checkout / "csrc/three.h").write_text("int four();\n")  # which nobody includes
    assert compiled(build(checkout)) == set()
    (checkout / "csrc/two.h").write_text("int two();\nint four();\n")
    assert compiled(build(checkout)) == {"with_header"}
    newest = max(path.stat().st_mtime for path in checkout.glob("csrc/**/*.*"))
    assert library.stat().st_mtime >= newest


@needs_tools
def test_other_flags_have_objects_of_their_own(checkout):
    build(checkout)
    plain = (checkout / "fastws/_C.so").read_bytes()
    assert compiled(build(checkout, CXXFLAGS="-g -DNAME='\"a $ b\"'")) == {"plain", "with_header"}
    assert (checkout / "fastws/_C.so").read_bytes() != plain
    assert compiled(build(checkout)) == set()
    assert (checkout / "fastws/_C.so").read_bytes() == plain


@needs_tools
def test_an_error_of_the_compiler_ends_the_build(checkout):
    (checkout / "csrc/cpu/plain.cpp").write_text("int one() { return two; }\n")
    done = build(checkout)
    assert done.returncode != 0 and "was not declared" in done.stdout + done.stderr
    assert not (checkout / "fastws/_C.so").exists()


@pytest.mark.skipif(not shutil.which("c++"), reason="needs c++")
def test_without_ninja_one_sentence_says_how_to_get_it(checkout):
    done = build(checkout, "-c", WITHOUT, "ninja", "build_ext", "--inplace")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "pip install torch ninja" in done.stderr


def test_without_a_compiler_nothing_is_built(checkout):
    done = build(checkout, "-c", WITHOUT, "c++", "build_ext", "--inplace", FASTWS_BUILD="none")
    assert done.returncode == 0 and "the PyTorch references serve" in done.stderr
    assert not (checkout / "fastws/_C.so").exists()
