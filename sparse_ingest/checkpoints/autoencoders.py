"""The modules of a sparse autoencoder (CSR) in the layout of sentence-transformers.

In: the modules of modules.json: a transformer, its pooling, then `Dense` and `Normalize` in any order, and last the
`SparseAutoEncoder`. Out: the side of a task, with everything that models/ needs to compute it. Weights are not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from sparse_ingest.checkpoints.modules import Module, damaged, prompts, read_as, read_transformer
from sparse_ingest.checkpoints.sides import AutoencoderSide, Layer
from sparse_ingest.errors import CheckpointError, short_repr

AUTOENCODER = "SparseAutoEncoder"
# In the order of their outputs, with the names in configs of older releases.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# Classes of torch.nn
DENSE_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
EMBEDDING = "sentence_embedding"  # the only input and output of a module that is supported
Size = Annotated[int, Meta(ge=1, le=1 << 22)]


class _Pooling(TypedDict, total=False):
    pooling_mode: str | list[str] | None
    include_prompt: bool


class _Layer(TypedDict, total=False):
    out_features: Size
    bias: bool
    activation_function: str
    use_residual: bool
    module_input_name: str
    module_output_name: str | None


class _Autoencoder(TypedDict, total=False):
    input_dim: Required[Size]
    hidden_dim: Size
    k: Size
    normalize: bool


def read_autoencoder(folder: Path, chain: list[Module], task: str, limit: int | None) -> AutoencoderSide:
    """Read the modules of a model; `limit` is the number of features of a row that the library keeps instead of `k`.

    Raise `CheckpointError` if a module or a value is not supported, or a file is missing or malformed.
    """
    kinds = [module.kind for module in chain]
    if kinds[:2] != ["Transformer", "Pooling"] or not {"Dense", "Normalize"}.issuperset(kinds[2:-1]):
        raise CheckpointError(
            f"{folder / 'modules.json'} has the modules {', '.join(kinds)}; expected Transformer, Pooling, then any "
            f"number of Dense and Normalize, then {AUTOENCODER}. Use another model."
        )
    transformer, pooling, *layers, autoencoder = chain
    declared: dict[str, Any] = {"activation": "none", "pooling": None}
    declared |= read_transformer(transformer, task, "feature-extraction") | prompts(folder)
    path = autoencoder.folder / "config.json"
    config = read_as(path, _Autoencoder)
    features, k = config.get("hidden_dim", 512), limit or config.get("k", 8)
    if k > features:
        raise damaged(f"{path} has {features:,} features, and {k:,} of them for each text; expected at most all")
    return AutoencoderSide(
        transformer.folder,
        declared,
        poolings_of_tokens=_poolings(pooling.folder / "config.json"),
        layers=tuple(_layer(module) for module in layers),
        autoencoder=autoencoder.folder,
        features=features,
        k=k,
        normalize=config.get("normalize", False),
    )


def _poolings(path: Path) -> tuple[str, ...]:
    """Return the names of the poolings whose results are the embedding, one after another."""
    config, by_name = read_as(path, _Pooling), read_as(path, dict[str, Any])
    written = config.get("pooling_mode") or [name for name, old in POOLINGS.items() if by_name.get(old)] or "mean"
    names = (written,) if isinstance(written, str) else tuple(written)
    if unknown := [name for name in names if name not in POOLINGS]:
        raise CheckpointError(f"{path} has pooling_mode = {short_repr(unknown[0])}; expected {', '.join(POOLINGS)}.")
    if not config.get("include_prompt", True):
        raise CheckpointError(f"{path} has include_prompt = false, which is not supported; expected true.")
    return names


def _layer(module: Module) -> Layer:
    path = module.folder / "config.json"
    config = read_as(path, _Layer)
    # sentence-transformers' own default is Tanh.
    package, _, activation = config.get("activation_function", "torch.nn.Tanh").rpartition(".")
    supported = {
        "activation_function": package.startswith("torch.nn") and activation in DENSE_ACTIVATIONS,
        "use_residual": not config.get("use_residual"),
        "module_input_name": config.get("module_input_name", EMBEDDING) == EMBEDDING,
        "module_output_name": config.get("module_output_name") in (EMBEDDING, None),
    }
    if wrong := next((key for key, fits in supported.items() if not fits), None):
        raise CheckpointError(
            f"{path} has {wrong} = {short_repr(dict(config)[wrong])}, which is not supported; expected an activation "
            f"of torch.nn ({', '.join(DENSE_ACTIVATIONS)}), no residual, and {EMBEDDING} as input and output."
        )
    if module.kind == "Normalize":
        return Layer(module.folder, None, 0, False)
    if "out_features" not in config:
        raise damaged(f"{path} has no out_features")
    return Layer(module.folder, activation, config["out_features"], config.get("bias", True))
