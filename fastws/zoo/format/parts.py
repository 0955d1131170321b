"""The files of a zoo folder: weights as safetensors, properties as parquet, each with what it must hold."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from fastws.files.atomic import write_atomically
from fastws.files.parquet import read_rows
from fastws.files.safetensors import DTYPES, read_safetensors_header
from fastws.zoo.format.manifest import MANIFEST

WEIGHTS = "weights"  # name of the tensor in every safetensors file of a zoo
ALIGNMENT = 64  # bytes, of the first weight in its file
CHUNK = 2**26  # bytes that are read or written at a time


def is_number(kind: pyarrow.DataType) -> bool:
    """Whether a property of this type has numbers, or no values at all."""
    types = pyarrow.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)


def find_nonfinite(rows: Tensor) -> Tensor:
    """Which rows hold NaN or infinity, int64."""
    # one pass in the usual case: a sum is finite only if all numbers are
    if rows.sum(dtype=torch.float64).isfinite():
        return torch.empty(0, dtype=torch.int64)
    return (~rows.isfinite().all(1)).nonzero().flatten()


def map_weights(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory-maps the weights of one file, after checking all that its header says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file must be there, {MANIFEST} lists it; restore it")
    header = read_safetensors_header(path).get(WEIGHTS)
    if header is None:
        raise ValueError(f"{path}: file must hold a tensor {WEIGHTS!r}, got none; restore it")
    if header.shape != shape or header.dtype != dtype or not dtype.is_floating_point:
        expected, got = f"{dtype} {list(shape)}", f"{header.dtype} {list(header.shape)}"
        raise ValueError(f"{path}: {WEIGHTS!r} must be {expected}, as {MANIFEST} says, got {got}; restore it")
    if header.begin % dtype.itemsize:
        raise ValueError(f"{path}: weights must begin at a multiple of {dtype.itemsize} bytes, got {header.begin}")
    try:
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=header.end)
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: file must stay there while it is opened, got {error}") from error
    offset = header.begin // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, (shape[1], 1))


def read_models(path: Path, rows: int) -> pyarrow.Table:
    """The first ``rows`` rows of a properties file: more may have been added since it was listed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file must be there, {MANIFEST} lists it; restore it")
    table = read_rows(path, rows)
    if len(table) < rows or "model" not in table.column_names:
        raise ValueError(f"{path}: file must hold {rows} rows with a column 'model', got {len(table)}; restore it")
    check_columns(path, table)
    return table


def check_columns(path: Path, table: pyarrow.Table) -> None:
    """Raises ValueError unless models have names and epochs are whole numbers."""
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"{path}: columns must have names of their own, got one twice; restore it")
    types, model = pyarrow.types, table.schema.field("model").type
    plain = model.value_type if types.is_dictionary(model) else model
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_integer(plain) or types.is_null(plain)):
        raise ValueError(f"{path}: column 'model' must hold names or whole numbers, got {model}; restore it")
    epoch = table.schema.field("epoch").type if "epoch" in table.column_names else pyarrow.null()
    if not is_number(epoch):
        raise ValueError(f"{path}: column 'epoch' must hold whole numbers, got {epoch}")


def to_table(properties: Mapping[str, object], rows: int, schema: pyarrow.Schema | None) -> pyarrow.Table:
    """Columns of ``rows`` entries each as a table, of the columns and types of ``schema`` if there is one."""
    if "model" not in properties:
        raise ValueError(f"append: properties must have a column 'model', got {', '.join(properties) or 'none'}")
    columns = {}
    for name, column in properties.items():
        column = column.detach().cpu().numpy() if isinstance(column, Tensor) else column
        column = [str(model) for model in column] if name == "model" else column
        if len(column) != rows:
            raise ValueError(f"append: column {name!r} must have {rows} entries like rows, got {len(column)}")
        try:
            columns[name] = pyarrow.array(column)
        except pyarrow.ArrowException as error:
            raise ValueError(f"append: column {name!r} must be of one simple type, got {error}") from error
    table = pyarrow.table(columns)
    if schema is None:
        return table
    different = sorted(set(schema.names) ^ set(columns))
    if different:
        raise ValueError(f"append: columns must be those of the zoo, {schema.names}, which differ in {different}")
    try:
        return table.select(schema.names).cast(schema)
    except pyarrow.ArrowException as error:
        raise ValueError(f"append: columns must have the types of the zoo, got {error}") from error


def write_weights(path: Path, parts: Iterable[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Writes a safetensors file with one tensor of ``shape``, whose rows come in ``parts``, atomically."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    size = shape[0] * shape[1] * dtype.itemsize
    header = json.dumps({WEIGHTS: {"dtype": name, "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with write_atomically(path, 8 + len(header) + size) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.write(part.contiguous().view(torch.uint8).numpy().data)


def write_models(path: Path, table: pyarrow.Table) -> None:
    with write_atomically(path, table.nbytes) as file:
        pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
