"""Models whose weights, gradients and moments are split over the processes of a run (FSDP2: ``fully_shard``).

Checkpoints hold whole tensors, as those of other runs do: a run may be resumed with another number of processes, and
split or not. Tensors are put together one by one, on the CPU of the first process.

What torch has for this is imported where it is used: that takes longer than all else that a trainer imports.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastws.runs import processes


def shard(model: nn.Module, device: torch.device, methods: tuple[str, ...] = ()) -> None:
    """Splits a model that is still on the CPU over all processes, in place: no device ever holds the whole of it.

    Args:
        model: Each module of its ``ModuleList`` is put together for its own forward and backward pass.
        device: Of this process.
        methods: Other than ``forward`` that are called on the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (processes.world(),))
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_sharded(model: nn.Module) -> bool:
    return any(map(is_part, model.parameters()))


def is_part(x: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(x, "full_tensor")


def whole(x: Any) -> Any:
    """The same nested dictionaries and lists with whole tensors, on the CPU; only in the first process.

    Others get the structure without the tensors that were split, but all must call this.
    """
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    if isinstance(x, list):
        return [whole(value) for value in x]
    if not is_part(x):
        return x
    found = x.full_tensor()
    return found.cpu() if processes.rank() == 0 else None


def load(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads whole tensors, of which each process keeps its part."""
    own = model.state_dict()
    weights = state["model"]
    model.load_state_dict({name: part_of(x, own[name]) if name in own else x for name, x in weights.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: part_of(x, parameters[number]) for name, x in moments.items()}
        for number, moments in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def part_of(x: Any, like: Tensor) -> Any:
    """``x`` split as ``like`` is, where it has its shape: counts of steps have not."""
    if not is_part(like) or not isinstance(x, Tensor) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    # every process has the whole of it, so that nothing is sent
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
