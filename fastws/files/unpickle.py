"""A restricted unpickler: what a pickle may make stands in ``values``, and it makes no more than its file has room for.

The standard library's unpickler can be told which functions a pickle may call, and no more: one code makes it take
gigabytes, and keys that are tuples of tuples are hashed for ever or end the process. So the codes are read here.
"""

import codecs
import pickle  # for the names of the codes
import struct
from collections.abc import Callable

from fastws.files.unpickle_machine import DICT, LIST, MARK, Machine
from fastws.files.values import Refused

MAX_NUMBER = 255  # bytes of a whole number
FLOAT = struct.Struct(">d")
STOP = ord(pickle.STOP)
HANDLERS: dict[int, Callable[[Machine], None]] = {}


class Unpickler(Machine):
    """Makes containers, numbers, strings, arrays and ``StoredTensor``; whatever else a pickle names is refused."""

    def load(self) -> object:
        """Reads one pickle; ``place`` is then behind it.

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


def code(name: bytes) -> Callable:
    """Registers what a code of the pickle format does."""

    def register(function: Callable[[Machine], None]) -> Callable:
        HANDLERS[ord(name)] = function
        return function

    return register


def push(name: bytes, read: Callable[[Machine], object]) -> None:
    """Registers a code that puts a value on the stack."""
    HANDLERS[ord(name)] = lambda machine: machine.stack.append(read(machine))


def parse_number(text: bytes) -> int | bool:
    """Whole numbers of protocol 0, in which 00 and 01 are false and true."""
    return text == b"01" if text in (b"00", b"01") else int(text.removesuffix(b"L"))


def whole_number(machine: Machine, count: int) -> int:
    if count > MAX_NUMBER:
        raise Refused(f"whole numbers must have at most {MAX_NUMBER} bytes, got {count:,}; it is refused")
    return machine.number(count, signed=True)


def global_name(machine: Machine) -> object:
    module, name = machine.line(), machine.line()
    return machine.find(module.decode(), name.decode())


def stack_global(machine: Machine) -> object:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Refused("names of functions must be strings; it is refused")
    return machine.find(module, name)


def new(cost: int, make: Callable[[], object]) -> Callable[[Machine], object]:
    def read(machine):
        machine.left -= cost
        return make()

    return read


def last(count: int) -> Callable[[Machine], tuple]:
    """The last items of the stack as a tuple."""

    def read(machine):
        machine.left -= LIST
        items = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        if len(items) != count:
            raise ValueError("a tuple of what is not there")
        return items

    return read


def collected(kind: type) -> Callable[[Machine], object]:
    def read(machine):
        machine.left -= LIST
        return kind(machine.pop_mark())

    return read


def pairs(machine: Machine) -> dict:
    items, found = machine.pop_mark(), {}
    machine.left -= DICT
    machine.add(found, items[::2], items[1::2])
    return found


def frozen(machine: Machine) -> frozenset:
    items, found = machine.pop_mark(), set()
    machine.extend(found, items)
    return frozenset(found)


push(pickle.NONE, lambda machine: None)
push(pickle.NEWTRUE, lambda machine: True)
push(pickle.NEWFALSE, lambda machine: False)
push(pickle.BININT1, lambda machine: machine.number(1))
push(pickle.BININT2, lambda machine: machine.number(2))
push(pickle.BININT, lambda machine: machine.number(4, signed=True))
push(pickle.INT, lambda machine: parse_number(machine.line()))
push(pickle.LONG, lambda machine: parse_number(machine.line()))
push(pickle.LONG1, lambda machine: whole_number(machine, machine.number(1)))
push(pickle.LONG4, lambda machine: whole_number(machine, machine.number(4)))
push(pickle.FLOAT, lambda machine: float(machine.line()))
push(pickle.BINFLOAT, lambda machine: FLOAT.unpack(machine.read(8))[0])
push(pickle.BINUNICODE, lambda machine: machine.read(machine.number(4)).decode("utf-8", "surrogatepass"))
push(pickle.SHORT_BINUNICODE, lambda machine: machine.read(machine.number(1)).decode("utf-8", "surrogatepass"))
push(pickle.BINUNICODE8, lambda machine: machine.read(machine.number(8)).decode("utf-8", "surrogatepass"))
push(pickle.UNICODE, lambda machine: machine.line().decode("raw-unicode-escape"))
push(pickle.STRING, lambda machine: machine.decode(codecs.escape_decode(machine.line()[1:-1])[0]))
push(pickle.BINSTRING, lambda machine: machine.decode(machine.read(machine.number(4))))
push(pickle.SHORT_BINSTRING, lambda machine: machine.decode(machine.read(machine.number(1))))
push(pickle.BINBYTES, lambda machine: machine.read(machine.number(4)))
push(pickle.SHORT_BINBYTES, lambda machine: machine.read(machine.number(1)))
push(pickle.BINBYTES8, lambda machine: machine.read(machine.number(8)))
push(pickle.BYTEARRAY8, lambda machine: machine.read(machine.number(8)))
push(pickle.EMPTY_LIST, new(LIST, list))
push(pickle.EMPTY_DICT, new(DICT, dict))
push(pickle.EMPTY_SET, new(DICT, set))
push(pickle.EMPTY_TUPLE, lambda machine: ())
push(pickle.TUPLE1, last(1))
push(pickle.TUPLE2, last(2))
push(pickle.TUPLE3, last(3))
push(pickle.TUPLE, collected(tuple))
push(pickle.LIST, collected(list))
push(pickle.DICT, pairs)
push(pickle.FROZENSET, frozen)
push(pickle.GLOBAL, global_name)
push(pickle.STACK_GLOBAL, stack_global)
push(pickle.DUP, lambda machine: machine.stack[-1])
push(pickle.BINPERSID, lambda machine: machine.storage(machine.stack.pop()))
HANDLERS[ord(pickle.GET)] = lambda machine: machine.recall(int(machine.line()))
HANDLERS[ord(pickle.BINGET)] = lambda machine: machine.recall(machine.number(1))
HANDLERS[ord(pickle.LONG_BINGET)] = lambda machine: machine.recall(machine.number(4))
HANDLERS[ord(pickle.PUT)] = lambda machine: machine.remember(int(machine.line()))
HANDLERS[ord(pickle.BINPUT)] = lambda machine: machine.remember(machine.number(1))
HANDLERS[ord(pickle.LONG_BINPUT)] = lambda machine: machine.remember(machine.number(4))
HANDLERS[ord(pickle.MEMOIZE)] = lambda machine: machine.remember(len(machine.memo))
HANDLERS[ord(pickle.POP)] = lambda machine: machine.stack.pop()
HANDLERS[ord(pickle.POP_MARK)] = lambda machine: machine.pop_mark()
HANDLERS[ord(pickle.PROTO)] = lambda machine: machine.number(1)  # the protocol, which the codes themselves tell
HANDLERS[ord(pickle.FRAME)] = lambda machine: machine.number(8)  # the length of a frame, which need not be known


@code(pickle.MARK)
def mark(machine: Machine) -> None:
    machine.left -= MARK
    machine.marks.append(len(machine.stack))


@code(pickle.APPEND)
def append(machine: Machine) -> None:
    item = machine.stack.pop()
    target = machine.stack[-1]
    if type(target) is not list:
        raise Refused("items must belong to a list; it is refused")
    target.append(item)


@code(pickle.APPENDS)
@code(pickle.ADDITEMS)
def appends(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.extend(machine.stack[-1], items)


@code(pickle.SETITEM)
def set_item(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.add(machine.stack[-1], [key], [value])


@code(pickle.SETITEMS)
def set_items(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.add(machine.stack[-1], items[::2], items[1::2])


@code(pickle.REDUCE)
@code(pickle.NEWOBJ)
def reduce(machine: Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.call(function, arguments)


@code(pickle.NEWOBJ_EX)
def new_object(machine: Machine) -> None:
    named, arguments, function = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    if named != {}:
        raise Refused("objects must be made without arguments by name; it is refused")
    machine.call(function, arguments)


@code(pickle.OBJ)
def make_object(machine: Machine) -> None:
    function, *arguments = machine.pop_mark()
    machine.call(function, tuple(arguments))


@code(pickle.BUILD)
def build(machine: Machine) -> None:
    state = machine.stack.pop()
    machine.build(machine.stack[-1], state)
