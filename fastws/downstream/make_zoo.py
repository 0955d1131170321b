"""``fastws zoo make``, with what the making of zoos knows nothing of: a model that networks pass through on the way."""

from collections.abc import Callable

from torch import Tensor

from fastws.downstream.representation import load
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making import make
from fastws.zoo.making.make import Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    make.run(config, regularisation(config))


def regularisation(config: Config) -> Callable[[Tensor], Tensor] | None:
    """What weights ``[G, P]`` are replaced by after the epochs ``regularise_at``: what the model makes of them.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it does not fit the networks, or learned them in an order that they do not have.
    """
    if config.regularise is None:
        return None
    representation, zoo = load(config.regularise, config.device), Zoo.open(config.start)
    representation.layout.require_same(zoo.layout, f"zoo make: start {zoo.path}")
    sampled = zoo.provenance.get("sampled")
    if representation.aligned and not (isinstance(sampled, dict) and sampled.get("aligned")):
        what = "sampled from aligned networks, as regularise learned them"
        raise ValueError(f"zoo make: start must be {what}, got {zoo.path}, whose networks are in any order")

    def regularise(weights: Tensor) -> Tensor:
        own = weights.to(config.device)
        return representation.decode(representation.encode(own), like=own).to(weights)

    return regularise
