"""The device that a command works on, how images lie there, and the name of the processor."""

import platform
from pathlib import Path

import torch
from torch import Tensor, nn

FEW_CHANNELS = 16


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
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, ImportError) as error:
        must = "cpu, or cuda where torch and the machine have it"
        raise ValueError(f"device: name must be {must}, got {name!r}: {str(error).splitlines()[0]}") from error
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to a device. A GPU is not waited for: it reads pinned memory when it gets there."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def fast_format(network: nn.Module) -> torch.memory_format:
    """Channels last, but where oneDNN's strided 1x1 convolutions of few channels write past their memory in it.

    See https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    for module in network.modules():
        strided = isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1 < max(module.stride)
        if strided and module.in_channels // module.groups < FEW_CHANNELS:
            return torch.contiguous_format
    return torch.channels_last
