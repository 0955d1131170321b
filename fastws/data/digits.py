"""The 1,797 digits of 8 x 8 pixels that come with scikit-learn."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
from torch import Tensor

WHITE = 16  # pixels are whole numbers up to this one
TEST_SHARE = 0.2
SPLIT_SEED = 42


def read() -> list[tuple[Tensor, Tensor]]:
    """Pixels uint8 ``[n, 1, 8, 8]`` and labels for training and testing, split by class; scikit-learn isn't imported.

    Raises:
        FileNotFoundError: If scikit-learn is not installed.
    """
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("digits: scikit-learn must be installed, it brings them; pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file must come with scikit-learn, got none; pip install -U scikit-learn")
    with gzip.open(path) as file:
        table = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.float32))
    images, labels = table[:, :-1].view(-1, 1, 8, 8).to(torch.uint8), table[:, -1].long()
    random = numpy.random.default_rng(SPLIT_SEED)
    testing = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        testing[members[random.permutation(len(members))[: round(TEST_SHARE * len(members))]]] = True
    # the file has the classes in random order, so that the first rows are a sample
    return [(images[part], labels[part]) for part in (~testing, testing)]
