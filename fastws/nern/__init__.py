"""NeRN: what is done with the kernels of a network that a small network stores (arXiv 2212.13554)."""
