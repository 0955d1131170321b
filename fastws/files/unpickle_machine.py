"""The machine of the unpickler: a pickle is a program, its codes stand in ``unpickle``, and what they share here.

Nothing is imported. What a pickle may call is in ``ALLOWED`` and makes plain values only.
"""

import torch

from fastws.files.limits import room
from fastws.files.values import ALLOWED, Array, ArrayType, Call, Record, Refused, Storage, check_key
from fastws.terminal import shorten

PUBLISHED = ("checkpoints_to_datasets.", "ghrp.", "model_definitions.", "torch.utils.data.")  # classes read as Record
# bytes that Python takes for what one code makes: a list or tuple, a small dictionary or set, an entry of a dictionary
LIST, DICT, ENTRY, MARK = 64, 240, 100, 40
RECORD = Call(lambda spend, *_: Record())


class Machine:
    """The bytes of a pickle, the values that it has made, and the memory that is left to it.

    Attributes:
        place: Of the next byte.
        left: Bytes of memory that may still be taken.
        stack: Values that codes take and leave.
        marks: Where on the stack the items of containers begin.
        memo: Values by number, which a pickle makes once and names again.
        storages: Key and dtype of each storage that was named; shared by the pickles of one file.
        published: Whether a class of the published data sets was named.
    """

    def __init__(self, data, place: int = 0, *, text: str = "latin1", size: int = 0, storages: dict | None = None):
        """Is ready for a pickle.

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
        self.stack, self.marks, self.memo = [], [], {}

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
