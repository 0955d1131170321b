"""Pairs of states of one network that follow each other: what sequence prediction learns from."""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from fastws.zoo.format.zoo import Zoo


def sequence_pairs(zoo: Zoo, epochs: Sequence[int] | None = None) -> Tensor:
    """Rows of a state and of the next state of the same network, int64 ``[n, 2]``.

    Networks in the order in which they first appear, epochs in the order given. A pair is left out if one of its states
    is not in the zoo.

    Args:
        zoo: With a column ``epoch``.
        epochs: Which of them follow each other; by default all in the zoo, ascending.

    Raises:
        ValueError: If the zoo has no epochs.

    Example:
        >>> now, following = sequence_pairs(zoo).T  # doctest: +SKIP
        >>> steps = zoo.rows(following) - zoo.rows(now)  # doctest: +SKIP
    """
    if "epoch" not in zoo.properties.column_names:
        raise ValueError(
            f"sequence_pairs: zoo must have a column 'epoch', got {', '.join(zoo.properties.column_names)}"
        )
    dictionary = zoo.properties["model"].combine_chunks().dictionary_encode()
    models, of_state = dictionary.indices.to_numpy(), zoo.numbers("epoch")
    epochs = numpy.unique(of_state) if epochs is None else numpy.asarray(epochs)
    rows = numpy.full((len(dictionary.dictionary), len(epochs)), -1)
    for place, epoch in enumerate(epochs):
        here = numpy.flatnonzero(of_state == epoch)
        rows[models[here], place] = here
    pairs = numpy.stack([rows[:, :-1], rows[:, 1:]], -1).reshape(-1, 2)
    return torch.from_numpy(pairs[(pairs >= 0).all(1)])
