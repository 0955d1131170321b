"""What a command says: text from files without what a terminal would obey, and an end in one sentence."""

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import TextIO

LAYOUT = frozenset("\n\t\r")  # not printable, and harmless
AGAIN = "run the same command again to resume"


class Stopped(SystemExit):
    """Somebody asked a command to stop; the exit code is what shells expect of it: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, sentence: str, number: int):
        super().__init__(sentence)
        self.code = 128 + number


class Escaped:
    """A stream that escapes what is written into it: names in files may be anything."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text if text.isprintable() else escape(text, LAYOUT))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def escape(text: str, kept: frozenset[str] = frozenset()) -> str:
    """Text for a terminal: characters that it would obey, or cannot show, are written as escapes."""
    if text.isprintable():
        return text
    # the Escape of a colour becomes the four characters \x1b
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, length: int = 80) -> str:
    """Escaped text of at most ``length`` characters, for a sentence."""
    return escape(text[:length] + ("..." if len(text) > length else ""))


@contextmanager
def one_sentence(command: str = "fastws") -> Iterator[None]:
    """Ends the program with one sentence if the input is wrong or somebody stops it; FASTWS_DEBUG=1 shows where."""

    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second request does not wait for anything
        raise Stopped(f"{command}: stopped by {signal.Signals(number).name}; {AGAIN}", number)

    with handled(stop, signal.SIGTERM, signal.SIGINT):
        try:
            yield
        except Stopped as error:
            print(f"\nfastws: {escape(str(error))}", file=sys.stderr)
            raise
        except (ValueError, OSError, FloatingPointError, MemoryError, RecursionError) as error:
            if os.environ.get("FASTWS_DEBUG") == "1":
                raise
            sys.exit(f"fastws: {escape(describe(error))}")
        except RuntimeError as error:
            # torch has no class of its own for memory that a CPU has not
            lacking = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
            if not lacking or os.environ.get("FASTWS_DEBUG") == "1":
                raise
            sys.exit(f"fastws: {escape(describe(MemoryError(str(error).splitlines()[0])))}")


def describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"memory must hold what is read and computed, got too little: {error or 'none is left'}"
    if isinstance(error, RecursionError):
        return "files must not be nested as deep as one of these; see where with FASTWS_DEBUG=1"
    return str(error)


@contextmanager
def handled(handler, *numbers: int) -> Iterator[None]:
    """Installs a handler of signals, where that is possible: in the main thread, and not where they are ignored."""
    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, handler)
    except ValueError:  # another thread
        before.clear()
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def json_alone(wanted: bool) -> AbstractContextManager:
    """A context in which everything that is printed goes to stderr, where stdout is for JSON alone."""
    return redirect_stdout(sys.stderr) if wanted else nullcontext()


def tell(found: Mapping, lines: Iterable[str], as_json: bool) -> None:
    """Prints what a command found, as JSON or in lines."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for line in lines:
        print(line)


def escaped_output() -> redirect_stdout:
    """A context in which everything that is printed is escaped."""
    return redirect_stdout(Escaped(sys.stdout))
