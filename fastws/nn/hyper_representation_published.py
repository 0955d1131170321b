"""Published hyper-representations in our words: names in their state dicts, and their configurations."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastws.nn.perceptron import linear_widths
from fastws.nn.weight_tokens import Rows


def rename(name: str) -> str:
    """Names of the oldest models, which have no table of layers, in those of the newer ones."""
    name = name.removeprefix("model.")
    for layer in (1, 2):
        for module in ("token_embeddings", "token_debeddings"):
            name = name.replace(f"{module}.neuron_l{layer}.", f"{module}.layer_lst.{layer - 1}.")
    return name


def published_fields(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of ``HyperRepresentationConfig`` for a published configuration."""

    def get(name: str, default: Any = None) -> Any:
        return config.get(f"model::{name}", default)

    size, latent, dropout = get("i_dim"), get("latent_dim"), get("dropout", 0.1)
    head = get("projection_head_layers", 0) or 0
    common = {
        "size": size,
        "layers": published_rows(get("index_dict"), state),
        "latent": latent,
        "dropout": dropout,
        "head_depth": head,
        "head_width": get("projection_head_hdim") or latent,
        "projection": get("projection_head_odim") or max(1, latent // 2),
        "head_norm": get("projection_head_batchnorm", True),
    }
    if get("type", "vanilla") == "vanilla":
        return dict(
            encoding="vector",
            hidden=tuple(linear_widths(size, latent, get("h_layers", 1))[1:-1]),
            activation=get("nlin", "leakyrelu"),
            bounded=get("normalize_latent", True),
            residual_blocks=get("res_blocks", 0),
            residual_depth=get("res_block_lays", 0),
            **common,
        )
    token = any(name.endswith("encoder.comp_token") for name in state)
    bottleneck = get("bottleneck", "linear")
    return dict(
        encoding=get("encoding", "weight"),
        width=get("dim_attention_embedding"),
        heads=get("N_attention_heads"),
        depth=get("N_attention_blocks"),
        feed_forward=get("attention_hidden_dim"),
        normalize=bool(get("normalize", True)),
        # the first code has a flag for the token and always bounds the code; the second has names for both
        compression="token" if token else get("compression", "linear"),
        bounded=bottleneck == "linear_bounded" or "model::compression" not in config,
        decompression=get("decompression", "linear"),
        bottleneck_depth=get("bottleneck::h_lays", 3) if bottleneck == "mlp" else 0,
        decoder_bias=bool(get("decoder_bias")),
        debedder_depth=get("debedder_layers", 1),
        embedder="attn" if get("encoder") == "attn" else "linear",
        embedder_width=get("attn_embedder_dim", 32),
        embedder_heads=get("attn_embedder_nheads", 4),
        **common,
    )


def published_rows(table: Mapping[str, list[int]] | None, state: Mapping[str, Tensor]) -> tuple[Rows, ...]:
    """Layers of the published table of offsets; without one those of the perceptron of 16, 5 and 4 units."""
    if table is None:
        return (Rows(0, -1, 5, 16), Rows(80, -1, 4, 5))
    columns = (table[name] for name in ("idx_start", "kernel_no", "kernel_size", "channels_in"))
    return tuple(
        Rows(start, start + rows * size * inputs, rows, size * inputs)
        for start, rows, size, inputs in zip(*columns, strict=True)
    )
