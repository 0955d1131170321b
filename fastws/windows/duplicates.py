"""Networks whose numbers are the same, without reading those that differ."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fastws.files.limits import open_regular

Files = Sequence[tuple[Path, int]]  # of a network, and the byte at which the numbers of each begin
PLACES, LENGTH = (4, 64), 256  # of a file that are compared first, and their bytes
PIECE = 1 << 20  # bytes that are read at a time


def find_duplicates(networks: Sequence[Files]) -> dict[int, int]:
    """Networks whose files hold the same numbers as those of one before them, and which that is.

    A few places of each file are compared first, then more of those that are left, and last all bytes: so that a file
    is read as a whole only if it most likely is another's copy.

    Args:
        networks: Of one architecture, so that files have numbers of one size.
    """
    groups = [list(range(len(networks)))]
    looks = [*(lambda path, data, count=count: sample(path, data, count) for count in PLACES), digest]
    for look in looks:
        groups = [part for group in groups if len(group) > 1 for part in tell_apart(networks, group, look)]
    return {row: group[0] for group in groups for row in group[1:]}


def tell_apart(networks: Sequence[Files], group: list[int], look: Callable[[Path, int], bytes]) -> list[list[int]]:
    found: dict[tuple, list[int]] = {}
    for row in group:
        found.setdefault(tuple(look(path, data) for path, data in networks[row]), []).append(row)
    return list(found.values())


def sample(path: Path, data: int, count: int) -> bytes:
    """The bytes at so many places of a file, the first and the last among them."""
    with open_regular(path) as file:
        room = max(0, file.seek(0, 2) - data - LENGTH)
        pieces = []
        for number in range(count):
            file.seek(data + room * number // (count - 1))
            pieces.append(file.read(LENGTH))
    return b"".join(pieces)


def digest(path: Path, data: int) -> bytes:
    found = hashlib.blake2b()
    with open_regular(path) as file:
        file.seek(data)
        while piece := file.read(PIECE):
            found.update(piece)
    return found.digest()
