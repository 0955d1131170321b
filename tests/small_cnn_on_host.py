"""The device code of small CNNs in CUDA, threads of which are fibers, with the arguments of the operators."""

import torch
from on_host import compile_for_host, numbers, pointers
from torch import Tensor

from fastws.small_cnn.table import rows_of

H100 = 115_712, 232_448  # bytes of shared memory of half a multiprocessor, and of a block at most
NONE = 0, 0  # blocks compute in global memory


def step_on_host(args, shared=H100, step=0, kl_weight=None) -> tuple[list[Tensor], int]:
    """Outputs of ``small_cnn_step``, or of ``variational_cnn_step`` given a ``kl_weight``; the samples of a tile."""
    *tensors, layers = [x.contiguous() for x in args[:7]]
    weights, first, second, images, labels, batches = tensors
    activation, dropout, optimizer, lr, weight_decay, seed = [x.contiguous() for x in args[7:13]]
    news = [torch.full_like(weights, torch.nan) for _ in range(3)]
    networks, steps, batch_size = batches.shape
    losses, divergences = (torch.full((networks, steps), torch.nan, dtype=weights.dtype) for _ in range(2))
    correct = torch.full((networks, steps), -1)
    sizes = weights.itemsize, len(layers), weights.shape[-1], *shared, networks
    sizes += steps, batch_size, step, batches.dtype == torch.int64
    functions = compile_for_host("small_cnn")
    function = functions.small_cnn_step if kl_weight is None else functions.variational_cnn_step
    kl = torch.tensor([kl_weight or 0.0], dtype=torch.float64)
    pointed = layers, images, weights, first, second, *news, losses, labels, seed, correct, activation, optimizer
    pointed += dropout, lr, weight_decay, batches, divergences, kl
    samples = function(numbers(*sizes), pointers(*pointed))
    outputs = [*news, losses, correct]
    return outputs if kl_weight is None else [*outputs, divergences], samples


def logits_on_host(weights, images, layers, activation, shared=H100, parts=2) -> Tensor:
    """Logits of ``small_cnn_logits``, tiles of images dealt to several blocks."""
    *_, last = rows_of(layers)
    logits = torch.full((len(weights), len(images), last.out_channels), torch.nan, dtype=weights.dtype)
    sizes = weights.itemsize, len(layers), weights.shape[-1], *shared, len(weights), len(images), parts
    pointed = [x.contiguous() for x in (layers, images, weights, activation)]
    compile_for_host("small_cnn").small_cnn_logits(numbers(*sizes), pointers(*pointed, logits))
    return logits
