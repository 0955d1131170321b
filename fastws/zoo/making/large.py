"""Training of networks that are too large to run side by side: one by one, in plain PyTorch, by the same recipes."""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, pad

from fastws.devices import fast_format
from fastws.layout.layout import Layout
from fastws.runs import rates
from fastws.zoo.making.measuring import ALONE, one_by_one, tally
from fastws.zoo.making.recipes import Augment, Part, Plan, Recipe, TrainingData

MOMENTS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
MOMENTS["adamw"] = MOMENTS["adam"]
PADDING = 4  # pixels on each side, of which a crop takes some
DEGREES = 20  # by which images are turned, at most


class OneByOne:
    """Trains and measures each network of a wave alone. Flat states hold everything that a state dict holds."""

    def __init__(self, plan: Plan, recipes: Sequence[Recipe], data: TrainingData):
        self.plan, self.recipes, self.data = plan, recipes, data
        self.groups = [[member] for member in range(len(recipes))]
        with torch.device("meta"):  # names and shapes suffice
            self.layout = Layout.from_checkpoint(plan.build())

    def train_epoch(self, members: list[int], state: Tensor, orders: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        measures = [
            self._train_one(self.recipes[member], state[:, place], orders[place], epoch)
            for place, member in enumerate(members)
        ]
        return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*measures, strict=True))

    def _train_one(self, recipe: Recipe, state: Tensor, order: Tensor, epoch: int) -> tuple[float, float]:
        x, y = self.data.train
        network = self._load(recipe, state[0]).train()
        if self.plan.compile:
            # once for all networks of an architecture; left alone, the compiler lays all maps channels last on a CPU
            safe = {} if fast_format(network) == torch.channels_last else {"layout_optimization": False}
            network.compile(options=safe)
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16")
        steps = self.plan.num_steps(len(y))
        optimizer = self._optimizer(recipe, network, state, (epoch - 1) * steps)
        loss = correct = torch.zeros((), device=x.device)
        # dropout and augmentation draw from torch's generators, which are then as they were
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(int(numpy.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0]))
            for step, rows in enumerate(order.to(x.device).split(self.plan.batch_size), (epoch - 1) * steps):
                for group in optimizer.param_groups:
                    group["lr"], momentum = self._schedule(recipe, step, steps * self.plan.epochs)
                    if "momentum" in group and recipe.optimizer == "momentum":
                        group["momentum"] = momentum
                images = augment(x[rows], self.plan.augment, self.data.black)
                images = images.contiguous(memory_format=fast_format(network))
                with autocast:
                    logits = network(images)
                batch_loss = cross_entropy(logits.float(), y[rows])
                optimizer.zero_grad()
                batch_loss.backward()
                optimizer.step()
                loss = loss + batch_loss.detach() * len(rows)
                correct = correct + (logits.argmax(1) == y[rows]).sum()
        self._store(network, optimizer, recipe, state)
        return float(loss) / len(y), float(correct) / len(y)

    def measure(self, members: list[int], weights: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        networks = (self._load(self.recipes[member], flat) for member, flat in zip(members, weights, strict=True))
        done = [tally(one_by_one([network.eval()]), part, images=ALONE) for network in networks]
        return torch.cat([one.loss for one in done]), torch.cat([one.accuracy for one in done])

    # --- from and to flat vectors

    def _load(self, recipe: Recipe, flat: Tensor) -> nn.Module:
        with torch.device("meta"):  # no initial weights are drawn
            network = self.plan.build(recipe.activation, recipe.dropout)
        network.load_state_dict(self.layout.unflatten(flat.clone()), assign=True)
        return network.to(self.data.train.x.device, memory_format=fast_format(network))

    def _optimizer(self, recipe: Recipe, network: nn.Module, state: Tensor, steps: int) -> torch.optim.Optimizer:
        options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer in ("sgd", "momentum"):
            momentum = 0.9 if recipe.optimizer == "momentum" else 0.0
            optimizer = torch.optim.SGD(network.parameters(), momentum=momentum, **options)
        else:
            kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
            optimizer = kind(network.parameters(), **options)
        for flat, name in zip(state[1:], MOMENTS[recipe.optimizer], strict=False):
            moments = self.layout.unflatten(flat) if steps else {}
            for key, parameter in network.named_parameters():
                if key in moments:
                    optimizer.state[parameter][name] = moments[key].to(parameter.device, copy=True)
                    optimizer.state[parameter]["step"] = torch.tensor(float(steps))
        return optimizer

    def _store(self, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, state: Tensor) -> None:
        content = {key: tensor.cpu() for key, tensor in network.state_dict().items()}
        state[0].copy_(self.layout.flatten(content))
        for flat, name in zip(state[1:], MOMENTS[recipe.optimizer], strict=False):
            moments = {key: torch.zeros_like(tensor) for key, tensor in content.items()}
            moments |= {key: optimizer.state[x][name].cpu() for key, x in network.named_parameters()}
            flat.copy_(self.layout.flatten(moments))

    def _schedule(self, recipe: Recipe, step: int, total: int) -> tuple[float, float]:
        if self.plan.schedule == "constant":
            return recipe.lr, 0.9
        return rates.one_cycle(recipe.lr, step, total)


def augment(x: Tensor, how: Augment, black: Tensor) -> Tensor:
    """Images ``[B, C, H, W]``, each changed by random numbers of its own from torch's generator.

    ``crop-flip``: a part of the size of the image, of the image with 4 black pixels around it; then half of them
    mirrored. ``flip-rotate``: half of them mirrored, then turned by up to 20 degrees, to the nearest pixel, with black
    corners. Both are those of the published ResNet zoos.
    """
    if how == "none":
        return x
    count, device = len(x), x.device
    black = black.view(-1, 1, 1)
    x = x - black  # black is 0 from here on
    if how == "crop-flip":
        top, left = torch.randint(2 * PADDING + 1, (2, count, 1), device=device)
        rows, columns = (
            start + torch.arange(size, device=device) for start, size in zip((top, left), x.shape[2:], strict=True)
        )
        padded = pad(x, [PADDING] * 4).permute(0, 2, 3, 1)
        x = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None]]
        x = x.permute(0, 3, 1, 2)
    mirrored = torch.rand(count, device=device) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if how == "flip-rotate":
        angle = torch.deg2rad((2 * torch.rand(count, device=device) - 1) * DEGREES)
        ratio, zero = x.shape[2] / x.shape[3], torch.zeros_like(angle)
        turned = [angle.cos(), -angle.sin() * ratio, zero, angle.sin() / ratio, angle.cos(), zero]
        grid = affine_grid(torch.stack(turned, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
        x = grid_sample(x, grid, mode="nearest", align_corners=False)
    return x + black
