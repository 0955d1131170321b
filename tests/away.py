"""A device that must not be waited for, on machines without a GPU: its tensors compute on the CPU and say "cuda"."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

AWAY = torch.device("cuda", 99)  # no number of a GPU that is there: caches know devices by it
aten = torch.ops.aten
# what the host must know of a tensor before it can go on: a number in it, or how large the result is
ASKING = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2),
    *(aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.item),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
MAKING = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class Away(Tensor):
    """A tensor of the device; ``inner`` has its numbers."""

    device = property(lambda self: AWAY)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} must run while NoWaiting is entered")


class NoNumbers(TorchFunctionMode):
    """Numbers of the host made into a tensor of the device are copied to it, and back again, which waits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made_away = is_away(kwargs.get("device")) or (function is Tensor.new_tensor and isinstance(args[0], Away))
        assert function not in (Tensor.tolist, Tensor.numpy) or not isinstance(args[0], Away), "waits for the device"
        assert function not in MAKING or not made_away, f"waits for the device: {function.__name__} of numbers"
        return function(*args, **kwargs)


class NoWaiting(TorchDispatchMode):
    """Inside, whatever waits for the device is an AssertionError. ``served`` has the operators of fastws it ran."""

    def __init__(self):
        super().__init__()
        self.served: set[str] = set()
        self.pinned: list[Tensor] = []

    def __enter__(self):
        self.numbers = NoNumbers()
        self.numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        away = [x for x in tensors if isinstance(x, Away)]
        name = function.overloadpacket
        if name in (aten._pin_memory, aten.pin_memory):
            return self.pin(args[0])
        if name is aten.is_pinned:
            return any(args[0] is x for x in self.pinned)
        if name in (aten._to_copy, aten.copy_):
            self.check_copy(name, args, kwargs)
        elif away:
            assert name not in ASKING, f"waits for the device: {name} asks what is in a tensor"
            masks = [x for x in tensors[1:] if x.dtype in (torch.bool, torch.uint8)] if name in INDEXING else []
            assert not masks, f"waits for the device: {name} by a mask asks how much is in it"
            strangers = [x for x in tensors if not isinstance(x, Away) and x.dim() > 0]
            assert not strangers, f"{name} must have all its tensors on one device"
            if function.namespace == "fastws":
                self.served.add(name.__name__)
        to_away = is_away(kwargs["device"]) if kwargs.get("device") is not None else bool(away)
        if is_away(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        inner_args, inner_kwargs = tree_map_only(Away, lambda x: x.inner, (args, kwargs))
        result = function(*inner_args, **inner_kwargs)
        if not to_away:
            return result
        result = tree_map_only(Tensor, lambda x: x if isinstance(x, Away) else Away(x), result)
        return return_and_correct_aliasing(function, args, kwargs, result) if away else result

    def pin(self, x: Tensor) -> Tensor:
        self.pinned.append(x.clone())
        return self.pinned[-1]

    def check_copy(self, name, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = args[1] if name is aten.copy_ else args[0]
        device = args[0].device if name is aten.copy_ else kwargs.get("device") or source.device
        if is_away(device) and not isinstance(source, Away):
            without_waiting = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            pinned = any(source is x for x in self.pinned)
            assert without_waiting and pinned, "waits for the device: a copy from memory of the host that is not pinned"
        assert is_away(device) or not isinstance(source, Away), "waits for the device: a copy to the host"


def is_away(device: torch.device | str | None) -> bool:
    # what C++ makes beside a tensor that is away is on "meta", for it knows no better
    return device is not None and torch.device(device).type in (AWAY.type, "meta")


def away(x: Any) -> Any:
    """Tensors, and those in tuples, lists, dictionaries and modules, as tensors of the device."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = nn.Parameter(Away(parameter.detach().clone()), requires_grad=parameter.requires_grad)
                    module._parameters[name] = moved
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else Away(buffer.clone())
        return x
    return tree_map_only(Tensor, lambda x: Away(x.detach().clone()), x)
