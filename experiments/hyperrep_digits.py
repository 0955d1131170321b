"""New networks from a hyper-representation of digits networks, beside what needs no learning, and what they are worth.

python experiments/hyperrep_digits.py --out runs/hyperrep-digits-0 --seed 0    # --smoke for a minute's run

A zoo of tanh networks with weight decay, all in one order of neurons; a small autoencoder of them; networks sampled
from its codes as the paper describes it (`independent`) and as its code was released (`reference`), and from the
weights themselves. Each is measured at epoch 0 and after one epoch of training, beside networks trained from scratch,
and judged by its distance to the training networks. The same command goes on where a stopped run was.
"""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import tyro

from fastws.downstream import compare_zoos, evaluate, sample
from fastws.files.atomic import write_json
from fastws.terminal import one_sentence
from fastws.train.ae import train as ae
from fastws.zoo import Zoo, make
from fastws.zoo.align import ALIGNMENT, align
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.making.make import Config as MakeConfig

LAST_EPOCHS = (21, 25)
SETS = {  # name: how it is sampled; those with "model" from the autoencoder's codes
    "reconstructed": {"method": "direct", "model": True},
    "kde-independent": {"method": "kde", "best": 0.3, "model": True},
    "kde-reference": {"method": "kde", "best": 0.3, "mode": "reference", "model": True},
    "flow": {"method": "flow", "components": 64},
    "gan": {"method": "gan", "components": 64},
    "pca64": {"method": "gaussian", "components": 64},
    "noise": {"method": "noise", "noise": 0.4},
    "average": {"method": "average", "together": 2},
}
SMOKE = ("reconstructed", "kde-independent", "noise")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes a zoo, learns it, samples from it, and says what the samples are worth."""

    out: str  # folder of everything
    seed: int = 0  # of the zoo
    networks: int = 400  # of the zoo
    count: int = 200  # networks of each set
    passes: int = 100  # of the autoencoder over the training networks
    smoke: bool = False  # a few networks, to see that everything works; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one


def run(config: Config) -> None:
    begin, out = perf_counter(), Path(config.out)
    networks, epochs = (80, 2) if config.smoke else (config.networks, LAST_EPOCHS[1])
    states, count = ((1, 2), 12) if config.smoke else (LAST_EPOCHS, config.count)
    choices = {"activations": ("tanh",), "inits": ("xavier_uniform",), "optimizers": ("momentum",), "lrs": (0.1,)}
    zoo = make(
        MakeConfig(
            out=str(out / "zoo"),
            networks=networks,
            epochs=epochs,
            weight_decays=(1e-2,),
            validation=200,
            seed=config.seed,
            **choices,
        )
    )
    if not (zoo.path / ALIGNMENT).exists():
        align(AlignConfig(zoo=str(zoo.path), best="val_accuracy"))
    ae.run(
        ae.Config(
            zoo=str(zoo.path),
            out=str(out / "ae"),
            epochs=states,
            aligned=True,
            device=config.device,
            passes=2 if config.smoke else config.passes,
            seed=config.seed,
        )
    )
    found = {"seed": config.seed, "sets": {}, "zoo": accuracy_of(zoo, epochs), "scratch": accuracy_of(zoo, 1)}
    sets = {name: SETS[name] for name in (SMOKE if config.smoke else SETS)}
    for name, options in sets.items():
        found["sets"][name] = after_one_epoch(config, out, zoo, name, dict(options), states, count)
    judged = compare_zoos.compare(
        compare_zoos.Config(
            zoo=str(zoo.path),
            samples=tuple(str(out / name) for name in sets),
            out=str(out / "compare"),
            epochs=states,
            count=count,
            baselines=not config.smoke,
            device=config.device,
        )
    )
    for one in judged["sets"]:
        found["sets"].setdefault(one["name"], {}).update(
            {name: one[name][0] for name in ("accuracy", "novelty", "spread", "apart")}
        )
    found |= {"verdicts": judged["verdicts"], "recall": judged["recall"], "seconds": perf_counter() - begin}
    write_json(out / "results.json", found)
    print_table(found)


def after_one_epoch(
    config: Config, out: Path, zoo: Zoo, name: str, options: dict, states: tuple[int, int], count: int
) -> dict[str, float]:
    """Samples a set, unless it is there, measures it, trains it for one epoch and measures it again."""
    if not (out / name / "zoo.json").exists():
        options["model"] = str(out / "ae/checkpoint.pt") if options.pop("model", False) else None
        sample.sample(
            sample.Config(
                zoo=str(zoo.path),
                out=str(out / name),
                epochs=states,
                count=count,
                seed=config.seed,
                aligned=True,
                device=config.device,
                **options,
            )
        )
    evaluate.evaluate(evaluate.Config(zoo=str(out / name), device=config.device))
    trained = make(MakeConfig(out=str(out / f"{name}-trained"), start=str(out / name), epochs=1))
    return {"epoch 0": accuracy_of(trained, 0), "epoch 1": accuracy_of(trained, 1)}


def accuracy_of(zoo: Zoo, epoch: int) -> float:
    return float(zoo.numbers("test_accuracy")[zoo.numbers("epoch") == epoch].mean())


def print_table(found: dict) -> None:
    print(f"\nnetworks of the zoo {found['zoo']:.3f}; from scratch after one epoch {found['scratch']:.3f}")
    print(f"{'':36}{'epoch 0':>9}{'epoch 1':>9}{'novelty':>9}{'spread':>9}{'apart':>9}")
    for name, row in found["sets"].items():
        first = row.get("epoch 0", row.get("accuracy"))
        cells = [first, row.get("epoch 1"), row.get("novelty"), row.get("spread"), row.get("apart")]
        print(f"{name:36}" + "".join(f"{'' if cell is None else f'{cell:.3f}':>9}" for cell in cells))
    for sentence in found["verdicts"].values():
        print(sentence)


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
