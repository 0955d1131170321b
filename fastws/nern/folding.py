"""Batch norms of a network in evaluation mode, folded into the convolutions before them."""

import copy

from torch import Tensor, fx, nn

UNTRACEABLE = (fx.proxy.TraceError, ArithmeticError, AssertionError, AttributeError, LookupError)
UNTRACEABLE += (RuntimeError, TypeError, ValueError)  # what a forward pass may raise when it meets no tensor


def fold(network: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network that computes the same, without the batch norms that follow a convolution, and the factors it took.

    ``norm(conv(x)) = (factor * weight) * x + shift``, so a batch norm with fixed statistics costs nothing, forward or
    backward. Its output, a feature map, is now that of the convolution. Predicted weights are multiplied by the
    factors before they are put into the network. Networks that torch.fx cannot trace are copied as they are.

    Args:
        network: In evaluation mode.

    Returns:
        The network, and by name of a weight its factors, ``[C_out, 1, 1, 1]``.
    """
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    modules = dict(folded.named_modules())
    factors = {}
    for conv_name, norm_name in pairs(folded, modules):
        conv, norm = modules[conv_name], modules[norm_name]
        root = (norm.running_var + norm.eps).rsqrt()
        factor = root if norm.weight is None else norm.weight * root
        bias = 0 if conv.bias is None else conv.bias
        shift = (bias - norm.running_mean) * factor
        shift = shift if norm.bias is None else shift + norm.bias
        factors[f"{conv_name}.weight"] = factor[:, None, None, None]
        conv.weight = nn.Parameter(conv.weight * factor[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(shift, requires_grad=False)
        folded.set_submodule(norm_name, nn.Identity())
    return folded, factors


def pairs(network: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """Names of the convolutions whose one result goes into a batch norm with fixed statistics, and of these."""
    try:
        nodes = list(fx.Tracer().trace(network).nodes)
    except UNTRACEABLE:
        return []  # control flow or checks that depend on values, shapes or types
    calls = [node for node in nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    read = {node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"}  # beside the module's own call
    owners = [id(parameter) for module in modules.values() for parameter in module._parameters.values()]
    found = []
    for node in calls:
        norm, before = modules[node.target], node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or before not in calls:
            continue
        conv, once = modules[before.target], targets.count(node.target) == targets.count(before.target) == 1
        plain = type(conv) is nn.Conv2d and not any(module._forward_hooks for module in (conv, norm))
        alone = owners.count(id(conv.weight)) == len(before.users) == 1 and not {before.target, node.target} & read
        if once and plain and alone:
            found.append((before.target, node.target))
    return found
