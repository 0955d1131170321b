"""What a pickle may make: tensors that stay in their file, numbers, strings, arrays and containers, nothing else."""

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy
import torch

MAX_AXES = 64  # torch's limit
LONGEST_NAME = 10_000  # characters of a key: keys are compared and hashed again and again
CODE = re.compile(r"[biufcSU]\d{1,9}")  # of numpy dtypes: numbers and strings, no objects, no records
SCALARS = {int, float, bool, type(None), str, bytes}


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


class OtherTensor(NamedTuple):
    """A tensor that is no strided array of numbers, and is not read."""

    kind: str  # sparse, quantised, nested, meta or subclass
    shape: tuple[int, ...] = ()  # where the pickle says it plainly


class Record(dict):
    """The attributes of an object whose class is not needed."""


class ArrayType:
    """A numpy dtype on its way out of a pickle."""

    __slots__ = ("code", "order")

    def __init__(self, code: object):
        self.code, self.order = code, "|"

    def resolve(self) -> numpy.dtype:
        if not isinstance(self.code, str) or not CODE.fullmatch(self.code) or self.order not in ("|", "<", ">", "="):
            raise Refused("arrays must hold numbers or strings, got another numpy dtype; it is refused")
        return numpy.dtype(self.code).newbyteorder(self.order)


class Array:
    """A numpy array on its way out of a pickle; ``value`` is the array."""

    __slots__ = ("value",)

    def __init__(self):
        self.value = numpy.empty(0)

    def set(self, state: object) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(data, bytes) or not is_shape(shape):
            raise Refused("arrays must have bytes and a shape of whole numbers, got others; it is refused")
        self.value = numpy.frombuffer(data, resolve(dtype)).reshape(shape, order="F" if fortran else "C")


class Call:
    """A function that a pickle may call.

    Attributes:
        function: Takes ``spend`` and the arguments; ``spend(n)`` is told of n bytes of memory before they are taken.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function


def is_shape(shape: object) -> bool:
    """Whether it is a tuple or list of a few whole numbers from 0."""
    # the number of axes comes first: a long shape may be shared by many tensors
    return isinstance(shape, tuple | list) and len(shape) <= MAX_AXES and all(type(n) is int and n >= 0 for n in shape)


def check_key(key: object) -> None:
    """Raises Refused for keys of dictionaries and sets that are dear to hash or to compare."""
    entries: Sequence = key if type(key) is tuple else (key,)
    if len(entries) > MAX_AXES or not SCALARS.issuperset(map(type, entries)):
        raise Refused("keys must be strings, numbers or short tuples of these, got others; it is refused")
    for entry in entries:
        if isinstance(entry, str | bytes) and len(entry) > LONGEST_NAME:
            raise Refused(f"keys must have at most {LONGEST_NAME:,} characters, got {len(entry):,}; it is refused")
        if isinstance(entry, int) and not -(2**63) <= entry < 2**64:
            raise Refused("keys that are numbers must have 64 bits, got more; it is refused")


def resolve(dtype: object) -> numpy.dtype:
    if not isinstance(dtype, ArrayType):
        raise Refused("arrays must have a numpy dtype, got none; it is refused")
    return dtype.resolve()


# --- functions that a pickle may call; the first argument tells of memory


def rebuild_tensor(spend, storage, offset, shape, stride, *_) -> StoredTensor:
    if not isinstance(storage, Storage) or type(offset) is not int or not is_shape(shape) or not is_shape(stride):
        raise Refused(
            "tensors must have a storage and whole numbers from 0 for offset, shape and stride; it is refused"
        )
    if offset < 0 or len(shape) != len(stride):
        raise Refused("tensors must have an offset from 0 and a stride for each axis; it is refused")
    spend(200)
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def rebuild_any_dtype(spend, storage, offset, shape, stride, requires_grad, hooks, dtype, *_) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise Refused("tensors must have a storage and a dtype; it is refused")
    return rebuild_tensor(spend, Storage(storage.key, dtype), offset, shape, stride)


def rebuild_from_type(spend, function, kind, arguments, *_):
    if not isinstance(function, Call) or function.function in (rebuild_from_type, first_argument):
        raise Refused("tensors must be rebuilt by a function of torch; it is refused")
    return function.function(spend, *arguments)


def other_tensor(kind: str, place: int | None = None) -> Call:
    """For tensors that are not read, whose shape is the argument in this place."""

    def rebuild(spend, *arguments) -> OtherTensor:
        shape = arguments[place] if place is not None and place < len(arguments) else ()
        return OtherTensor(kind, tuple(shape) if is_shape(shape) else ())

    return Call(rebuild)


def first_argument(spend, value, *_):
    return value


def make_dict(spend, pairs=(), *_) -> dict:
    """Of an OrderedDict, which protocols 0 and 1 give its pairs."""
    if not isinstance(pairs, list | tuple | dict):
        return {}  # a defaultdict is given what it makes for missing keys
    found = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        spend(100)
        check_key(key)
        found[key] = value
    return found


def make_set(kind: type) -> Call:
    def make(spend, entries=()):
        if not isinstance(entries, list | tuple):
            raise Refused("sets must be made of lists; it is refused")
        spend(100 * len(entries))
        for entry in entries:
            check_key(entry)
        return kind(entries)

    return Call(make)


def make_tuple(spend, entries=()):
    if not isinstance(entries, list | tuple):
        raise Refused("tuples must be made of lists; it is refused")
    spend(8 * len(entries))
    return tuple(entries)


def make_complex(spend, real, imaginary=0.0):
    if not all(isinstance(part, int | float) for part in (real, imaginary)):
        raise Refused("complex numbers must have two numbers; it is refused")
    return complex(real, imaginary)


def make_bytes(spend, text="", *_):
    """How protocol 2 keeps bytes."""
    if not isinstance(text, str):
        raise Refused("bytes must be made of a string; it is refused")
    spend(len(text))
    return text.encode("latin1")


def join_path(spend, *parts):
    if not all(isinstance(part, str) for part in parts):
        raise Refused("paths must be made of strings; it is refused")
    spend(2 * sum(map(len, parts)))
    return str(PurePosixPath(*parts))


def read_scalar(spend, dtype, data=b""):
    found = resolve(dtype)
    spend(4 * found.itemsize)
    return numpy.frombuffer(data, found, 1)[0].item()


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
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "Untyped": torch.uint8,
}
ALLOWED = {
    "collections.OrderedDict": Call(make_dict),
    "collections.defaultdict": Call(make_dict),
    "collections.Counter": Call(make_dict),
    "torch._utils._rebuild_tensor": Call(rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Call(rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": Call(rebuild_any_dtype),
    "torch._utils._rebuild_parameter": Call(first_argument),
    "torch._utils._rebuild_parameter_with_state": Call(first_argument),
    "torch._tensor._rebuild_from_type_v2": Call(rebuild_from_type),
    "torch._utils._rebuild_sparse_tensor": other_tensor("sparse"),
    "torch._utils._rebuild_qtensor": other_tensor("quantised", 2),
    "torch._utils._rebuild_nested_tensor": other_tensor("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": other_tensor("meta", 1),
    "torch._utils._rebuild_wrapper_subclass": other_tensor("subclass", 2),
    "torch.serialization._get_layout": Call(first_argument),
    "torch.Size": Call(make_tuple),
    "torch.device": Call(first_argument),
    "torch.Tensor": "torch.Tensor",  # stands where a type is told
    "torch.nn.parameter.Parameter": "torch.nn.Parameter",
    "torch.per_tensor_affine": "torch.per_tensor_affine",
    "torch.per_channel_affine": "torch.per_channel_affine",
    "_io.BytesIO": Call(
        lambda spend, *_: Record()
    ),  # some modules keep their extra state in one; what is in it is left
    "numpy.ndarray": Call(lambda spend, *_: Array()),
    "numpy.dtype": Call(lambda spend, code="", *_: ArrayType(code)),
    "_codecs.encode": Call(make_bytes),
}
ALLOWED |= {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}
ALLOWED["torch.storage.UntypedStorage"] = torch.uint8
ALLOWED |= {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
for python in ("builtins", "__builtin__"):
    ALLOWED |= {f"{python}.set": make_set(set), f"{python}.frozenset": make_set(frozenset)}
    ALLOWED |= {f"{python}.complex": Call(make_complex), f"{python}.bytes": Call(make_bytes)}
for core in ("numpy.core", "numpy._core"):
    ALLOWED[f"{core}.multiarray._reconstruct"] = ALLOWED["numpy.ndarray"]
    ALLOWED[f"{core}.multiarray.scalar"] = Call(read_scalar)
for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
    ALLOWED |= {f"pathlib.{name}": Call(join_path), f"pathlib._local.{name}": Call(join_path)}
