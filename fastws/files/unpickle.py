"""A restricted unpickler: tensors that stay in their file, numbers, strings, arrays and containers, nothing else."""

import pickle
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy
import torch

PUBLISHED = ("checkpoints_to_datasets.", "ghrp.", "model_definitions.", "torch.utils.data.")  # classes read as Record


class Refused(ValueError):
    """A pickle wants something that is neither a tensor, a number, a string nor a container.

    Attributes:
        published: Whether it named a class of the published data sets before.
    """

    def __init__(self, message: str, published: bool = False):
        super().__init__(message)
        self.published = published


class Storage(NamedTuple):
    """The numbers behind one or several tensors."""

    key: str
    dtype: torch.dtype


class StoredTensor(NamedTuple):
    """A tensor that is still in its file; offset and stride count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class Record(dict):
    """The attributes of an object whose class is not needed."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


class Ordered(dict):
    """An OrderedDict; the versions that modules note in theirs are dropped."""

    def __setstate__(self, state):
        pass


class ArrayType:
    """A numpy dtype on its way out of a pickle."""

    __slots__ = ("code", "order")

    def __init__(self, code, *_):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        self.order = state[1]

    def resolve(self) -> numpy.dtype:
        if not isinstance(self.code, str) or self.code[:1] not in "biufcSU":
            raise Refused(f"arrays must hold numbers or strings, got numpy dtype {self.code!r}; it is refused")
        return numpy.dtype(self.code).newbyteorder(self.order)


class Array:
    """A numpy array on its way out of a pickle; ``value`` is the array."""

    __slots__ = ("value",)

    def __init__(self, *_):
        self.value = numpy.empty(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        flat = numpy.frombuffer(data, dtype.resolve())
        self.value = flat.reshape(shape, order="F" if fortran else "C")


class Call:
    """A function that a pickle may call, which has no attributes for it to set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "function", function)

    def __call__(self, *args):
        return self.function(*args)

    def __setattr__(self, name, value):
        raise Refused(f"attributes of functions must stay as they are, got a new {name}; it is refused")


def rebuild_tensor(storage, offset, shape, stride, *_) -> StoredTensor:
    if not isinstance(storage, Storage) or not all(isinstance(n, int) for n in (offset, *shape, *stride)):
        raise Refused("tensors must have a storage and whole numbers for shape and stride; it is refused")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def read_scalar(dtype, data=b""):
    return numpy.frombuffer(data, dtype.resolve(), 1)[0].item()


STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
first_argument = Call(lambda value, *_: value)
join_path = Call(lambda *parts: str(PurePosixPath(*map(str, parts))))
ALLOWED = {
    "collections.OrderedDict": Ordered,
    "torch._utils._rebuild_tensor": Call(rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Call(rebuild_tensor),
    "torch._utils._rebuild_parameter": first_argument,
    "torch._utils._rebuild_parameter_with_state": first_argument,
    "torch.Size": tuple,
    "torch.device": first_argument,
    "numpy.ndarray": Array,
    "numpy.dtype": ArrayType,
    "_codecs.encode": Call(lambda text, _: str.encode(text, "latin1")),  # how protocol 2 keeps bytes
}
ALLOWED |= {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}
for python in ("builtins", "__builtin__"):
    ALLOWED |= {f"{python}.set": set, f"{python}.frozenset": frozenset, f"{python}.complex": complex}
for core in ("numpy.core", "numpy._core"):
    ALLOWED |= {f"{core}.multiarray._reconstruct": Array, f"{core}.multiarray.scalar": Call(read_scalar)}
for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
    ALLOWED |= {f"pathlib.{name}": join_path, f"pathlib._local.{name}": join_path}


class Unpickler(pickle.Unpickler):
    """Makes containers, numbers, strings, arrays and ``StoredTensor``; whatever else a pickle names is refused.

    Nothing is imported. What can be called is in ``ALLOWED`` and makes plain values only.
    """

    def __init__(self, file, storages: dict[str, torch.dtype] | None = None):
        super().__init__(file, encoding="latin1")
        self.storages = {} if storages is None else storages
        self.published = False

    def find_class(self, module: str, name: str):
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if full.startswith(PUBLISHED):
            self.published = True
            return Record
        named = ascii(full)[1:-1][:200]  # anything may stand there, escapes that a terminal obeys among it
        what = f"file must hold tensors, numbers, strings and containers only, got {named}; it is refused"
        raise Refused(what, self.published)

    def persistent_load(self, saved):
        kind, dtype, key, _, _, *view = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
            raise Refused(f"persistent values must be plain storages, got {str(saved)[:80]}; it is refused")
        self.storages[key] = dtype
        return Storage(key, dtype)
