"""The published models' shapes, so that "does it fit?" needs no download.

Only shapes: longrope's factors are not here, so :func:`published_config` counts bytes and never builds a forward
pass. A model argument of a command that needs shapes alone is resolved by :func:`model_shapes`.
"""

from __future__ import annotations

__all__ = ["PUBLISHED", "model_shapes", "published_config"]

import re
from pathlib import Path

from phi4edge.checkpoint.config import ModelConfig, RopeConfig, load_config
from phi4edge.core.errors import InputError, MissingToolError, closest

# Source: config.json of microsoft/phi-4 and of microsoft/Phi-4-mini-instruct.
_PHI_4 = ModelConfig(
    vocab_size=100352,
    hidden_size=5120,
    intermediate_size=17920,
    num_layers=40,
    num_heads=40,
    num_kv_heads=10,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=250000.0, dim=128),
    context_length=16384,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=100257,
    eos_token_ids=(100257,),
    pad_token_id=100257,
    dtype="bfloat16",
    raw={},
)
_PHI_4_MINI = ModelConfig(
    vocab_size=200064,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=32,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, dim=96, original_context=4096, attention_factor=1.190238),
    context_length=131072,
    sliding_window=262144,
    tie_word_embeddings=True,
    bos_token_id=199999,
    eos_token_ids=(200020,),
    pad_token_id=199999,
    dtype="bfloat16",
    raw={},
)
# Largest first: what does not fit is answered with the next one that does.
PUBLISHED = {"phi-4": _PHI_4, "phi-4-mini": _PHI_4_MINI}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ALIASES = {
    "phi-4-mini-instruct": "phi-4-mini",
    "microsoft/phi-4": "phi-4",
    "microsoft/phi-4-mini-instruct": "phi-4-mini",
}


def published_config(name: str) -> tuple[str, ModelConfig] | None:
    """The short name and shapes of a published model, by that name or its hub id; None for any other."""
    key = _ALIASES.get(name.lower(), name.lower())
    return (key, PUBLISHED[key]) if key in PUBLISHED else None


def model_shapes(model: str) -> tuple[str, ModelConfig]:
    """Name and shapes of ``model``: a checkpoint folder, a published name (no download), or another hub id.

    Raises:
        InputError: none of these, or its config.json is not of the family.
    """
    if not Path(model).is_dir():
        known = published_config(model)
        if known:
            return known
        if "/" not in model:
            near = closest(model, PUBLISHED)
            hint = f"did you mean {near!r}? " if near else ""
            raise InputError(
                f"{model}: no such model folder, and not a published model",
                f"{hint}known without a download: {', '.join(PUBLISHED)}; else give a checkpoint's folder or a hub id",
            )
    return model, load_config(Path(model)) if not HUB_ID.fullmatch(model) or Path(model).exists() else _hub_config(
        model
    )


def _hub_config(model: str) -> ModelConfig:
    """Only config.json of a hub id; weights are not fetched to count bytes."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingToolError(f"{model}: huggingface_hub is not installed", "pip install huggingface_hub") from error
    try:
        return load_config(Path(hf_hub_download(model, "config.json")).parent)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model}: no such folder, and the hub did not give its config.json ({reason})",
            f"known without a download: {', '.join(PUBLISHED)}; or give the folder of a checkpoint",
        ) from error
