"""Stand-ins for the libraries that take seconds to import, for a process that only prints a help text.

A command's options are the fields of a dataclass beside its code, and the code imports torch. Nothing of it runs when a
help text is printed, so modules whose every attribute, call and operation is again a stand-in serve as well.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HEAVY = {
    "PIL",
    "einops",
    "matplotlib",
    "numpy",
    "pyarrow",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "tqdm",
    "triton",
}
OPERATORS = {*dir(int), *dir(list), "__array__"}  # methods of tensors that modules name


class Everything(type):
    """The type of stand-ins, which are classes, so that one can be the base of a class and part of an annotation."""

    def __getattr__(cls, name: str) -> "Everything":
        if name.startswith("__") and name not in OPERATORS:
            raise AttributeError(name)
        return stand_in(f"{cls.__name__}.{name}")

    def __call__(cls, *args, **options) -> object:
        # a decorator with or without arguments gives back what it decorates
        return args[0] if len(args) == 1 and callable(args[0]) and not options else stand_in(cls.__name__)

    def __getitem__(cls, key: object) -> "Everything":
        return stand_in(cls.__name__)

    def __iter__(cls):
        return iter(())


def stand_in(name: str) -> Everything:
    return type.__call__(Everything, name, (), {})


class Module(ModuleType):
    __path__ = ()  # a package, which has modules of any name

    def __getattr__(self, name: str) -> Everything:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(f"{self.__name__}.{name}")


class Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Makes every later import of a heavy library one of a stand-in; nothing can be computed in the process then."""
    sys.meta_path.insert(0, Finder())
