"""A measured speed against what the target's memory can deliver: the roofline, and what was estimated beforehand.

Decoding cannot read weights faster than the memory gives them, so tok/s ≤ bandwidth / bytes read a token. The bytes are
those of the artifact itself, tensor by tensor, without an embedding that is not the head: one row of it is read. A
speed above that is flagged: a figure is wrong, or a cache held the weights, or not all of the work was done.
"""

from __future__ import annotations

__all__ = ["artifact_traffic", "assess", "runtime_option"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4edge.core.errors import InputError
from phi4edge.measurement.artifact import default_runtime
from phi4edge.targets.fit import KV_BYTES
from phi4edge.targets.probe_memory import last_level_cache
from phi4edge.targets.profile import LOCAL, Profile, RuntimeOption
from phi4edge.targets.roofline import SpeedEstimate, Traffic, estimate_decode, estimate_prefill

_BITS = {"f32": 16, "bf16": 16, "f16": 16, "q8_0": 8, "q6_k": 8}  # 4 for all others


def artifact_traffic(artifact: Path, tokens: int, kv: str = "f16") -> Traffic:
    """What decoding ``tokens`` tokens from an empty cache moves for each of them.

    Raises:
        InputError: not an artifact whose bytes are known here, or a damaged one.
    """
    if default_runtime(artifact) == "onnxruntime_genai":
        return _onnx(artifact, tokens, kv)
    if artifact.is_dir():
        raise InputError(f"{artifact}: what a token reads of it is not known", "GGUF files and ONNX folders are read")
    return _gguf(artifact, tokens, kv)


def _gguf(artifact: Path, tokens: int, kv: str) -> Traffic:
    from phi4edge.writers._gguf_file import read_gguf  # brings torch

    file = read_gguf(artifact)
    tied = "output.weight" not in file.tensors
    weights: dict[str, int] = {}
    linears: dict[str, int] = {}
    for name, tensor in file.tensors.items():
        kind = tensor.type.name.lower()
        if name != "token_embd.weight" or tied:
            weights[kind] = weights.get(kind, 0) + tensor.nbytes
        if name.startswith("blk.") and len(tensor.shape) > 1:
            linears[kind] = linears.get(kind, 0) + tensor.shape[0] * tensor.shape[1]
    if not linears:
        raise InputError(f"{artifact}: has no linears in blocks", "give the GGUF of a language model")
    architecture = file.metadata.get("general.architecture", "")

    def number(key: str, default: int = 0) -> int:
        value = file.metadata.get(f"{architecture}.{key}", default)
        return value if isinstance(value, int) else default

    heads, layers = number("attention.head_count", 1), number("block_count")
    head_dim = number("attention.key_length", number("embedding_length") // max(heads, 1))
    values = 2 * layers * number("attention.head_count_kv", heads) * head_dim
    scheme = max(linears, key=lambda kind: linears[kind])
    kv_bytes = int(values * KV_BYTES.get(kv, 2.0) * tokens)
    return Traffic(scheme, _BITS.get(scheme, 4), weights, kv_bytes, layers, linears)


def _onnx(artifact: Path, tokens: int, kv: str) -> Traffic:
    from phi4edge.writers._onnx_file import read_onnx
    from phi4edge.writers._onnx_names import EMBEDDING, HEAD

    file = read_onnx(artifact)
    tied = not any(name.startswith(HEAD) for name in file.tensors)
    nbytes = sum(ref.nbytes for name, ref in file.tensors.items() if tied or not name.startswith(EMBEDDING))
    scheme = str(file.metadata.get("phi4edge.scheme", "unknown"))
    bits = {int(a["bits"]) for name, a in file.attributes.items() if not name.startswith((HEAD, EMBEDDING))}
    codes = sum(
        int(a["K"]) * int(a["N"]) for name, a in file.attributes.items() if not name.startswith((HEAD, EMBEDDING))
    )
    decoder: Mapping[str, Any] = file.settings.get("model", {}).get("decoder", {})
    layers = int(decoder.get("num_hidden_layers", 0))
    values = 2 * layers * int(decoder.get("num_key_value_heads", 0)) * int(decoder.get("head_size", 0))
    kv_bytes = int(values * KV_BYTES.get(kv, 4.0) * tokens)
    return Traffic(scheme, min(bits, default=16), {scheme: nbytes}, kv_bytes, layers, {scheme: codes})


def runtime_option(profile: Profile, name: str, gpu_layers: int = 0) -> RuntimeOption | None:
    """The runtime of the target's file that ``name`` was: on the CPU where nothing was given to a GPU."""
    options = [option for option in profile.runtimes if option.name == name]
    on_cpu = [option for option in options if (option.backend == "cpu") == (gpu_layers == 0)]
    return next(iter(on_cpu or options), None)


def assess(data: Mapping[str, Any], profile: Profile, artifact: Path) -> dict[str, Any]:
    """What a bench document says beside its metrics: ``roofline``, ``decode_tps_estimated``, ``prefill_tps_estimated``.

    ``data`` is the document's, measured on the target of ``profile``; ``artifact`` the file here.
    """
    settings, name = data["settings"], data["runtime"]["name"]
    try:
        traffic = artifact_traffic(artifact, settings.get("gen_tokens") or 1, settings.get("kv_type", "f16"))
    except InputError as error:
        return {"roofline": {"implausible": None, "reason": error.message}}
    option = runtime_option(profile, name, settings.get("gpu_layers") or 0)
    unknown = SpeedEstimate(None, None, None, f"{profile.id}: its file does not have {name}")
    decode = estimate_decode(profile, option, traffic) if option else unknown
    prefill = estimate_prefill(profile, option, traffic) if option else unknown
    return {
        "roofline": _roofline(data["metrics"]["decode_tps"]["value"], profile, traffic),
        "decode_tps_estimated": _metric(decode),
        "prefill_tps_estimated": _metric(prefill),
    }


def _metric(estimate: SpeedEstimate) -> dict[str, Any]:
    """An estimate in the shape of a metric."""
    if estimate.typical is None:
        return {"value": None, "unit": "token/s", "reason": f"not estimated: {estimate.basis}"}
    return {
        "value": estimate.typical,
        "unit": "token/s",
        "low": estimate.low,
        "high": estimate.high,
        "basis": estimate.basis,
    }


def _roofline(measured: float | None, profile: Profile, traffic: Traffic) -> dict[str, Any]:
    bandwidth, nbytes = profile.bandwidth_gb_s, traffic.empty
    found: dict[str, Any] = {
        "bytes_per_token": nbytes,
        "bandwidth_gb_s": bandwidth.value,
        "bandwidth_estimated": bandwidth.estimated,
        "bandwidth_source": bandwidth.source or bandwidth.reason,
        "decode_tps_limit": None,
        "efficiency": None,
        "implausible": None,
        "reason": None,
    }
    limits = bandwidth.bounds()
    if limits is None or bandwidth.value is None:
        return found | {"reason": f"bandwidth is {bandwidth.text()}"}
    found["decode_tps_limit"] = limit = limits[1] * 1e9 / nbytes
    if measured is None:
        return found | {"reason": "decode was not measured"}
    found |= {"efficiency": measured * nbytes / (bandwidth.value * 1e9), "implausible": measured > limit}
    if measured > limit:
        found["reason"] = (
            f"decode of {measured:.2f} tok/s would read {measured * nbytes / 1e9:.1f} GB/s, and memory gives"
            f" {limits[1]:g} GB/s{' (estimated)' if bandwidth.estimated else ''}: {_explanation(profile, nbytes)}"
        )
    return found


def _explanation(profile: Profile, nbytes: int) -> str:
    cache = last_level_cache() if profile.id == LOCAL else None
    if cache and nbytes < 4 * cache:
        return f"a cache of {cache / 1e6:.0f} MB holds much of the {nbytes / 1e6:.0f} MB that a token reads"
    said = profile.bandwidth_gb_s.source
    return f"the bandwidth is wrong{f' ({said})' if said else ''}, a cache helped, or not all of the work was done"
