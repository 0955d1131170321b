"""Copies: how a module is run for tracing and checking. Nothing of the module itself changes.

Every run takes a fresh copy in eval mode, because some modules keep results of an earlier one. Runs are in float64, and
so is what a module makes in another dtype on its way (states of zeros, norms in float32, ``x.float()``): no rounding
hides a wrong permutation. Modules that cannot run in float64 run in the dtypes that they have.
"""

import copy
import inspect
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastws.symmetry.tracer import tensors_in

Inputs = Tensor | tuple | list | Mapping  # the arguments of a forward: see example_of
WIDE = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.float8_e4m3fn: torch.float64,
    torch.float8_e5m2: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
# what the forward of a module that cannot run raises
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError, ArithmeticError)
NOT_COPIED = (*FAILURES, pickle.PicklingError, copy.Error)


class Example(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple
    kwargs: dict


def example_of(module: nn.Module, inputs) -> Example:
    """A tuple holds positional arguments and a mapping those by name, if forward has them; all else is one argument."""
    if isinstance(inputs, tuple):
        return Example(inputs, {})
    if isinstance(inputs, Mapping):
        named = dict(inputs)
        try:
            inspect.signature(module.forward).bind(**named)
        except TypeError:
            return Example((inputs,), {})
        return Example((), named)
    return Example((inputs,), {})


def wide(x):
    """Dtypes and tensors, also in lists, in float64 or complex128; anything else is left as it is."""
    if isinstance(x, Tensor):
        return x.to(WIDE[x.dtype]) if x.dtype in WIDE and x.layout == torch.strided else x
    if isinstance(x, list | tuple):
        return [wide(item) for item in x]
    return WIDE.get(x, x) if isinstance(x, torch.dtype) else x


@cache
def parameters_of(function: torch._ops.OpOverload) -> list[tuple[str, bool]]:
    """The names of the arguments of an operation, and whether it writes into them."""
    arguments = function._schema.arguments
    return [(x.name, x.alias_info is not None and x.alias_info.is_write) for x in arguments]


class Doubled(TorchDispatchMode):
    """Gives operations float64 where they ask for less; only what they write into keeps its dtype."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default imports the compiler of torch, which takes seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._grouped_mm.default:
            return grouped_mm(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()})
        if function is torch.ops.aten.view.dtype:  # reads the same bits as other numbers
            return function(*args, **kwargs)
        parameters = parameters_of(function)
        args = [x if written else wide(x) for (_, written), x in zip(parameters, args, strict=False)]
        if kwargs:
            written = {name for name, changes in parameters if changes}
            kwargs = {name: x if name in written else wide(x) for name, x in kwargs.items()}
        return function(*args, **kwargs)


def grouped_mm(left: Tensor, right: Tensor, offs: Tensor | None = None, bias=None, out_dtype=None) -> Tensor:
    """The grouped matrix product, whose kernels refuse float64: ``left`` or ``right`` end where ``offs`` says."""
    if offs is None:
        return left @ right
    parts = [slice(*ends) for ends in pairwise([0, *offs.tolist()])]
    if left.dim() == 2 and right.dim() == 2:
        return torch.stack([left[:, part] @ right[part] for part in parts])
    if right.dim() == 2:
        return torch.cat([matrix @ right[:, part] for matrix, part in zip(left, parts, strict=True)], 1)
    result = left.new_zeros(len(left), right.shape[-1])
    for matrix, part in zip(right, parts, strict=True):
        result[part] = left[part] @ matrix
    return result


def fresh(module: nn.Module, double: bool) -> nn.Module:
    """A copy of a module in eval mode, in float64 or in the dtypes that it has.

    Raises:
        ValueError: If the module holds something that cannot be copied.
    """
    memo: dict[int, object] = {}
    for part in module.modules():
        for tensor in tensors_in(vars(part)):  # also those that forward has computed, which deepcopy refuses
            if id(tensor) not in memo and not torch.nn.parameter.is_lazy(tensor):
                copied = tensor.detach()
                copied = wide(copied) if double and copied.dtype in WIDE else copied.clone()
                if isinstance(tensor, nn.Parameter):
                    copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = copied
    try:
        copied = copy.deepcopy(module, memo)
    except NOT_COPIED as error:
        message = f"symmetry: module must be one that copy.deepcopy copies, got {told(error)}"
        raise ValueError(message) from error
    return copied.train().eval()  # going to eval mode drops what some modules keep from earlier runs


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def fresh_inputs(tree, double: bool):
    """A copy of the arguments of a call, in nested containers too."""
    if isinstance(tree, Tensor):
        return wide(tree.detach()) if double and tree.dtype in WIDE else tree.detach().clone()
    return copy.copy(tree)


def fresh_example(example: Example, double: bool) -> Example:
    return Example(*tree_map(lambda x: fresh_inputs(x, double), tuple(example)))


def uncompiled() -> AbstractContextManager:
    """Runs what torch.compile has wrapped as it is, for compiled code shows no operations."""
    # whoever has compiled something has imported this module, which takes a second
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def plain_kernels(double: bool) -> Iterator[None]:
    """No library fuses operations, and, if double, all of them are in float64."""
    fast_path, dtype = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    mkldnn = torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)  # it hides a whole encoder layer in one operation
    torch.backends.mkldnn.enabled = False  # it hides a recurrent layer
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), uncompiled():
            if not double:
                yield
                return
            torch.set_default_dtype(torch.float64)
            with Doubled():
                yield
    finally:
        torch.set_default_dtype(dtype)
        torch.backends.mkldnn.enabled = mkldnn
        torch.backends.mha.set_fastpath_enabled(fast_path)
