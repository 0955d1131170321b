"""Parquet files from outside: read a few rows at a time, no more than are wanted and than the file has room for."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from fastws.files.limits import open_regular, room
from fastws.terminal import shorten

ROWS = 1024  # that are read in one go
CELL = 64  # bytes that a cell of a wanted row may take, however few its column takes in the file


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """A parquet file that says that it unpacks to what its size has room for.

    Raises:
        FileNotFoundError: If there is none, or none any longer.
        OSError: If it is no regular file.
        ValueError: If it is no parquet file, or unpacks to more.
    """
    with open_regular(path):
        pass
    try:
        opened = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        metadata = opened.metadata
        sizes = (metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        unpacked = sum(max(0, size) for size in sizes)
    except FileNotFoundError:
        raise  # whoever writes the folder has merged it into another one
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: file must be parquet, got {shorten(str(error), 200)}; copy it again") from error
    if unpacked > room(path.stat().st_size):
        raise ValueError(f"{path}: file must not unpack to many times its size, got {unpacked:,} bytes")
    return opened


def batches_of(
    opened: pyarrow.parquet.ParquetFile, path: Path, columns: Sequence[str] | None = None
) -> Iterator[pyarrow.RecordBatch]:
    """Rows in order, a few at a time."""
    try:
        yield from opened.iter_batches(batch_size=ROWS, columns=columns, use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: file must be whole, got {shorten(str(error), 200)}; copy it again") from error


def read_rows(path: Path, rows: int) -> pyarrow.Table:
    """The first ``rows`` rows; fewer where there are not so many.

    Raises:
        OSError: If it is no regular file.
        ValueError: If it is damaged, or the rows take more than the file has room for.
    """
    opened, taken = open_parquet(path), []
    left = room(path.stat().st_size) + CELL * rows * len(opened.schema_arrow)
    count = 0
    for batch in batches_of(opened, path) if rows else ():
        batch = batch.slice(0, rows - count)
        count += len(batch)
        left -= batch.nbytes
        if left < 0:
            raise ValueError(f"{path}: rows must not take many times the size of the file, got more by row {count}")
        taken.append(batch)
        if count == rows:
            break
    return pyarrow.Table.from_batches(taken, opened.schema_arrow)
