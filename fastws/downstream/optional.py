"""Libraries that some probes and samplers need and the package does not; they are imported when they are wanted."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def load(module: str, library: str, extra: str, purpose: str, command: str = "predict") -> ModuleType:
    """Imports a module.

    Args:
        module: Its name, ``sklearn.ensemble``.
        library: What has to be installed for it, ``scikit-learn``.
        extra: The extra of this package that brings it.
        purpose: The option that wants it.
        command: Of the option.

    Raises:
        ValueError: If it is not installed.
    """
    if find_spec(module.partition(".")[0]) is None:
        how = f"pip install 'fast-weight-space[{extra}]'"
        raise ValueError(f"{command}: {library} must be installed for {purpose}, got none; {how}")
    return import_module(module)
