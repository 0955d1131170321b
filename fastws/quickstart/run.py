"""The first complete job: a zoo of small networks, a SANE of their weights, what its embeddings say, new networks.

Networks of the test split are seen by nothing before the last stage: not by SANE, not by the statistics that
standardise weights, not by the reference of the alignment, not by the probes. Penalties and the scaling of features are
chosen on the validation split. The sizes of SANE, the share that is erased and the way to pool were chosen once, on the
validation split of seed 0, never on a test split.
"""

import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import numpy
import torch
from torch import Tensor

from fastws import pages
from fastws.devices import processor_name
from fastws.downstream.embed import compare_distances, embed, load_embeddings, save_embeddings
from fastws.downstream.encoder import Pool, average, encode, load_encoder
from fastws.downstream.probes.features import layer_statistics
from fastws.downstream.probes.intervals import r2_interval
from fastws.downstream.probes.ridge import fit_probes
from fastws.downstream.probes.targets import read_target
from fastws.files.atomic import write_json
from fastws.files.json import parse
from fastws.files.limits import read_bytes
from fastws.quickstart import nern_demo, new_networks
from fastws.quickstart import page as report
from fastws.runs.begun import begin
from fastws.runs.stages import TIMES, stage
from fastws.train import files
from fastws.train.sane import train as sane
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import aligned_rows, rows_of
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.make import Config as ZooConfig
from fastws.zoo.making.make import make

SPLITS = ("train", "val", "test")
TARGETS = ("test_accuracy", "epoch", "generalisation_gap")
SMOKE = {
    "networks": 24,
    "epochs": 4,
    "probe_epochs": (1, 2, 3, 4),
    "steps": 12,
    "batch_size": 8,
    "width": 16,
    "nern_steps": 20,
    "sampled_zoo": 80,
    "passes": 2,
    "samples": 12,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes a zoo of small networks, trains SANE on it and writes a report: minutes on two processor cores.

    fastws quickstart
    fastws quickstart --smoke --out runs/smoke
    """

    out: str = "runs/quickstart"  # folder of the run; the same command resumes a run that was stopped
    seed: int = 0  # seed of everything random
    smoke: bool = False  # a tiny run, to see that everything works; its numbers mean nothing

    networks: int = 600  # networks in the zoo; 70 % to train on, 15 % to choose by, 15 % to test on
    epochs: int = 25  # of training; each network is kept after every one
    probe_epochs: tuple[int, ...] = (1, 3, 5, 10, 15, 20, 25)  # epochs whose states are probed, as published
    align: bool = True  # put all networks' neurons in the order of one network's

    steps: int = 600  # of SANE's training
    batch_size: int = 32  # networks per step
    lr: float = 3e-3  # peak of the one-cycle schedule
    width: int = 64  # of SANE's transformers
    depth: int = 2  # blocks of SANE's encoder, and of its decoder
    latent: int = 64  # entries per token embedding
    gamma: float = 0.1  # weight of the contrastive loss; reconstruction gets 1 - gamma
    noise: float = 0.1  # std of the factors that all weights of a view are multiplied by
    erase: float = 0.5  # share of the weights of a view that are set to 0; SANE reconstructs what was there

    nern_steps: int = 1000  # of storing the best network in a NeRN

    sampled_zoo: int = 240  # networks of the zoo that new networks are sampled from
    passes: int = 50  # over the training networks by the autoencoder that samples come from
    samples: int = 80  # new networks of each kind

    pool: Pool = "layers"  # what embeds a network: means of its token embeddings, of each layer or over all
    permutations: int = 8  # permuted copies of each test network, to see how far they move its embedding
    threads: int = 0  # processor cores to use; 0: all

    def __post_init__(self):
        if self.networks < 20:
            raise ValueError(f"quickstart: networks must be at least 20, some for each split, got {self.networks}")
        if self.sampled_zoo < 80:
            raise ValueError(
                f"quickstart: sampled_zoo must be at least 80, to judge samples by, got {self.sampled_zoo}"
            )
        for name in ("epochs", "permutations", "nern_steps", "passes", "samples", "width", "depth", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"quickstart: {name} must be at least 1, got {getattr(self, name)}")
        if not self.probe_epochs or not all(0 <= epoch <= self.epochs for epoch in self.probe_epochs):
            raise ValueError(f"quickstart: probe_epochs must be in [0, {self.epochs}], got {self.probe_epochs}")
        if self.threads < 0:
            raise ValueError(f"quickstart: threads must be at least 0, got {self.threads}")
        sane_config(self, Path(self.out), zoo="", window=1)  # says what else is out of range


def run(config: Config) -> None:
    pages.require_matplotlib("quickstart")
    if config.smoke:
        config = replace(config, **SMOKE)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        run_stages(config, Path(config.out))
    finally:
        torch.set_num_threads(threads)


def run_stages(config: Config, folder: Path) -> None:
    started = perf_counter()
    begin("quickstart", folder, config, may_change=("out",))
    results, count = {}, len(STAGES) + 1
    for number, (name, work) in enumerate(STAGES.items()):
        print(f"[{number + 1}/{count}] {name}: {work.__doc__}", flush=True)
        results[name] = stage(folder / "stages", name, partial(work, config, folder))
    print(f"[{count}/{count}] report", flush=True)
    summary = summarise(config, results)
    write_json(folder / "results.json", summary)
    report.write(folder / "report.html", summary, read_curves(config, folder))
    print_summary(summary, folder, perf_counter() - started)


# --- stages


def make_zoo(config: Config, folder: Path) -> dict:
    """networks trained side by side on 8 x 8 digits, each by a recipe of its own"""
    zoo = make(zoo_config(config, folder))
    last = torch.from_numpy(zoo.numbers("epoch") == config.epochs)
    accuracy = numpy.quantile(zoo.numbers("test_accuracy")[last.numpy()], [0.1, 0.5, 0.9])
    return {
        "states": len(zoo),
        "weights": zoo.layout.num_weights,
        "dropped": zoo.dropped,
        "networks": {split: len(zoo.splits[split]) for split in SPLITS},
        "last_test_accuracy": dict(zip(("10 %", "50 %", "90 %"), accuracy.tolist(), strict=True)),
    }


def zoo_config(config: Config, folder: Path) -> ZooConfig:
    return ZooConfig(
        out=str(folder / "zoo"),
        networks=config.networks,
        epochs=config.epochs,
        seed=config.seed,
        activations=("tanh", "relu", "gelu"),
        inits=("kaiming_uniform", "kaiming_normal", "xavier_uniform"),
    )


def align_zoo(config: Config, folder: Path) -> dict:
    """neurons of every network put in the order of those of one reference"""
    zoo = Zoo.open(folder / "zoo")
    if not config.align:
        return {"reference": None}
    alignment = align(AlignConfig(zoo=str(zoo.path)))
    products = {"before": alignment.before.mean().item(), "after": alignment.after.mean().item()}
    return {"reference": alignment.reference, "chosen": alignment.chosen, "inner_product": products}


def train_sane(config: Config, folder: Path) -> dict:
    """an autoencoder of weights, trained on the training networks with permuted and noised views"""
    zoo = Zoo.open(folder / "zoo")
    window = zoo.layout.with_tokens(None, "skip").num_tokens
    sane.train(sane_config(config, folder, str(zoo.path), window), zoo, torch.device("cpu"))
    return {name: value for record in read_log(folder) for name, value in record.items() if "/" in name}


def sane_config(config: Config, folder: Path, zoo: str, window: int) -> sane.Config:
    return sane.Config(
        zoo=zoo,
        out=str(folder / "sane"),
        aligned=config.align,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        clip=1.0,
        size="tiny",
        width=config.width,
        depth=config.depth,
        latent=config.latent,
        window=window,
        gamma=config.gamma,
        noise=config.noise,
        erase=config.erase,
        target="clean",
        device="cpu",
        seed=config.seed,
        eval_every=max(1, config.steps // 16),
        save_every=max(1, config.steps // 8),
    )


def embed_zoo(config: Config, folder: Path) -> dict:
    """one embedding per state of every network"""
    encoder, zoo = load_encoder(folder / "sane/checkpoint.pt"), Zoo.open(folder / "zoo")
    embeddings = embed(encoder, zoo, halo=None, pool=config.pool, aligned=config.align)
    save_embeddings(folder / "embeddings.safetensors", embeddings, encoder.layout, config.align)
    return {"shape": list(embeddings.shape)}


def probe(config: Config, folder: Path) -> dict:
    """ridge regression of properties from embeddings, from statistics of the weights and from the weights"""
    zoo = Zoo.open(folder / "zoo")
    rows = probed_rows(config, zoo)
    values = torch.stack([read_target(zoo, name) for name in TARGETS], 1)
    targets = {split: values[numbers] for split, numbers in rows.items()}
    models = [zoo.properties["model"][row].as_py() for row in rows["test"].tolist()]
    scores, predictions = [], {"true": targets["test"][:, 0].tolist()}
    for kind, features in make_features(config, folder, zoo, rows).items():
        for target, (name, fit) in enumerate(zip(TARGETS, fit_probes(features, targets), strict=True)):
            interval = r2_interval(fit.test_prediction, targets["test"][:, target], models, config.seed)
            scores.append({"features": kind, "target": name, "interval": interval} | fit.scores())
            if target == 0:
                predictions[kind] = fit.test_prediction.tolist()
    return {"rows": {split: len(numbers) for split, numbers in rows.items()}, "r2": scores, "accuracy": predictions}


def probed_rows(config: Config, zoo: Zoo) -> dict[str, Tensor]:
    epochs = torch.from_numpy(zoo.numbers("epoch"))
    wanted = torch.isin(epochs, torch.tensor(config.probe_epochs))
    rows = {split: zoo.split(split) for split in SPLITS}
    return {split: numbers[wanted[numbers]] for split, numbers in rows.items()}


def make_features(config: Config, folder: Path, zoo: Zoo, rows: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What is compared: name: split: features ``[n, d]``."""
    embeddings = load_embeddings(folder / "embeddings.safetensors", len(zoo), zoo.layout)
    features = {"SANE": {split: embeddings[numbers] for split, numbers in rows.items()}}
    features["s(W)"] = {split: layer_statistics(zoo.rows(r), zoo.layout) for split, r in rows.items()}
    features["W"] = {split: zoo.rows(numbers) for split, numbers in rows.items()}
    if config.align:
        features["W aligned"] = {split: aligned_rows(zoo, numbers) for split, numbers in rows.items()}
    return features


def check_permutations(config: Config, folder: Path) -> dict:
    """how far a permutation of its neurons moves the embedding of a network, which computes the same as before"""
    encoder, zoo = load_encoder(folder / "sane/checkpoint.pt"), Zoo.open(folder / "zoo")
    epochs = torch.from_numpy(zoo.numbers("epoch"))
    rows = zoo.split("test")
    weights = rows_of(zoo, config.align)(rows[epochs[rows] == config.epochs])
    permutations = zoo.symmetry.random(len(weights) * config.permutations, config.seed)
    repeated = weights.repeat_interleave(config.permutations, 0)
    permuted = zoo.symmetry.permute(repeated, permutations, zoo.layout)
    embeddings, moved = (
        average(encoder, encode(encoder, flat, halo=None), config.pool) for flat in (weights, permuted)
    )
    return {
        "networks": len(weights),
        "permutations": config.permutations,
        "SANE": compare_distances(embeddings, moved),
        "W": compare_distances(weights, permuted),
    }


def store_network(config: Config, folder: Path) -> dict:
    """the convolutions of the best network, stored in a small network that predicts them: a NeRN"""
    return nern_demo.store_best(Zoo.open(folder / "zoo"), folder / "nern", config.nern_steps, config.seed)


def sample_networks(config: Config, folder: Path) -> dict:
    """new networks from an autoencoder of tanh networks, beside what needs no learning"""
    sizes = new_networks.Sizes(config.sampled_zoo, config.epochs, config.passes, config.samples)
    return new_networks.sample_sets(folder / "new", sizes, config.seed)


STAGES = {  # in this order
    "zoo": make_zoo,
    "align": align_zoo,
    "sane": train_sane,
    "embed": embed_zoo,
    "probe": probe,
    "permutations": check_permutations,
    "nern": store_network,
    "new": sample_networks,
}


# --- results


def summarise(config: Config, results: dict[str, dict]) -> dict:
    """The content of results.json."""
    times = {name: {key: found[key] for key in TIMES} for name, found in results.items()}
    machine = files.describe(torch.device("cpu")) | {"processor": processor_name(), "cores": os.cpu_count()}
    return {
        "command": command_of(config),
        "config": asdict(config),
        "machine": machine,
        "stages": times,
    } | {name: found["result"] for name, found in results.items()}


def command_of(config: Config) -> str:
    """The command line that repeats a run."""
    default, words = asdict(Config()), ["fastws quickstart"]
    for name, value in asdict(config).items():
        option = name.replace("_", "-")
        if value == default[name] or (config.smoke and name in SMOKE):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words.append(f"--{option} {' '.join(map(str, values))}")
    return " ".join(words)


def read_log(folder: Path) -> list[dict]:
    """The records of SANE's log, without its first line."""
    return [parse(line, "log") for line in read_bytes(folder / "sane/log.jsonl").splitlines()[1:]]


def read_curves(config: Config, folder: Path) -> report.Curves:
    zoo = Zoo.open(folder / "zoo")
    rows = torch.cat(list(probed_rows(config, zoo).values()))
    known = read_target(zoo, "test_accuracy")
    epochs = torch.from_numpy(zoo.numbers("epoch")).long()
    _, model = numpy.unique(zoo.properties["model"].to_pylist(), return_inverse=True)
    accuracy = torch.full((int(model.max()) + 1, config.epochs + 1), torch.nan, dtype=torch.float64)
    accuracy[torch.from_numpy(model), epochs] = known
    embeddings = load_embeddings(folder / "embeddings.safetensors", len(zoo), zoo.layout)[rows]
    unseen = torch.isin(rows, zoo.split("test"))
    arrays = (x.numpy() for x in (accuracy, embeddings, known[rows], unseen))
    return report.Curves(*arrays, read_log(folder))


def print_summary(results: dict, folder: Path, seconds: float) -> None:
    print(f"\nR^2 on {results['probe']['rows']['test']} states of networks that nothing was trained on:")
    print(f"{'':<10}" + "".join(f"{target:>24}" for target in TARGETS))
    for name, *cells in report.r2_rows(results["probe"]["r2"]):
        print(f"{name:<10}" + "".join(f"{cell:>24}" for cell in cells))
    check = results["permutations"]["SANE"]
    print(f"a permuted copy of a network is {check['ratio']:.3f} times as far from it as another network is;")
    print(f"it is nearer than another network in {100 * check['nearer']:.1f} % of the cases")
    before, after = results["nern"]["accuracy"]
    print(f"the best network, its convolutions stored in a NeRN: accuracy {before:.3f} before, {after:.3f} after")
    print(f"\nnew networks: {report.TRAINED.format(results['new']['more_epochs'])}")
    print(f"{'':<38}" + "".join(f"{name:>24}" for name in report.NEW))
    for name, *cells in report.new_rows(results["new"]):
        print(f"{name:<38}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"\n{seconds:.0f} s, {process_time():.0f} s of processor time")
    print(f"report:  {folder / 'report.html'}   (open it in a browser)")
    print(f"numbers: {folder / 'results.json'}")
    print(f"next:    fastws zoo info --zoo {folder / 'zoo'}, then fastws train sane --help")
