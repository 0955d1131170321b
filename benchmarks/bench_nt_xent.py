"""fastws.nt_xent, forward and backward, against the published broadcast and its reference, eager and compiled.

Predicted for B = 500, E = 50 in fp32: 2B * 2B similarities of 2E FLOPs, half of them in the forward pass, all of them
again and their product with the embeddings in the backward pass: 250 MFLOP, and 3 million exponentials of some 15
instructions on 8 lanes. At 32 FLOPs per cycle and 3.4 GHz that is 2.3 + 0.5 ms on one core; 0.6 MB are moved.
The published form writes [2B, 2B, E], 200 MB, several times: 200 MB * 20 / 10 GB/s = 400 ms.

Run: fastws bench nt_xent
"""

from collections.abc import Iterator

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.ops.nt_xent import nt_xent_reference

CASES = {"window": (32, 30), "batch": (500, 50)}  # B, E


def published(z_i, z_j, temperature):
    """The [2B, 2B, E] form: cosines of all pairs side by side, the positives in front of the negatives."""
    B, z = len(z_i), torch.cat([z_i, z_j])
    s = torch.nn.functional.cosine_similarity(z[:, None, :], z[None, :, :], dim=2) / temperature
    positives = torch.cat([s.diagonal(B), s.diagonal(-B)])
    is_negative = torch.ones(2 * B, 2 * B, dtype=torch.bool, device=z.device)
    for offset in (0, B, -B):
        is_negative.diagonal(offset).fill_(False)
    logits = torch.cat([positives[:, None], s[is_negative].view(2 * B, -1)], dim=1)
    classes = torch.zeros(2 * B, dtype=torch.long, device=z.device)
    return torch.nn.functional.cross_entropy(logits, classes, reduction="sum") / (2 * B)


def check(actual, reference, *args):
    for output, expected in zip(actual, reference(*args), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-7)


def cases(options: Options) -> Iterator[Case]:
    for name, (B, E) in options.pick(CASES).items():

        def make_args(B=B, E=E):
            z_i, z_j = torch.randn(2, B, E, device=DEVICE)
            return z_i.clone().requires_grad_(), z_j.clone().requires_grad_(), 0.1

        yield operator_case(
            "nt_xent",
            name,
            nt_xent_reference,
            check,
            make_args,
            lambda z_i, z_j, _: 3 * (z_i.nbytes + z_j.nbytes),
            {"published": published},
            gradients=True,
        )
