"""JSON from outside: nested a little, in UTF-8, with no more objects than its size has room for."""

import json
import os
import re
from itertools import accumulate
from pathlib import Path

from fastws.files.kinds import find_kind
from fastws.files.limits import read_bytes, room

DEEPEST = 100  # values in values
OBJECT = 72  # bytes of the smallest list or dictionary
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
BRACKET = re.compile(r"[\[{\]}]")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read(path: str | os.PathLike) -> object:
    """What a JSON file holds.

    Raises:
        OSError: If it cannot be read, or is no regular file.
        ValueError: If it is no JSON, see ``parse``; files of another kind are called by their names.
    """
    content = read_bytes(path)
    try:
        return parse(content, f"{path}: file")
    except ValueError:
        if kind := find_kind(Path(path), "JSON"):
            raise ValueError(f"{path}: file must be JSON, got {kind}") from None
        raise


def parse(text: str | bytes, where: str) -> object:
    """The value that a JSON text stands for.

    Args:
        text: In UTF-8 if it is bytes; a byte order mark is dropped.
        where: What the text is, which begins the sentence of an error.

    Raises:
        ValueError: If it is no JSON, is nested more than ``DEEPEST`` deep, holds half a character, or more small
            objects than its size has room for.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        check_depth(text, where)
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError(f"{where} must be text in UTF-8, got {error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON, got {error}") from None
    return value


def check_depth(text: str, where: str) -> None:
    count = text.count("[") + text.count("{")
    if count * OBJECT > room(len(text)):
        raise ValueError(f"{where} must be JSON of fewer objects than its size has room for, got {count:,}")
    if count > DEEPEST:
        steps = (1 if bracket in "[{" else -1 for bracket in BRACKET.findall(STRING.sub("", text)))
        if max(accumulate(steps)) > DEEPEST:
            raise ValueError(f"{where} must be JSON of at most {DEEPEST} values in values, got more")
