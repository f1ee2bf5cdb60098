"""What a model takes in memory, what would fit, and what is chosen for a target."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_config

from phi4edge.checkpoint.config import ModelConfig, parse_config
from phi4edge.checkpoint.published import PUBLISHED, model_shapes
from phi4edge.core.errors import InputError, TargetError
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme, parse_scheme
from phi4edge.targets.choice import DoesNotFitError, Wish, choose
from phi4edge.targets.fit import (
    BLOCKS,
    Fit,
    Request,
    block_type,
    decode_bytes,
    largest_that_fits,
    memory_needed,
    weight_lines,
)
from phi4edge.targets.probe_llama import PROBE_MODEL
from phi4edge.targets.profile import Efficiency, Figure, Profile, RuntimeOption
from phi4edge.targets.roofline import decode_estimate

PHI_4, MINI = PUBLISHED["phi-4"], PUBLISHED["phi-4-mini"]
Q4, Q8 = GGML_SCHEMES["q4_0"], GGML_SCHEMES["q8_0"]
ALL = tuple(GGML_SCHEMES.values())
TINY = parse_config(tiny_config(hidden_size=256, intermediate_size=512))  # whole super-blocks
GGUF_ONLY = {"gguf"}


def weights(config: ModelConfig, scheme: Scheme, **changes: str) -> int:
    request = Request(scheme, 4096)
    return sum(line.nbytes for line in weight_lines(config, replace(request, **changes)))  # type: ignore[arg-type]


def needed(config: ModelConfig, request: Request, usable: int = 10**12) -> Fit:
    return memory_needed(config, request, usable_bytes=usable)


def device(usable_gb: float = 6.0, **changes: Any) -> Profile:
    """A phone with llama.cpp, 60 GB/s, half of it reached at 4 bits."""
    option = RuntimeOption("llama_cpp", "cpu", ("gguf",), ("q4_0", "q8_0"), ("f16", "q8_0", "q4_0"), None)
    profile = Profile(
        id="phone",
        name="A phone",
        kind="phone",
        sources=("a test",),
        notes="",
        ram_gb=12,
        memory="unified",
        usable_ram_gb=Figure(usable_gb),
        bandwidth_gb_s=Figure(60.0),
        arch="aarch64",
        cpu="",
        cores=8,
        isa=(),
        accelerators=(),
        transports=("adb",),
        power_interface="battery",
        default_context=4096,
        min_decode_tps=None,
        runtimes=(option,),
        efficiency=(Efficiency("llama_cpp", "cpu", 4, Figure(0.5)),),
        anchors=(),
    )
    return replace(profile, **changes)


# --- published models


def test_the_published_shapes_have_the_published_number_of_parameters() -> None:
    assert PHI_4.parameters == 14_659_507_200
    assert MINI.parameters == 3_836_021_760


def test_a_token_of_context_takes_the_published_bytes() -> None:
    assert PHI_4.kv_bytes_per_token() == 204_800
    assert MINI.kv_bytes_per_token() == 131_072


def test_phi_4_in_gguf_has_the_size_of_the_files_that_people_download() -> None:
    llama_cpp_q4_0 = weights(PHI_4, Q4, head="q6_k", embedding="q4_0")
    # 8.41 GB as published, of which 29 MB are five ffn_down in Q4_1 (llama.cpp's mix with an imatrix).
    assert llama_cpp_q4_0 / 1e9 == pytest.approx(8.41 - 0.029, abs=0.01)
    assert weights(PHI_4, Q8) / 1e9 == pytest.approx(15.58, abs=0.005)


@pytest.mark.parametrize(
    ("config", "scheme", "head", "published_gb"),
    [(MINI, Q4, "q6_k", 2.32), (MINI, Q8, "q8_0", 4.08), (PHI_4, Q4, "q6_k", 8.09), (PHI_4, Q8, "q8_0", 15.0)],
)
def test_bytes_read_a_token_are_the_weights_without_an_untied_embedding(
    config: ModelConfig, scheme: Scheme, head: str, published_gb: float
) -> None:
    empty, full = decode_bytes(config, Request(scheme, 4096, head=head))
    assert empty / 1e9 == pytest.approx(published_gb, rel=0.005)
    assert full - empty == 4096 * config.kv_bytes_per_token()


def test_names_hub_ids_and_folders_are_all_models(phi4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_shapes("microsoft/Phi-4-mini-instruct") == ("phi-4-mini", MINI)
    assert model_shapes("phi-4") == ("phi-4", PHI_4)
    assert model_shapes(str(phi4_checkpoint))[1].hidden_size == 64
    monkeypatch.chdir(phi4_checkpoint.parent)
    (phi4_checkpoint.parent / "phi-4").symlink_to(phi4_checkpoint)
    assert model_shapes("phi-4")[1].hidden_size == 64, "a folder of that name comes before the published shapes"


def test_a_model_that_is_nothing_is_refused_with_the_names_that_need_no_download() -> None:
    with pytest.raises(InputError) as caught:
        model_shapes("phi-4-mni")
    assert "did you mean 'phi-4-mini'?" in str(caught.value.hint)
    with pytest.raises(InputError, match=r"nowhere: no such model folder"):
        model_shapes("/nowhere")


# --- weights


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_sizes_are_ggmls(kind: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] == BLOCKS[kind]


@pytest.mark.parametrize("config", [PHI_4, MINI, TINY], ids=["phi-4", "mini", "tiny"])
@pytest.mark.parametrize("scheme", ALL, ids=lambda s: s.name)
def test_gguf_bytes_are_those_of_every_tensor_as_the_gguf_library_shapes_it(
    config: ModelConfig, scheme: Scheme
) -> None:
    total = 0
    for name, shape in config.tensor_shapes().items():
        kind = "f32" if len(shape) == 1 else scheme.name if ".layers." in name else "q8_0"
        block = gguf.GGMLQuantizationType[kind.upper()]
        total += math.prod(gguf.quants.quant_shape_to_byte_shape(shape, block))
    total += 4 * (len(config.rope.short_factor or ()) + len(config.rope.long_factor or ()))
    assert weights(config, scheme) == total


def test_gptq_bytes_are_those_of_its_four_tensors_a_linear() -> None:
    config, scheme = parse_config(tiny_config()), parse_scheme("w4g32")
    expected = 2 * sum(math.prod(s) for n, s in config.tensor_shapes().items() if ".layers." not in n or len(s) == 1)
    for out, inp in config.linear_shapes.values():
        qweight, scales = 4 * (inp // 8) * out, 2 * (inp // 32) * out
        qzeros, g_idx = 4 * (inp // 32) * (out // 8), 4 * inp
        expected += config.num_layers * (qweight + scales + qzeros + g_idx)
    assert weights(config, scheme, format="gptq") == expected


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("w4g32", "q4_0"),
        ("w4g128", "q4_0"),
        ("w4row", "q4_0"),
        ("w4g32-asym", None),
        ("w8g32", "q8_0"),
        ("w4g16", None),
        ("q4_k", "q4_k"),
    ],
)
def test_an_affine_scheme_is_counted_as_the_block_that_holds_it(name: str, block: str | None) -> None:
    assert block_type(parse_scheme(name)) == block


def test_what_gguf_cannot_hold_is_refused_and_not_guessed() -> None:
    with pytest.raises(InputError, match="no block type holds w4g16"):
        weights(MINI, parse_scheme("w4g16"))
    with pytest.raises(InputError, match="gptq: its scales and zero points do not hold q4_k"):
        weights(MINI, parse_scheme("q4_k"), format="gptq")
    with pytest.raises(InputError, match=r"lm_head: rows of 64 weights do not divide into q6_k blocks of 256"):
        weights(parse_config(tiny_config()), Q4, head="q6_k")


# --- the sum


@pytest.mark.parametrize(("kv", "factor"), [("f16", 1.0), ("q8_0", 0.53125), ("q4_0", 0.28125)])
def test_the_kv_cache_takes_its_types_share_of_f16(kv: str, factor: float) -> None:
    lines = {line.label: line.nbytes for line in needed(MINI, Request(Q4, 4096, kv=kv)).lines}
    assert lines["KV cache"] == 4096 * 131_072 * factor


def test_a_context_is_rounded_up_to_whole_cells_as_llama_cpp_does() -> None:
    assert needed(MINI, Request(Q4, 1050)).needed_bytes == needed(MINI, Request(Q4, 1280)).needed_bytes


def test_a_context_beyond_the_models_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"context 20,000 is more than the 16,384 tokens"):
        needed(PHI_4, Request(Q4, 20_000))


def test_only_the_estimated_lines_are_marked_so() -> None:
    marked = {line.label for line in needed(PHI_4, Request(Q4, 4096)).lines if line.estimated}
    assert marked == {"compute buffers", "process"}


SHAPES = {
    "vocabulary rules": replace(PROBE_MODEL, vocab_size=65536),
    "mlp rules": replace(PROBE_MODEL, intermediate_size=8192, hidden_size=512, num_heads=8),
    "tied": replace(PROBE_MODEL, tie_word_embeddings=True, vocab_size=4096),
}


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize(
    ("name", "kv", "ggml_type"), [("vocabulary rules", "f16", 1), ("mlp rules", "q8_0", 8), ("tied", "q4_0", 2)]
)
def test_the_sum_is_what_llama_cpp_allocates(name: str, kv: str, ggml_type: int, tmp_path: Path) -> None:
    """Weights and KV cache exactly, compute buffers within 1.5 MiB below and a tenth above."""
    shape, context = asdict(SHAPES[name]), 4900
    code = (
        "import json, sys; from pathlib import Path; from phi4edge.checkpoint.config import ModelConfig, RopeConfig;"
        "from phi4edge.targets.probe_llama import probe, write_probe_model;"
        "shape = json.loads(sys.argv[1]); shape['rope'] = RopeConfig(**shape['rope']); path = Path(sys.argv[2]);"
        f"write_probe_model(path, ModelConfig(**shape)); print(json.dumps(probe(path, {context}, {ggml_type})))"
    )
    arguments = [sys.executable, "-c", code, json.dumps(shape), str(tmp_path / "model.gguf")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    said = json.loads(done.stdout.splitlines()[-1])
    lines = {line.label: line.nbytes for line in needed(SHAPES[name], Request(Q4, context, kv=kv)).lines}
    weight_bytes = sum(lines[label] for label in lines if label not in ("KV cache", "compute buffers", "process"))
    assert said["model_bytes"] == weight_bytes
    assert said["kv_mib"] * 2**20 == pytest.approx(lines["KV cache"], abs=0.01 * 2**20)
    assert said["compute_mib"] * 2**20 <= lines["compute buffers"] + 1.5 * 2**20
    assert lines["compute buffers"] <= 1.1 * said["compute_mib"] * 2**20


# --- what would fit


def suggest(config: ModelConfig, request: Request, usable_gb: float) -> tuple[str, Request] | None:
    found = largest_that_fits(
        "asked", config, request, ALL, usable_bytes=int(usable_gb * 1e9), kv_types=("f16", "q8_0", "q4_0")
    )
    return None if found is None else (found.model, found.fit.request)


def test_the_best_scheme_at_the_context_asked_for_comes_first() -> None:
    assert suggest(PHI_4, Request(Q8, 4096), 14.0) == ("asked", Request(GGML_SCHEMES["q6_k"], 4096))
    assert suggest(PHI_4, Request(Q8, 4096), 11.0) == ("asked", Request(GGML_SCHEMES["q4_1"], 4096))
    assert suggest(PHI_4, Request(Q8, 4096), 10.0) == ("asked", Request(Q4, 4096))


def test_then_a_smaller_kv_cache_then_a_shorter_context() -> None:
    assert suggest(PHI_4, Request(Q4, 4096), 9.6) == ("asked", Request(Q4, 4096, kv="q8_0"))
    found = suggest(PHI_4, Request(Q4, 4096, kv="q4_0"), 9.3)
    assert found is not None
    model, request = found
    assert (model, request.kv) == ("asked", "q4_0")
    assert 512 <= request.context < 4096
    assert request.context % 256 == 0
    assert needed(PHI_4, replace(request, context=request.context + 256)).needed_bytes > 9.3e9, "and it is the largest"


def test_then_the_smaller_model_of_the_family() -> None:
    assert suggest(PHI_4, Request(Q4, 4096), 3.6) == ("phi-4-mini", Request(Q4, 4096))
    assert suggest(PHI_4, Request(Q4, 4096), 6.5) == ("phi-4-mini", Request(Q8, 4096))
    assert suggest(PHI_4, Request(Q4, 4096), 1.0) is None


@settings(max_examples=60, deadline=None)
@given(
    st.floats(min_value=0.5, max_value=30.0),
    st.integers(min_value=1, max_value=16384),
    st.sampled_from(ALL),
    st.sampled_from(["f16", "q8_0", "q4_0"]),
)
def test_what_is_suggested_always_fits(usable_gb: float, context: int, scheme: Scheme, kv: str) -> None:
    found = largest_that_fits(
        "asked",
        PHI_4,
        Request(scheme, context, kv=kv),
        ALL,
        usable_bytes=int(usable_gb * 1e9),
        kv_types=("f16", "q4_0"),
    )
    if found is not None:
        assert found.fit.needed_bytes <= usable_gb * 1e9
        assert found.fit.request.context <= context
    else:
        assert needed(MINI, Request(Q4, min(context, 512), kv="q4_0")).needed_bytes > usable_gb * 1e9


# --- the choice


def test_the_largest_scheme_that_fits_is_chosen() -> None:
    assert choose("phi-4-mini", MINI, device(6.0), Wish(), GGUF_ONLY).fit.request.scheme == Q8
    chosen = choose("phi-4-mini", MINI, device(4.5), Wish(), GGUF_ONLY)
    assert chosen.fit.request.scheme == Q4
    assert "q8_0: does not fit" in chosen.steps[0]
    assert "q4_0: taken" in chosen.steps[1]


def test_a_scheme_that_does_not_keep_the_decode_speed_gives_way_to_a_faster_one() -> None:
    profile = device(6.0, min_decode_tps=9.0)
    chosen = choose("phi-4-mini", MINI, profile, Wish(), GGUF_ONLY)
    assert chosen.fit.request.scheme == Q4
    assert "below the 9 tok/s to keep" in chosen.steps[0]


def test_if_none_keeps_the_speed_the_fastest_that_fits_is_taken_and_said() -> None:
    chosen = choose("phi-4-mini", MINI, device(6.0), Wish(min_decode_tps=100.0), GGUF_ONLY)
    assert chosen.fit.request.scheme == Q4
    assert chosen.steps[-1].endswith("q4_0: taken as the fastest that fits")


def test_an_unknown_speed_is_no_reason_to_refuse() -> None:
    profile = device(6.0, min_decode_tps=9.0, bandwidth_gb_s=Figure(None, reason="not measured"))
    chosen = choose("phi-4-mini", MINI, profile, Wish(), GGUF_ONLY)
    assert chosen.fit.request.scheme == Q8
    assert chosen.decode.as_dict() is None


def test_runtimes_are_tried_in_the_profiles_order_and_those_without_a_writer_are_passed_over() -> None:
    first = RuntimeOption("mlx", "metal", ("mlx",), ("w4g64",), ("f16",), None)
    profile = device(6.0, runtimes=(first, *device().runtimes))
    chosen = choose("phi-4-mini", MINI, profile, Wish(), GGUF_ONLY)
    assert chosen.runtime.name == "llama_cpp"
    assert "mlx passed over, this version of phi4edge does not write it" in chosen.steps[0]


def test_a_kv_type_that_a_runtime_lacks_passes_it_over() -> None:
    option = replace(device().runtimes[0], kv_types=("f16",))
    with pytest.raises(TargetError, match="makes nothing yet") as caught:
        choose("phi-4-mini", MINI, device(runtimes=(option,)), Wish(kv="q8_0"), GGUF_ONLY)
    assert "its KV cache is f16, not q8_0" in str(caught.value.hint)


def test_what_does_not_fit_is_refused_with_both_numbers_and_what_would() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        choose("phi-4", PHI_4, device(4.0), Wish(), GGUF_ONLY)
    assert caught.value.exit_code == 4
    assert "needs 9.98 GB" in caught.value.message
    assert "can use 4.00 GB" in caught.value.message
    assert "phi-4-mini at q4_0 with 4,096 tokens" in str(caught.value.hint)


def test_the_hint_says_when_a_larger_share_of_the_memory_would_do() -> None:
    profile = device(usable_ram_gb=Figure(3.0, 3.0, 6.0, None, True, "by the entitlement"))
    with pytest.raises(DoesNotFitError) as caught:
        choose("phi-4-mini", MINI, profile, Wish(context=8192), GGUF_ONLY)
    assert "Up to 6 GB may be usable, which would do: by the entitlement" in str(caught.value.hint)


def test_a_margin_below_a_twentieth_is_called_tight() -> None:
    need = needed(MINI, Request(Q4, 4096)).needed_bytes / 1e9
    assert "tight" in choose("phi-4-mini", MINI, device(need * 1.01), Wish(), GGUF_ONLY).steps[-1]
    assert "tight" not in choose("phi-4-mini", MINI, device(need * 1.2), Wish(), GGUF_ONLY).steps[-1]


# --- the estimate of speed


def test_an_estimate_never_leaves_the_roofline() -> None:
    profile, request = device(efficiency=(Efficiency("llama_cpp", "cpu", 4, Figure(0.95)),)), Request(Q4, 4096)
    estimate = decode_estimate(profile, profile.runtimes[0], MINI, request)
    assert estimate.low is not None
    assert estimate.typical is not None
    assert estimate.high is not None
    assert estimate.low < estimate.typical < estimate.high
    assert estimate.high <= 60e9 / decode_bytes(MINI, request)[0]


def test_an_estimate_follows_efficiency_times_bandwidth_over_bytes() -> None:
    profile, request = device(), Request(Q4, 4096)
    estimate = decode_estimate(profile, profile.runtimes[0], MINI, request)
    empty, full = decode_bytes(MINI, request)
    assert estimate.typical == pytest.approx(0.5 * 60e9 / ((empty + full) / 2))
    assert "estimated" in estimate.text()


def test_an_efficiency_known_at_other_bits_only_says_so() -> None:
    profile = device()
    assert "known at 4 bits only" in decode_estimate(profile, profile.runtimes[0], MINI, Request(Q8, 4096)).basis


def test_the_efficiency_of_another_backend_is_not_used() -> None:
    profile = device(efficiency=(Efficiency("llama_cpp", "opencl", 4, Figure(0.5)),))
    assert decode_estimate(profile, profile.runtimes[0], MINI, Request(Q4, 4096)).typical is None
