"""A restricted unpickler: what a pickle may make stands in ``values``, and it makes no more than its file has room for.

The standard library's unpickler can be told which functions a pickle may call, and no more: one code makes it take
gigabytes, and keys that are tuples of tuples are hashed for ever or end the process. So the codes are read here.
"""

import codecs
import struct
from collections.abc import Callable

import torch

from fastws.files.limits import room
from fastws.files.values import ALLOWED, Array, ArrayType, Call, Record, Refused, Storage, check_key
from fastws.terminal import shorten

PUBLISHED = ("checkpoints_to_datasets.", "ghrp.", "model_definitions.", "torch.utils.data.")  # classes read as Record
STOP = ord(".")
MAX_NUMBER = 255  # bytes of a whole number
FLOAT = struct.Struct(">d")
# bytes that Python takes for what one code makes: a list or tuple, a small dictionary or set, an entry of a dictionary
LIST, DICT, ENTRY, MARK = 64, 240, 100, 40
HANDLERS: dict[int, Callable[["Unpickler"], None]] = {}


class Unpickler:
    """Makes containers, numbers, strings, arrays and ``StoredTensor``; whatever else a pickle names is refused.

    Nothing is imported. What can be called is in ``ALLOWED`` and makes plain values only.

    Attributes:
        place: Of the next byte, after ``load`` that behind the pickle.
        storages: Key and dtype of each storage that was named; shared by the pickles of one file.
        published: Whether a class of the published data sets was named.
    """

    def __init__(self, data, place: int = 0, *, text: str = "latin1", size: int = 0, storages: dict | None = None):
        """Reads pickles.

        Args:
            data: Bytes or a memory map.
            place: First byte of the pickle.
            text: What strings of Python 2 are: an encoding, or bytes.
            size: Bytes of the whole file, by which memory is bounded; at least those of ``data`` count.
            storages: To add to.
        """
        self.data, self.place, self.text = data, place, text
        self.left = room(max(size, len(data)))
        self.storages = {} if storages is None else storages
        self.published = False

    def load(self) -> object:
        """Reads one pickle.

        Raises:
            Refused: If it wants anything else to be made, or more than its file has room for.
            LookupError, TypeError, ValueError: If it is damaged.
        """
        self.stack, self.marks, self.memo = [], [], {}
        data, handlers = self.data, HANDLERS
        try:
            while self.left >= 0:
                code = data[self.place]
                self.place += 1
                if code == STOP:
                    return self.stack.pop()
                handlers[code](self)
        except IndexError:
            if self.place >= len(data):
                raise ValueError("a pickle without its end; copy it again") from None
            raise ValueError("a pickle whose codes ask for values that it has not made; it is damaged") from None
        except KeyError:
            if code in handlers:
                raise
            raise ValueError(f"{code:#04x} where a pickle has a code; it is damaged or no pickle") from None
        raise Refused("file must hold what its size has room for, got small objects without end; it is refused")

    def spend(self, count: int) -> None:
        """Tells of memory before it is taken."""
        self.left -= count
        if self.left < 0:
            raise Refused("file must hold what its size has room for, got copies without end; it is refused")

    def read(self, count: int) -> bytes:
        begin, end = self.place, self.place + count
        if not begin <= end <= len(self.data):
            raise ValueError("a pickle without its end; copy it again")
        self.place = end
        return self.data[begin:end]

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.read(count), "little", signed=signed)

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.place)
        line = self.read(end - self.place)
        self.place += 1
        return line

    def pop_mark(self) -> list:
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def remember(self, index: int) -> None:
        self.left -= ENTRY
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"a pickle that recalls its value {index}, which it has not made; it is damaged")
        self.stack.append(self.memo[index])

    def decode(self, content: bytes) -> str | bytes:
        return content if self.text == "bytes" else content.decode(self.text)

    def find(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if full.startswith(PUBLISHED):
            self.published = True
            return RECORD
        # anything may stand there, escapes that a terminal obeys among it
        what = f"file must hold tensors, numbers, strings and containers only, got {shorten(full, 250)}; it is refused"
        raise Refused(what, self.published)

    def call(self, function: object, arguments: object) -> None:
        if not isinstance(function, Call) or type(arguments) is not tuple:
            raise Refused("file must call functions of torch and numpy only, got another thing; it is refused")
        self.left -= DICT
        self.stack.append(function.function(self.spend, *arguments))

    def add(self, target: object, keys: list, values: list) -> None:
        if not isinstance(target, dict):
            raise Refused("entries must belong to a dictionary; it is refused")
        self.spend(ENTRY * len(keys))
        for key, value in zip(keys, values, strict=True):
            check_key(key)
            target[key] = value

    def extend(self, target: object, items: list) -> None:
        if type(target) is set:
            self.spend(ENTRY * len(items))
            for item in items:
                check_key(item)
            target.update(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise Refused("items must belong to a list or a set; it is refused")

    def build(self, target: object, state: object) -> None:
        if type(target) is Record:
            self.add(target, [*state], [*state.values()]) if isinstance(state, dict) else None
        elif type(target) is Array:
            target.set(state)
        elif type(target) is ArrayType:
            target.order = state[1]
        elif type(target) is not dict:  # versions that modules note in their OrderedDict are dropped
            raise Refused("attributes must belong to an object of a published class; it is refused")

    def storage(self, saved: object) -> Storage:
        kind, dtype, key, _, _, *view = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or any(view):
            raise Refused("persistent values must be plain storages, got others; it is refused")
        if self.storages.setdefault(key, dtype) != dtype:
            raise Refused(f"storage {shorten(key)!r} must have one dtype, got {dtype} and {self.storages[key]}")
        self.left -= DICT
        return Storage(key, dtype)


RECORD = Call(lambda spend, *_: Record())


def code(text: str) -> Callable:
    """Registers what a code of the pickle format does."""

    def register(function: Callable[[Unpickler], None]) -> Callable:
        HANDLERS[ord(text)] = function
        return function

    return register


def push(text: str, read: Callable[[Unpickler], object]) -> None:
    """Registers a code that puts a value on the stack."""
    HANDLERS[ord(text)] = lambda machine: machine.stack.append(read(machine))


def parse_number(text: bytes) -> int | bool:
    """Whole numbers of protocol 0, in which 00 and 01 are false and true."""
    return text == b"01" if text in (b"00", b"01") else int(text.removesuffix(b"L"))


def whole_number(machine: Unpickler, count: int) -> int:
    if count > MAX_NUMBER:
        raise Refused(f"whole numbers must have at most {MAX_NUMBER} bytes, got {count:,}; it is refused")
    return machine.number(count, signed=True)


def global_name(machine: Unpickler) -> object:
    module, name = machine.line(), machine.line()
    return machine.find(module.decode(), name.decode())


def stack_global(machine: Unpickler) -> object:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Refused("names of functions must be strings; it is refused")
    return machine.find(module, name)


def new(cost: int, make: Callable[[], object]) -> Callable[[Unpickler], object]:
    def read(machine):
        machine.left -= cost
        return make()

    return read


def last(count: int) -> Callable[[Unpickler], tuple]:
    """The last items of the stack as a tuple."""

    def read(machine):
        machine.left -= LIST
        items = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        if len(items) != count:
            raise ValueError("a tuple of what is not there")
        return items

    return read


def collected(kind: type) -> Callable[[Unpickler], object]:
    def read(machine):
        machine.left -= LIST
        return kind(machine.pop_mark())

    return read


def pairs(machine: Unpickler) -> dict:
    items, found = machine.pop_mark(), {}
    machine.left -= DICT
    machine.add(found, items[::2], items[1::2])
    return found


def frozen(machine: Unpickler) -> frozenset:
    items, found = machine.pop_mark(), set()
    machine.extend(found, items)
    return frozenset(found)


push("N", lambda machine: None)
push("\x88", lambda machine: True)
push("\x89", lambda machine: False)
push("K", lambda machine: machine.number(1))
push("M", lambda machine: machine.number(2))
push("J", lambda machine: machine.number(4, signed=True))
push("I", lambda machine: parse_number(machine.line()))
push("L", lambda machine: parse_number(machine.line()))
push("\x8a", lambda machine: whole_number(machine, machine.number(1)))
push("\x8b", lambda machine: whole_number(machine, machine.number(4)))
push("F", lambda machine: float(machine.line()))
push("G", lambda machine: FLOAT.unpack(machine.read(8))[0])
push("X", lambda machine: machine.read(machine.number(4)).decode("utf-8", "surrogatepass"))
push("\x8c", lambda machine: machine.read(machine.number(1)).decode("utf-8", "surrogatepass"))
push("\x8d", lambda machine: machine.read(machine.number(8)).decode("utf-8", "surrogatepass"))
push("V", lambda machine: machine.line().decode("raw-unicode-escape"))
push("S", lambda machine: machine.decode(codecs.escape_decode(machine.line()[1:-1])[0]))
push("T", lambda machine: machine.decode(machine.read(machine.number(4))))
push("U", lambda machine: machine.decode(machine.read(machine.number(1))))
push("B", lambda machine: machine.read(machine.number(4)))
push("C", lambda machine: machine.read(machine.number(1)))
push("\x8e", lambda machine: machine.read(machine.number(8)))
push("\x96", lambda machine: machine.read(machine.number(8)))
push("]", new(LIST, list))
push("}", new(DICT, dict))
push("\x8f", new(DICT, set))
push(")", lambda machine: ())
push("\x85", last(1))
push("\x86", last(2))
push("\x87", last(3))
push("t", collected(tuple))
push("l", collected(list))
push("d", pairs)
push("\x91", frozen)
push("c", global_name)
push("\x93", stack_global)
push("2", lambda machine: machine.stack[-1])
push("Q", lambda machine: machine.storage(machine.stack.pop()))
HANDLERS[ord("g")] = lambda machine: machine.recall(int(machine.line()))
HANDLERS[ord("h")] = lambda machine: machine.recall(machine.number(1))
HANDLERS[ord("j")] = lambda machine: machine.recall(machine.number(4))
HANDLERS[ord("p")] = lambda machine: machine.remember(int(machine.line()))
HANDLERS[ord("q")] = lambda machine: machine.remember(machine.number(1))
HANDLERS[ord("r")] = lambda machine: machine.remember(machine.number(4))
HANDLERS[ord("\x94")] = lambda machine: machine.remember(len(machine.memo))
HANDLERS[ord("0")] = lambda machine: machine.stack.pop()
HANDLERS[ord("1")] = lambda machine: machine.pop_mark()
HANDLERS[ord("\x80")] = lambda machine: machine.number(1)  # the protocol, which the codes themselves tell
HANDLERS[ord("\x95")] = lambda machine: machine.number(8)  # the length of a frame, which need not be known


@code("(")
def mark(machine: Unpickler) -> None:
    machine.left -= MARK
    machine.marks.append(len(machine.stack))


@code("a")
def append(machine: Unpickler) -> None:
    item = machine.stack.pop()
    target = machine.stack[-1]
    if type(target) is not list:
        raise Refused("items must belong to a list; it is refused")
    target.append(item)


@code("e")
@code("\x90")
def appends(machine: Unpickler) -> None:
    items = machine.pop_mark()
    machine.extend(machine.stack[-1], items)


@code("s")
def set_item(machine: Unpickler) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.add(machine.stack[-1], [key], [value])


@code("u")
def set_items(machine: Unpickler) -> None:
    items = machine.pop_mark()
    machine.add(machine.stack[-1], items[::2], items[1::2])


@code("R")
@code("\x81")
def reduce(machine: Unpickler) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.call(function, arguments)


@code("\x92")
def new_object(machine: Unpickler) -> None:
    named, arguments, function = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    if named != {}:
        raise Refused("objects must be made without arguments by name; it is refused")
    machine.call(function, arguments)


@code("o")
def make_object(machine: Unpickler) -> None:
    function, *arguments = machine.pop_mark()
    machine.call(function, tuple(arguments))


@code("b")
def build(machine: Unpickler) -> None:
    state = machine.stack.pop()
    machine.build(machine.stack[-1], state)
