"""Small networks and what is made of them, with known answers."""

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES = (32, 24, 24, 10)


def make_module() -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in zip(SIZES[:-1], SIZES[1:], strict=True)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def factory() -> tuple[nn.Module, Tensor]:
    """For --architecture relatives:factory."""
    return make_module(), torch.randn(1, SIZES[0], generator=torch.Generator().manual_seed(0))


def network(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: tensor.clone() for name, tensor in make_module().state_dict().items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tuned(state: dict[str, Tensor], noise: float = 0.1, seed: int = 0) -> dict[str, Tensor]:
    random = generator(seed)
    return {name: x + noise * x.std() * torch.randn(x.shape, generator=random) for name, x in state.items()}


def matrices(state: dict[str, Tensor], change) -> dict[str, Tensor]:
    return {name: change(x) if x.dim() > 1 else x.clone() for name, x in state.items()}


def pruned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return matrices(state, lambda x: torch.where(x.abs() < x.abs().median(), 0.0, x))


def quantised(state: dict[str, Tensor], bits: int = 4) -> dict[str, Tensor]:
    def change(x):
        step = x.abs().max() / (2 ** (bits - 1) - 1)
        return (x / step).round() * step

    return matrices(state, change)


def low_rank(state: dict[str, Tensor], rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    random = generator(seed)

    def change(x):
        a, b = (torch.randn(size, rank, generator=random) for size in x.shape)
        return x + 0.02 * a @ b.T

    return matrices(state, change)


def average(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def moved(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same function, with hidden units in another order."""
    random, state = generator(seed), dict(state)
    names = [name for name in state if name.endswith("weight")]
    for before, after in zip(names[:-1], names[1:], strict=True):
        order, bias = torch.randperm(len(state[before]), generator=random), before.replace("weight", "bias")
        state[before], state[bias], state[after] = state[before][order], state[bias][order], state[after][:, order]
    return state


def save(folder, name: str, state: dict[str, Tensor]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return str(path)


def scaled(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same function, with units of ReLU multiplied by powers of two on one side and divided on the other."""
    random, state = generator(seed), dict(state)
    names = [name for name in state if name.endswith("weight")]
    for before, after in zip(names[:-1], names[1:], strict=True):
        scale, bias = (
            2.0 ** torch.randint(-2, 3, (len(state[before]),), generator=random),
            before.replace("weight", "bias"),
        )
        state[before], state[bias] = state[before] * scale[:, None], state[bias] * scale
        state[after] = state[after] / scale
    return state
