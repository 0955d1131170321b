"""What a checkpoint of a NeRN says beside its weights: enough to make the stored layers from it alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastws.checks import is_permutation
from fastws.files.checkpoints import load_plain
from fastws.files.limits import DAMAGED
from fastws.nern.layers import StoredLayers
from fastws.nn.nern import NeRN, NeRNConfig, load


def describe(nern: NeRN, stored: StoredLayers) -> dict[str, Any]:
    """Plain containers, and the rows of the kernels."""
    config = asdict(nern.config) | {"gauss_scale": list(nern.config.gauss_scale)}
    return {"nern": config, "stored": stored.to_dict(), "rows": stored.rows.cpu()}


def load_nern(path: str | Path) -> tuple[NeRN, StoredLayers, dict[str, Tensor]]:
    """The NeRN in a ``checkpoint.pt`` or ``best.pt`` of ``fastws train nern``; nothing in the file is executed.

    Returns:
        The NeRN, the layers it stores, and the tensors of the network that were learned with it as they are, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not such a checkpoint.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: file must be there, got none")
    try:
        content = load_plain(path)
        state, extra = content["model"], content["extra"]
        config = NeRNConfig(**extra["nern"] | {"gauss_scale": tuple(extra["nern"]["gauss_scale"])})
        stored = StoredLayers.from_dict(extra["stored"], extra["rows"])
        learned = {extra["learned"]: state["classifier"]} if extra["learned"] else {}
        check(config, state, stored)
        nern = NeRN(config, stored.grid)
    except DAMAGED as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: file must be a checkpoint of fastws train nern, got {first}") from error
    load(nern, state)
    return nern, stored, learned


def check(config: NeRNConfig, state: dict[str, Tensor], stored: StoredLayers) -> None:
    """Raises ValueError unless predictions have the size of kernels, weights are finite, and each row is of one."""
    if stored.kernel != config.kernel:
        raise ValueError(f"kernels {stored.kernel} wide for predictions {config.kernel} wide")
    if f"layers.{config.blocks - 2}.weight" not in state:
        raise ValueError(f"fewer than its {config.blocks} layers")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} that is not finite")
    count = sum(layer.kernels for layer in stored.layers)
    if stored.rows.dtype != torch.int64 or stored.rows.shape != (count,) or not is_permutation(stored.rows):
        raise ValueError(f"rows that are no order of {count} kernels")
