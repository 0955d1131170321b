"""Fast kernels and lean trainers for weight-space learning.

Shapes: B checkpoints in a batch, M in a zoo, P weights per checkpoint, L layers, N tokens, T token size, W window,
S indices in a row of permutations, D width, E embedding.
"""

from importlib import import_module

from fastws.version import __version__

# what is imported at first use, and from where: registering all ops with torch would take longer than all the rest
LATER = {
    "AliasTable": "fastws.ops.weighted_sample",
    "Erasing": "fastws.ops.token_views",
    "Group": "fastws.group",
    "Layout": "fastws.layout",
    "Noise": "fastws.ops.token_views",
    "Symmetry": "fastws.symmetry",
    "Tokens": "fastws.tokens",
    "Zoo": "fastws.zoo",
    "attention": "fastws.ops.attention",
    "complement": "fastws.ops.random_subset",
    "coordinate_mlp": "fastws.ops.coordinate_mlp",
    "detokenize": "fastws.ops.tokenize",
    "feature_distance": "fastws.ops.feature_distance",
    "kernel_gradients": "fastws.ops.kernel_gradients",
    "kernel_order": "fastws.ops.kernel_order",
    "layer_statistics": "fastws.ops.layer_statistics",
    "layer_table": "fastws.small_cnn",
    "layerwise_mse": "fastws.ops.layerwise_mse",
    "lineage": "fastws.compare.lineage",
    "masked_mse": "fastws.ops.masked_mse",
    "matched_distance": "fastws.ops.matched_distance",
    "match": "fastws.matching.match",
    "merge": "fastws.compare.merging",
    "nt_xent": "fastws.ops.nt_xent",
    "permute": "fastws.ops.permute",
    "random_permutations": "fastws.ops.permute",
    "random_subset": "fastws.ops.random_subset",
    "same": "fastws.compare.same",
    "small_cnn_logits": "fastws.ops.small_cnn_step",
    "small_cnn_step": "fastws.ops.small_cnn_step",
    "token_views": "fastws.ops.token_views",
    "tokenize": "fastws.ops.tokenize",
    "variational_cnn_step": "fastws.ops.variational_cnn_step",
    "weighted_sample": "fastws.ops.weighted_sample",
}
PACKAGES = ("downstream", "nn", "ops", "zoo")
__all__ = ["__version__", *LATER, *PACKAGES]


def __getattr__(name: str):
    if name in PACKAGES:
        return import_module(f"fastws.{name}")
    if name not in LATER:
        raise AttributeError(f"module 'fastws' has no attribute {name!r}")
    globals()[name] = getattr(import_module(LATER[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
