"""The behavioural loss: what networks compute on images beside what their reconstructions do (arXiv 2503.17138).

``gamma * contrast + (1 - gamma) * (share * behaviour + (1 - share) * structure)``, each term in units of its own
running mean. Published runs divide by the value of the very first batch, which depends on the seed and is lost on
resume.

Such a loss asks for one good network: published, what is generated from it lies 11 to 18 times closer together than the
networks of the zoo. So the spread of reconstructions is among the metrics.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fastws.layout.layout import Layout
from fastws.random.philox import philox_reference
from fastws.runs import processes
from fastws.small_cnn.passes import forward
from fastws.small_cnn.table import Row, rows_of
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.make import config_of, prepare
from fastws.zoo.making.measuring import codes_of, disagreement
from fastws.zoo.making.recipes import Plan

QUERY, PIXELS = 2**56, 2**57  # where the draws of images and of random pixels begin in the stream of random numbers
MOMENTUM = 0.99  # of the running means that terms are divided by
TERMS = ("structure", "behaviour", "contrast")
QueriesFrom = Literal["images", "pixels", "both"]


class Outputs(torch.autograd.Function):
    """Logits ``[G, n, num_classes]`` of small networks ``[G, P]`` on images ``[1, C, H, W, n]``.

    Weights have gradients, images have none.
    """

    @staticmethod
    def forward(ctx, weights: Tensor, x: Tensor, rows: list[Row], activation: Tensor) -> Tensor:
        ctx.grad = torch.zeros_like(weights)
        logits, ctx.backs = forward(weights, x, rows, activation, {}, ctx.grad)
        return logits.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.transpose(1, 2).contiguous()
        for back in reversed(ctx.backs):
            grad = back(grad)
        return ctx.grad, None, None, None


class Networks(NamedTuple):
    """How flat vectors of one plan compute, many at once."""

    plan: Plan
    layout: Layout
    rows: list[Row] | None  # of the table of small networks; None where they have none

    @classmethod
    def of(cls, plan: Plan, layout: Layout) -> "Networks":
        try:
            return cls(plan, layout, rows_of(plan.layers()))
        except ValueError:
            return cls(plan, layout, None)

    def logits(self, weights: Tensor, activations: Sequence[str], x: Tensor) -> Tensor:
        """Logits ``[G, n, num_classes]`` of networks ``[G, P]`` on images ``[n, C, H, W]``."""
        if self.rows is not None:
            codes = codes_of(activations).to(weights.device)
            return Outputs.apply(weights.contiguous(), x.movedim(0, -1)[None], self.rows, codes)
        found: list[Tensor] = [weights[:0]] * len(weights)
        for name in dict.fromkeys(activations):
            members = [row for row, own in enumerate(activations) if own == name]
            network = self.plan.build(name).to(weights.device)
            for row, logits in zip(members, vmap(partial(self.run, network, x))(weights[members]), strict=True):
                found[row] = logits
        return torch.stack(found)

    def run(self, network: nn.Module, x: Tensor, flat: Tensor) -> Tensor:
        return functional_call(network, self.layout.unflatten(flat), (x,))


class Behaviour:
    """What reconstructions of whole networks compute, beside what the networks do, on images that are drawn per step.

    Args:
        zoo: Of ``zoo make``, or sampled from such a zoo.
        chosen: The rows of the zoo that are trained and validated on, int64.
        layout: Of their tokens, all of which a window holds.
        mean: Of each layer, ``[L]``, as it was taken off the tokens.
        std: Of each layer, ``[L]``, that tokens were divided by.
        device: Where networks compute.
        share: Of behaviour in the loss of reconstruction.
        queries: Images of a step.
        queries_from: The training images of the zoo, uniformly random pixels, or half of each.
        seed: Of the draws.

    Raises:
        ValueError: If the zoo does not say what its networks are, or tokens leave some of their weights out.
    """

    def __init__(
        self,
        zoo: Zoo,
        chosen: Tensor,
        layout: Layout,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        *,
        share: float,
        queries: int,
        queries_from: QueriesFrom,
        seed: int,
    ):
        if int(layout.lengths.sum()) != layout.num_weights:
            raise ValueError(
                f"train sane: norm must be keep, so that networks compute, for behaviour, got {layout.norm}"
            )
        if "activation" not in zoo.properties.column_names:
            raise ValueError(f"train sane: behaviour must be left out for {zoo.path}, which knows no activations")
        made = config_of(zoo.path, zoo.provenance)
        options = {"networks": 1, "start": None, "regularise": None, "regularise_at": (), "device": device.type}
        job = prepare(replace(made, **options))
        self.images = job.data.train.x
        pixels = [torch.tensor(made.mean or (0.0,)), torch.tensor(made.std or (1.0,))]
        self.pixel_mean, self.pixel_std = (x.to(device).view(-1, 1, 1) for x in pixels)
        self.zoo, self.chosen = zoo, chosen
        self.networks, self.layout = Networks.of(job.plan, zoo.layout), layout
        names = zoo.properties["activation"].cast("string").to_pylist()
        self.activations = [names[row] for row in chosen.tolist()]
        layer = layout.positions[:, 1].to(device).long()
        self.mean, self.std = mean.to(device)[layer, None], std.to(device)[layer, None]
        self.share, self.queries, self.queries_from, self.seed = share, queries, queries_from, seed
        self.carried = {"term_means": torch.zeros(len(TERMS), dtype=torch.float64, device=device)}

    def draw(self, stream: int) -> Tensor:
        """Images ``[queries, C, H, W]`` of a step, the same in all processes."""
        count, device = self.queries, self.images.device
        chosen = philox_reference(self.seed, QUERY + stream, count, torch.device("cpu")) * len(self.images) >> 32
        images = self.images[chosen.to(device)]
        if self.queries_from == "images":
            return images
        words = philox_reference(self.seed, PIXELS + stream, images.numel(), torch.device("cpu"))
        pixels = (words.view(images.shape).to(device) / 2**32 - self.pixel_mean) / self.pixel_std
        half = 0 if self.queries_from == "pixels" else count // 2
        return torch.cat([images[:half], pixels[half:].float()])

    def compare(self, prediction: Tensor, networks: Sequence[int], stream: int) -> dict[str, Tensor]:
        """Mean squared differences of probabilities, and what else is known of reconstructions.

        Permuted networks compute the same, so that what networks compute is found once for all their views.

        Args:
            prediction: Tokens of reconstructions, ``[V, B, N, T]``, V views of B networks.
            networks: Their places among the chosen rows, B of them.
            stream: Of the draw of images.
        """
        views = len(prediction)
        names = [self.activations[row] for row in networks]
        own = self.zoo.rows(self.chosen[list(networks)]).float().to(prediction.device)
        x = self.draw(stream)
        with torch.autocast(own.device.type, enabled=False):
            made = self.layout.detokenize((prediction.float() * self.std + self.mean).flatten(0, 1))
            logits = self.networks.logits(made, names * views, x).unflatten(0, (views, -1))
            with torch.no_grad():
                target = self.networks.logits(own, names, x)
            errors = (logits.softmax(3) - target.softmax(2)).square().mean((2, 3))
        finite = errors.isfinite()
        found = {"behaviour": torch.where(finite, errors, 0).sum() / finite.sum().clamp(min=1)}
        if not torch.is_grad_enabled():
            made = made.unflatten(0, (views, -1))[0]
            guesses, theirs = logits[0].argmax(2), target.argmax(2)
            found["agreement"] = (guesses == theirs).double().mean()
            found["spread"] = made.std(0).mean() / own.std(0).mean()
            found["disagreement"] = disagreement(guesses) / disagreement(theirs).clamp(min=1e-12)
        return found

    def combine(self, gamma: float, terms: dict[str, Tensor], training: bool) -> Tensor:
        """The loss of all terms, each in units of its running mean, which a step of training moves."""
        values, means = torch.stack([terms[name] for name in TERMS]), self.carried["term_means"]
        if training:
            now = processes.total(values.double()) / processes.world()
            means.copy_(torch.where(means > 0, torch.lerp(now, means, MOMENTUM), now))
        units = torch.where(means > 0, means, 1).to(values.dtype)
        rest = 1 - gamma
        weights = torch.tensor([rest * (1 - self.share), rest * self.share, gamma], device=values.device)
        return (weights * values / units).sum()
