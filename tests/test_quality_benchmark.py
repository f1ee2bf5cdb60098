"""The comparison with peers: its arithmetic, and that what is taken for a peer's weights is on the peer's grid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rounded import quantized_model
from safetensors.torch import load_file, save_file
from scripts import ROOT, load_script
from support import write_checkpoint

from phi4edge.calibration.corpus import load_corpus
from phi4edge.core.errors import InputError
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.writers import gptq
from phi4edge.writers._api import WriteOptions

evaluate = load_script("benchmarks/quality/evaluate.py")
candidates = load_script("benchmarks/quality/candidates.py")
environments = load_script("benchmarks/quality/environments.py")
tables = load_script("benchmarks/quality/tables.py")
texts = load_script("benchmarks/quality/texts.py")
dequantized = load_script("benchmarks/quality/peers/dequantized.py")
packed_gptq = load_script("benchmarks/quality/peers/packed_gptq.py")
run = load_script("benchmarks/quality/run.py")


# --- ratios -------------------------------------------------------------------------------------------------


def test_a_ratio_of_proportional_chunks_has_no_error() -> None:
    theirs = [0.4, 0.1, 0.25, 0.9]
    ratio, se = evaluate.paired_ratio([0.5 * b for b in theirs], theirs)
    assert ratio == pytest.approx(0.5)
    assert se == pytest.approx(0, abs=1e-12)


def test_the_error_of_a_ratio_is_the_spread_that_resampled_chunks_have() -> None:
    random = np.random.default_rng(0)
    theirs = np.exp(random.normal(-1.5, 0.4, 64))  # hard chunks are hard for both
    ours = 0.6 * theirs * np.exp(random.normal(0, 0.15, 64))
    ratio, se = evaluate.paired_ratio(list(ours), list(theirs))
    drawn = random.integers(0, 64, (20_000, 64))
    resampled = ours[drawn].sum(1) / theirs[drawn].sum(1)
    assert ratio == pytest.approx(ours.sum() / theirs.sum())
    assert se == pytest.approx(resampled.std(), rel=0.1)
    unpaired = ratio * np.hypot(ours.std() / ours.mean(), theirs.std() / theirs.mean()) / np.sqrt(64)
    assert se < unpaired / 2


def test_one_chunk_has_no_error_and_other_chunks_are_refused() -> None:
    assert evaluate.paired_ratio([0.2], [0.4]) == (0.5, None)
    for ours, theirs in (([0.1, 0.2], [0.1]), ([], []), ([0.1], [0.0])):
        with pytest.raises(InputError):
            evaluate.paired_ratio(ours, theirs)


def row(name: str, tool: str, **klds: list[float]) -> dict[str, object]:
    domains = {d: {"kld": sum(v) / len(v), "kld_se": 0.01, "per_chunk_kld": v} for d, v in klds.items()}
    cost = {"wall_seconds": 2.0, "cpu_seconds": 3.0, "peak_rss_bytes": 2**20}
    return {"name": name, "tool": tool, "grid": "w4g64", "bytes": None, "cost": cost, "facts": {}, "domains": domains}


def test_ours_is_held_against_the_peer_that_is_best_in_each_domain() -> None:
    rows = [
        row("ours", "phi4edge", prose=[0.1, 0.2], code=[0.4, 0.5]),
        row("peer a", "autoround", prose=[0.2, 0.4], code=[0.9, 0.9]),
        row("peer b", "llm_compressor", prose=[0.3, 0.6], code=[0.3, 0.3]),
    ]
    (found,) = tables.against_best_peer(rows)
    assert {d: r["peer"] for d, r in found["domains"].items()} == {"prose": "peer a", "code": "peer b"}
    assert found["domains"]["prose"]["ratio"] == pytest.approx(0.5)
    assert found["domains"]["code"]["ratio"] == pytest.approx(1.5)  # a loss stays in the table
    described = [{"name": d, "chunks": 2, "context": 512, "calibrated": d == "prose"} for d in ("prose", "code")]
    models = {"m": {"rows": rows, "against_best_peer": [found]}}
    text = tables.table({"domains": described, "models": models})
    assert "code (not calibrated on)" in text
    assert "1.50 ± 0.17 (peer b)" in text


# --- peers' weights -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {"hidden_size": 128, "intermediate_size": 256}
    return write_checkpoint(tmp_path_factory.mktemp("quality") / "model", "phi4", **shapes)


@pytest.mark.parametrize("scheme", ["w4g64", "w4g32-asym"])
def test_a_gptq_checkpoint_is_multiplied_out_as_our_reader_does(model: Path, tmp_path: Path, scheme: str) -> None:
    reader = gptq.read(gptq.write(quantized_model(model, scheme), tmp_path / "gptq", WriteOptions()).path)
    grid = dequantized.parse_scheme(scheme)
    linears, others = packed_gptq.read_gptq(tmp_path / "gptq", grid)
    assert len(linears) == 4 * reader.config.num_layers
    for name, weight in linears.items():
        assert torch.equal(weight, reader.tensor(f"{name}.weight"))
    report = dequantized.write_checkpoint(model, tmp_path / "out", linears, others, grid, {}, ("torch",))
    assert 8 < report["most_levels_in_a_group"] <= 16
    assert report["norms_changed"] == 0
    written, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(model / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in source.items()}
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "peer.json").read_text())["scheme"] == scheme


def test_gate_and_up_that_a_tool_split_are_fused_again(model: Path, tmp_path: Path) -> None:
    gptq.write(quantized_model(model, "w4g64"), tmp_path, WriteOptions())
    grid = dequantized.parse_scheme("w4g64")
    whole, _ = packed_gptq.read_gptq(tmp_path, grid)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if ".gate_up_proj." in n]:
        fused = tensors.pop(name)
        halves = [fused, fused] if name.endswith("g_idx") else [h.contiguous() for h in fused.chunk(2, dim=-1)]
        for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            tensors[name.replace("gate_up_proj", part)] = half.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    split, _ = packed_gptq.read_gptq(tmp_path, grid)
    assert split.keys() == whole.keys()
    assert all(torch.equal(split[name], whole[name]) for name in whole)


def test_weights_off_the_grid_and_a_changed_head_are_not_compared(model: Path, tmp_path: Path) -> None:
    exact = {n.removesuffix(".weight"): t for n, t in load_file(model / "model.safetensors").items()}
    grid = dequantized.parse_scheme("w4g64")
    with pytest.raises(SystemExit, match="64 levels in a group of 64, the grid has 16"):
        dequantized.write_checkpoint(model, tmp_path / "out", exact, {}, grid, {}, ())
    gptq.write(quantized_model(model, "w4g64"), tmp_path / "gptq", WriteOptions())
    linears, others = packed_gptq.read_gptq(tmp_path / "gptq", grid)
    others = {**others, "lm_head.weight": 2 * exact["lm_head"]}
    with pytest.raises(SystemExit, match=r"changed lm_head\.weight"):
        dequantized.write_checkpoint(model, tmp_path / "out", linears, others, grid, {}, ())
    assert not (tmp_path / "out").exists()


def test_one_value_off_the_grid_is_seen() -> None:
    weight = torch.randint(-8, 8, (4, 128)).float() * 0.01
    assert dequantized.distinct_levels(weight, 64) <= 16
    weight[:, :16] = torch.arange(-8, 8) * 0.01  # all sixteen levels
    weight[2, 17] += 0.001
    assert dequantized.distinct_levels(weight, 64) == 17


# --- inputs -------------------------------------------------------------------------------------------------


def test_chunks_have_equal_shares_of_the_domains_and_serve_our_quantizer(model: Path, tmp_path: Path) -> None:
    for folder, names in (("calibration", ("prose", "code", "tables")), ("evaluation", ("prose", "other"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.txt").write_text(f"{name} is the word of this text. " * 300)
    found = texts.folder_texts(tmp_path)
    assert found.unseen == ["other"]
    path = tmp_path / "chunks.safetensors"
    made = texts.make_chunks(model, found, path, samples=8, length=32)
    assert sorted(made["chunks_by_domain"].values()) == [2, 3, 3]
    ready = load_corpus(str(path), load_tokenizer(model), samples=8, sequence_length=32)
    assert ready.sha256 == made["sha256"]
    again = texts.make_chunks(model, found, tmp_path / "again.safetensors", samples=8, length=32)
    assert again["sha256"] == made["sha256"]


def test_builtin_texts_are_halves_of_each_kind(model: Path, tmp_path: Path) -> None:
    found = texts.builtin_texts(tmp_path)
    assert found.unseen == [texts.UNSEEN]
    made = texts.make_chunks(model, found, tmp_path / "chunks.safetensors", samples=10, length=64)
    assert set(made["chunks_by_domain"].values()) == {2}


def test_rows_stand_beside_kept_ones_of_the_same_inputs_alone(tmp_path: Path) -> None:
    order = candidates.load_candidates(ROOT / "benchmarks" / "quality" / "candidates.toml")
    names = [candidate.name for candidate in order[:3]]
    domains = [{"name": "prose", "chunks": 8, "context": 512, "key": "text"}]
    inputs = {"chunks": {"sha256": "tokens"}, "key": "weights"}
    old = [{"name": names[2], "kld": 1.0}, {"name": names[0], "kld": 2.0}, {"name": "gone", "kld": 3.0}]
    document = {
        "git": {"commit": "0123456789abcdef"},
        "results": {"domains": domains, "models": {"m": {**inputs, "rows": old}}},
    }
    path = tmp_path / "m.json"
    path.write_text(json.dumps(document))
    kept = run.kept_rows(path, "m", inputs, domains)
    new = [{"name": names[2], "kld": 0.5, "commit": "later"}, {"name": names[1], "kld": 4.0, "commit": "later"}]
    rows = run.joined(new, kept, order)
    assert [(row["name"], row["kld"], row["commit"]) for row in rows] == [
        (names[0], 2.0, "01234567"),
        (names[1], 4.0, "later"),
        (names[2], 0.5, "later"),
    ]
    for other, what in (({"chunks": {"sha256": "others"}}, "calibration chunks"), ({"key": "others"}, "weights")):
        with pytest.raises(InputError, match=what):
            run.kept_rows(path, "m", inputs | other, domains)
    for others in ([domains[0] | {"key": "others"}], [], domains * 2):
        with pytest.raises(InputError, match="texts"):
            run.kept_rows(path, "m", inputs, others)
    with pytest.raises(InputError, match="no model"):
        run.kept_rows(path, "n", inputs, domains)


def test_the_committed_candidates_are_read_and_ask_for_grids_that_their_tools_have() -> None:
    rows = candidates.load_candidates(ROOT / "benchmarks" / "quality" / "candidates.toml")
    assert {row.tool for row in rows} == {"llama", "phi4edge", *environments.TOOLS}
    for row in rows:
        if row.tool in environments.TOOLS:
            assert row.format == "checkpoint"
            assert dequantized.parse_scheme(row.grid).bits == 4
    assert all(any(row.ours and row.grid == grid for row in rows) for grid in ("q4_0", "w4g64", "w4g32-asym"))


def test_a_row_that_stands_twice_is_refused(tmp_path: Path) -> None:
    one = '[[candidate]]\nname = "A b"\ntool = "llama"\ngrid = "q4_0"\nformat = "gguf"\n'
    (tmp_path / "rows.toml").write_text(one + one.replace("A b", "a-b"))
    with pytest.raises(InputError, match="'a-b' twice"):
        candidates.load_candidates(tmp_path / "rows.toml")


def test_another_pin_is_another_environment_and_torch_is_installed_first() -> None:
    listed = environments.requirements("gptqmodel_gptq").read_text()
    moved = listed.replace("transformers==", "transformers==1")
    places = {environments.folder("gptqmodel_gptq", text, {"XDG_CACHE_HOME": "/c"}) for text in (listed, moved)}
    assert len(places) == 2
    first, second, last = environments.steps(listed)
    assert first == environments.BUILD
    assert second == [pin for pin in last if pin.startswith("torch==")]
    assert all("==" in pin or pin == "--no-build-isolation" for pin in last)


def test_a_child_that_fails_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-model") as ended:
        candidates.child(candidates.phi4edge("inspect", tmp_path / "no-such-model"), tmp_path / "log.txt")
    assert "ended with 3" in str(ended.value)
