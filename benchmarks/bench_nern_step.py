"""One training step of NeRN against the published step, restated in plain PyTorch.

ResNet-20 (29,744 kernels), width 180, 256 images, 4,096 kernels: a joint step, and one that reconstructs only, during
which the published code runs teacher and student all the same. Images are given; both use the Ranger of this package.
The loss and its gradients are compared before anything is timed.

Predicted for one core of 109 GFLOP/s in float32. Joint: convolutions are 21 GFLOP in the teacher, 42 in the student
with the gradients of its maps, which oneDNN computes at 80 % of the peak, 0.72 s; gradients of one kernel in seven take
0.12 s (see bench_kernel_gradients.py), where those of all take 0.3 s. The predictor is 5.9 GFLOP for all kernels,
without the first layer, and 1.6 for the gradient, 0.08 s. Maps of 193 MB are rectified, added and compared, and their
gradients likewise, in about 25 passes of a map, 4.8 GB or 0.3 s: 1.2 s. The plain step has all gradients of
convolutions, 1.1 s, in a layout that costs reorders, 0.4 s, and batch norms, and the feature distance in ten passes, 10
GB more or 1 s: 2.6 s, twice as long. Four times would be 0.65 s, what 63 + 7.5 GFLOP take at the peak without anything
else: out of reach in float32 but for algorithms that multiply less (Winograd), which oneDNN has not for AVX2, or in
bf16, on another processor: with AVX512-BF16 products take half as long and maps half the memory, so 0.35 to 0.5 s, four
to six times. Reconstruction only: 7.5 GFLOP, 0.07 s at the peak.

Predicted for an H200: 84 GFLOP of convolutions are 0.2 ms in bf16 and 2 ms in float32, maps pass through memory in 1 to
2 ms, and about 700 launches of 5 us are 3.5 ms: 4 ms in bf16, 6 in float32, bound by launches. The published step draws
its kernels on the CPU, 10 ms, and in one of five its set difference takes 15 ms more.

What earlier predictions missed: while distillation does not count, the published loss leads back into the weights only.
It runs both networks and compares their maps, forward, and never goes back through the student. So it takes 1.3 s, and
no exact step in float32 can be more than 18 times as fast. And memory is not what the joint step waits for: to take the
images through both networks in parts that stay in cache made it no faster. In bf16 it takes 0.42 s at best, for
gradients of kernels are added up in float32 and maps are rectified, added and compared in as many passes: 3.1 to 3.5
times.

With one thread, times are those of the processor: what else runs on the machine does not count.

Run: fastws bench nern_step [--threads 2]
"""

import random
import statistics
import time
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from tempfile import TemporaryDirectory

import torch
from torch import nn

from fastws.benchmarks.harness import DEVICE, HAS_BF16, Options
from fastws.nern.optimizer import Ranger
from fastws.nn.nern import NeRN, encode_axis
from fastws.nn.resnet import CIFARResNet
from fastws.train import loop
from fastws.train.nern import train as nern

HIDDEN, IMAGES, KERNELS = 180, 256, 4096
JOINT, RECONSTRUCTION = (1.0, 1e-4, 1e-4), (1.0, 0.0, 0.0)  # weights of the losses
TOLERANCES = {"fastws": (1e-4, 1e-3), "fastws bf16": (2e-2, 0.1)}  # of the loss and of gradients


class PublishedStep:
    """What the published trainer does in a step, by its own means."""

    def __init__(self, model: NeRN, teacher: nn.Module, job: nern.Job):
        self.predictor, self.teacher, self.student = deepcopy(model), teacher, deepcopy(teacher)
        self.layers = job.stored.layers
        self.names = [layer.name for layer in self.layers]
        for name in self.names:
            self.student.get_parameter(name).requires_grad = True
        table = encode_axis(model.config, 64).to(DEVICE)
        grid = [(i, f, c) for i, x in enumerate(self.layers) for f in range(x.shape[0]) for c in range(x.shape[1])]
        encodings = torch.cat([table[index] for index in torch.tensor(grid, device=DEVICE).T], 1)[job.stored.rows]
        self.embeddings = list(encodings.split([layer.kernels for layer in self.layers]))
        self.originals = [teacher.get_parameter(name) for name in self.names]
        self.optimizer = Ranger(self.predictor.parameters())

    def predict(self, x):
        for layer in self.predictor.layers:
            x = torch.relu(layer(x))
        return self.predictor.final_linear_layer(x)

    def choose(self, total):
        norms = torch.cat([x.flatten(0, 1).flatten(1).norm(dim=1) for x in self.originals])
        if random.uniform(0, 1) < 0.8:
            order = torch.randperm(total, device=DEVICE)
            return order[:KERNELS], order[KERNELS:]
        chosen = torch.distributions.Categorical(norms).sample([KERNELS])
        rest = set(range(total)) - set(chosen.tolist())
        return chosen, torch.tensor(list(rest), device=DEVICE)

    def __call__(self, images, weights, chosen=None):
        self.optimizer.zero_grad()
        embeddings = torch.vstack(self.embeddings)
        drawn, rest = self.choose(len(embeddings))
        if chosen is not None:
            drawn = chosen
            rest = torch.tensor(sorted(set(range(len(embeddings))) - set(chosen.tolist())), device=DEVICE)
        batch = self.predict(embeddings[drawn])
        predicted = torch.zeros(len(embeddings), batch.shape[1], device=DEVICE)
        predicted[drawn] = batch
        with torch.no_grad():
            predicted[rest] = self.predict(embeddings[rest])
        parts = predicted.split([layer.kernels for layer in self.layers])
        parts = [x.reshape(layer.shape) for x, layer in zip(parts, self.layers, strict=True)]
        leaves = [self.student.get_parameter(name) for name in self.names]
        for leaf, part in zip(leaves, parts, strict=True):
            leaf.data = part.detach().clone()
        with torch.no_grad():
            theirs, their_logits = feature_maps(self.teacher, images)
        ours, logits = feature_maps(self.student, images)
        count = sum(x.numel() for x in leaves)
        loss = (sum(((x - y) ** 2).sum() for x, y in zip(leaves, self.originals, strict=True)) / count).sqrt()
        features = sum(((normalise(x) - normalise(y)) ** 2).sum() for x, y in zip(ours, theirs, strict=True))
        p = their_logits.softmax(1)
        divergence = (p * (p.log() - (logits.softmax(1) + 1e-4).log())).sum(1).mean()
        if weights[1]:
            loss = weights[0] * loss + weights[1] * features / len(images) + weights[2] * divergence
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        torch.autograd.backward(parts, [leaf.grad for leaf in leaves])
        self.optimizer.step()
        return loss


def feature_maps(network, images):
    """Those that the published code compares: of each block the sum twice."""
    x = network.bn1(network.conv1(images))
    maps, x = [x], torch.relu(x)
    for block in (*network.layer1, *network.layer2, *network.layer3):
        y = block.bn1(block.conv1(x))
        z = block.bn2(block.conv2(torch.relu(y)))
        if block.padding:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, block.padding, block.padding))
        z = z + block.shortcut(x)
        maps += [y, z, z]
        x = torch.relu(z)
    return maps, network.linear(x.mean((2, 3)))


def normalise(maps):
    return maps / (torch.norm(maps.flatten(1), dim=1).view(-1, 1, 1, 1) + 1e-3)


def build(folder, count):
    config = nern.Config(
        out=folder,
        weights="given",
        architecture="cifar-resnet20-a",
        data_free=True,
        hidden=HIDDEN,
        batch_size=count,
        kernel_batch=KERNELS,
        maps="doubled",
        device=DEVICE,
    )
    torch.manual_seed(0)
    teacher = CIFARResNet(20, "a").to(DEVICE).eval().requires_grad_(False)
    job = nern.make_job(config, teacher, None, torch.device(DEVICE))
    model = nern.make_model(config, job, teacher).to(DEVICE)
    with torch.no_grad():
        for parameter in model.final_linear_layer.parameters():
            parameter.mul_(0.05)  # or maps of this teacher, which nobody trained, would overflow
    published, optimizer = PublishedStep(model, teacher, job), Ranger(model.parameters())
    images = torch.randn(count, 3, 32, 32, device=DEVICE)

    def step(weights, number, chosen=None, bf16=False):
        drawn = job.kernels.draw(number) if chosen is None else chosen
        batch = nern.Batch(drawn, images if weights[1] else None, weights)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = nern.compute_losses(config, job, model, batch)["loss"]
        loop.differentiate(loss, model, optimizer, None)
        optimizer.step()
        return loss

    return step, lambda weights, chosen=None: published(images, weights, chosen), (model, published.predictor)


def check(step, published, models, weights, loss_error, gradient_error):
    """One step of both on the same kernels: the same loss, and the same gradients of the predictor."""
    models[1].load_state_dict(models[0].state_dict())
    chosen = torch.randint(29_744, (KERNELS,), device=DEVICE)
    torch.testing.assert_close(step(weights, 0, chosen), published(weights, chosen), rtol=loss_error, atol=1e-6)
    for ours, theirs in zip(*(list(model.parameters()) for model in models), strict=True):
        error = float((ours.grad - theirs.grad).norm() / theirs.grad.norm())
        if error > gradient_error:
            raise ValueError(f"nern_step: gradients must be those of the published step, got {error:.2g} from them")


def seconds(run, *args, threads):
    clock = time.thread_time if threads == 1 and DEVICE == "cpu" else time.perf_counter
    begin = clock()
    run(*args)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def time_steps(weights, options: Options) -> dict[str, list[float]]:
    torch.backends.cudnn.allow_tf32 = False  # or gradients would differ by more than is allowed
    with TemporaryDirectory() as folder:
        step, published, models = build(folder, 8 if options.small else IMAGES)
        # emulated, bfloat16 takes eleven times as long as float32
        runs = {"fastws": step} | ({"fastws bf16": partial(step, bf16=True)} if HAS_BF16 or options.full else {})
        for name, run in runs.items():
            check(run, published, models, weights, *TOLERANCES[name])
        times = {name: [] for name in (*runs, "published")}
        for number in range(1 if options.small else 3 if options.quick else 7):
            for name, run in runs.items():
                repeats = range(1 if weights[1] else 5)
                times[name] += [seconds(run, weights, number, threads=options.threads) for _ in repeats]
            times["published"].append(seconds(published, weights, threads=options.threads))
    return times


def rows(options: Options) -> Iterator[dict]:
    for case, weights in (("joint", JOINT), ("reconstruction only", RECONSTRUCTION)):
        times = time_steps(weights, options)
        published = statistics.median(times["published"])
        for name, values in times.items():
            about = {"op": "nern_step", "implementation": name, "case": f"ResNet-20, h {HIDDEN}, {case}"}
            about |= {"us": statistics.median(values) * 1e6, "iqr": (max(values) - min(values)) * 1e6}
            yield about | {"of_published": published / statistics.median(values)}
