"""Greedy divergence: the text is the model's own, and where the artifact leaves it is where it would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_checkpoint

from phi4edge.checkpoint.reader import CheckpointReader, open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError
from phi4edge.core.recipe import Recipe
from phi4edge.measurement import greedy as module
from phi4edge.measurement.greedy import GreedyTexts, greedy_divergence, greedy_texts, read_prompts, summarize_greedy
from phi4edge.model.forward import stream_logits
from phi4edge.model.greedy import greedy_text
from phi4edge.model.source import WeightSource
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.runtimes._api import Settings
from phi4edge.runtimes.torch_ref import TorchSession
from phi4edge.stages.quantize import quantize
from phi4edge.stages.run_reader import open_run

ONE = Settings(threads=1, kv_type="f32")
PROMPTS = [[5, 9, 300, 41], [17, 2, 77, 130, 8, 90, 44], [301, 12, 6, 200]]


@pytest.fixture(scope="module")
def quantized(phi4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("greedy")
    return quantize(phi4_checkpoint, Recipe(method="rtn", scheme="w4g32"), folder / "run").path


def written_slowly(source: WeightSource, prompt: list[int], count: int) -> list[int]:
    """A whole forward for each token, over a text of the final length, so that longrope takes the same factors."""
    tokens = [*prompt, *[0] * count]
    for place in range(len(prompt), len(tokens)):
        (logits,) = stream_logits(source, torch.tensor([tokens]))
        tokens[place] = int(logits[place - 1].argmax())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["phi4", "mini", "window"])
def test_the_text_is_the_one_that_whole_forwards_write(kind: str, tmp_path: Path) -> None:
    changes = (
        {"sliding_window": 6}
        if kind == "window"
        else {"original_max_position_embeddings": 10}
        if kind == "mini"
        else {}
    )
    source = open_checkpoint(write_checkpoint(tmp_path / kind, "mini" if kind == "mini" else "phi4", **changes))
    found = greedy_text(source, PROMPTS, 8)
    assert found == [written_slowly(source, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(text) for text in found}) == 3


def given(checkpoint: CheckpointReader, count: int = 12) -> GreedyTexts:
    return greedy_texts(checkpoint, PROMPTS, "three prompts", count=count)


def test_the_model_itself_never_leaves_its_text(phi4_checkpoint: Path) -> None:
    texts = given(open_checkpoint(phi4_checkpoint))
    assert greedy_divergence(TorchSession(open_checkpoint(phi4_checkpoint), 64, ONE), texts) == [12, 12, 12]


def test_an_artifact_leaves_the_text_where_its_own_greedy_text_does(phi4_checkpoint: Path, quantized: Path) -> None:
    texts, other = given(open_checkpoint(phi4_checkpoint)), open_run(quantized)
    expected = []
    for prompt, text in zip(PROMPTS, texts.texts, strict=True):
        own = written_slowly(other, prompt, 12)
        expected.append(next((i for i, pair in enumerate(zip(own, text, strict=True)) if pair[0] != pair[1]), 12))
    assert greedy_divergence(TorchSession(other, 64, ONE), texts) == expected
    assert min(expected) < 12


def test_nothing_counts_after_the_text_has_ended(phi4_checkpoint: Path, quantized: Path) -> None:
    texts, session = given(open_checkpoint(phi4_checkpoint)), TorchSession(open_run(quantized), 64, ONE)
    parted = greedy_divergence(session, texts)
    row = min(range(3), key=lambda i: parted[i] if parted[i] else 99)
    assert 0 < parted[row] < 12
    ends = frozenset({texts.texts[row][parted[row] - 1]})
    ended = GreedyTexts(texts.source, texts.prompts, texts.texts, ends)
    assert greedy_divergence(session, ended)[row] == 12


def test_a_text_is_written_once(phi4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(phi4_checkpoint)
    first = given(checkpoint, 5)
    monkeypatch.setattr(module, "greedy_text", lambda *_: pytest.fail("written again"))
    assert given(checkpoint, 5) == first
    with pytest.raises(InputError, match="are 607, the model's context is 512"):
        given(checkpoint, 600)


def test_median_share_and_intervals_are_those_of_the_prompts() -> None:
    values = [0, 3, 3, 8, 8, 8, 8, 8]
    texts = GreedyTexts("x", ((1,),) * 8, ((2,) * 8,) * 8, frozenset())
    found = summarize_greedy(values, texts)
    assert (found["median"]["value"], found["median"]["at_least"]) == (8, True)
    assert found["identical"]["value"] == 5 / 8
    assert found["quantiles"]["p25"] == 3
    low, high = found["identical"]["interval"]
    spread = np.sqrt(5 / 8 * 3 / 8 / 8)
    assert (high - low) == pytest.approx(2 * 1.96 * spread, rel=0.2)
    assert found == summarize_greedy(values, texts)
    assert summarize_greedy([4] * 8, texts)["median"]["interval"] == [4, 4]


def test_the_command_takes_chunks_or_a_file_of_prompts(
    capfd: pytest.CaptureFixture[str], phi4_checkpoint: Path, quantized: Path, tmp_path: Path
) -> None:
    text, prompts = tmp_path / "t.txt", tmp_path / "prompts.txt"
    text.write_text("Every good thing is 3 or 4 things, said the fox. " * 40)
    prompts.write_text("Once upon\n\nThe answer is 4\n")
    common = ["drift", quantized, "--reference", phi4_checkpoint, "--text", text, "--context", "64", "--chunks", "2"]
    common = [*map(str, common), "--threads", "1", "-q", "--greedy-tokens", "6", "--greedy"]
    assert main([*common, "chunks", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["data"]["greedy"]
    assert (found["prompts"], found["tokens"], len(found["divergence"])) == (2, 6, 2)
    assert main([*common, str(prompts)]) == 0
    assert "greedy text after 2 prompts (prompts.txt), 6 tokens each" in capfd.readouterr().out
    assert main([*common, str(tmp_path / "none.txt")]) == 3
    tokenizer = load_tokenizer(phi4_checkpoint)
    assert read_prompts(prompts, tokenizer) == [tokenizer.encode("Once upon"), tokenizer.encode("The answer is 4")]
    prompts.write_text("\n\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(prompts, tokenizer)
