"""The device that a command works on."""

import torch


def find_device(name: str | None) -> torch.device:
    """A device by name.

    Args:
        name: As cpu, cuda or cuda:1; None is cuda where there is one, else cpu.

    Raises:
        ValueError: If torch cannot work on it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        must = "cpu, or cuda where torch and the machine have it"
        raise ValueError(f"device: name must be {must}, got {name!r}: {str(error).splitlines()[0]}") from error
    return device
