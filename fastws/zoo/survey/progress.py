"""Whether a zoo is finished, from what lies in its folder."""

from collections.abc import Mapping

from fastws.files import json
from fastws.zoo.format.writer import MODELS
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making import ranks
from fastws.zoo.making.recipes import kept_epochs
from fastws.zoo.making.resume import RESUME


def find_unfinished(zoo: Zoo) -> str:
    """What is missing from a zoo; "" if nothing is, as far as its folder tells.

    Raises:
        ValueError: If ``read.json`` of a zoo that was read is damaged.
    """
    if (zoo.path / RESUME).exists() or ranks.begun_parts(zoo.path):
        return f"zoo make has {len(zoo):,} states so far"
    wanted, there = count_wanted(zoo), len(zoo) + zoo.dropped
    if there < wanted:
        return f"{there:,} of {wanted:,} states are there"
    if [file["file"] for file in zoo.model_files] not in ([], [MODELS]):
        return "a writer is at work, or was killed before it closed the zoo"
    return ""


def count_wanted(zoo: Zoo) -> int:
    """States that a zoo is to have, by what made it; 0 where that is unknown."""
    path, config = zoo.path / "read.json", zoo.provenance.get("config")
    if path.is_file():
        content = json.read(path)
        try:
            return content["states"] - len(content["bad"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: file must be that of zoo read, got {error!r}; remove {zoo.path}") from error
    # a sample keeps the configuration of the zoo that it was drawn from
    if "sampled" in zoo.provenance or not isinstance(config, Mapping):
        return 0
    networks, epochs, kept = (config.get(name) for name in ("networks", "epochs", "keep_epochs"))
    kept = kept or []  # of zoos of before
    if not isinstance(kept, list) or not all(type(number) is int for number in (networks, epochs, *kept)):
        return 0
    return networks * len(kept_epochs(epochs, kept))
