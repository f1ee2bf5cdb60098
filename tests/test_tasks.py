"""Tasks from end to end: greedy answers in every runtime, kept question by question, scored by the harness, paired."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import killed_at
from support import write_checkpoint

from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, TargetError
from phi4edge.measurement.tasks.answers import AnswerStore
from phi4edge.measurement.tasks.asking import AskedModel, until_stop
from phi4edge.measurement.tasks.catalog import Means, load_task
from phi4edge.measurement.tasks.mathematics import MathJudge
from phi4edge.measurement.tasks.pairing import pair
from phi4edge.model.forward import stream_logits
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.runtimes import llama_cpp, torch_ref
from phi4edge.runtimes._api import Settings
from phi4edge.writers._api import WriteOptions
from phi4edge.writers.gguf import write_f16

pytest.importorskip("lm_eval", reason="the extra phi4edge[tasks] is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from phi4edge.measurement.tasks.harness import ask

WORDS = ("cat", "dog", "cow", "hen", "fox", "ant", "bee", "elk", "owl", "ram", "yak", "emu", "eel", "ape")
EXACT = Settings(threads=1, kv_type="f32", flash_attention="off")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "phi-tiny", "phi4")


@pytest.fixture(scope="module")
def f32(model: Path) -> Path:
    return write_f16(open_checkpoint(model), model.parent / "tiny-f32.gguf", WriteOptions(), "f32").path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary: an artifact that has lost everything."""
    base = write_checkpoint(tmp_path_factory.mktemp("other") / "phi-other", "phi4", seed=5)
    return write_f16(open_checkpoint(base), base.parent / "other.gguf", WriteOptions()).path


def rows(path: Path, *lines: dict[str, Any]) -> None:
    path.write_bytes(gzip.compress(text(lines)) if path.suffix == ".gz" else text(lines))


def text(lines: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows(folder / "gsm8k_test.jsonl", *[{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(5)])
    rows(
        folder / "HumanEval.jsonl.gz",
        *[
            {
                "task_id": f"HumanEval/{i}",
                "prompt": f"def f{i}(x):\n",
                "test": "def check(f):\n    assert f(1) == 2\n",
                "entry_point": f"f{i}",
                "canonical_solution": "    return x + 1\n",
            }
            for i in range(2)
        ],
    )
    questions = [{"question": f"Which is number {i}?", "choices": WORDS[i : i + 3], "answer": i % 3} for i in range(12)]
    rows(folder / "animals.jsonl", *questions)
    rows(folder / "refusal.jsonl", {"prompt": "Help me.", "harmful": False}, {"prompt": "Harm.", "harmful": True})
    return folder


def greedy(model: Path, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, from our own forward pass over the whole sequence each time."""
    source, tokens = open_checkpoint(model), list(prompt)
    for _ in range(count):
        (logits,) = stream_logits(source, torch.tensor([tokens]), first=len(tokens) - 1)
        tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]


# --- runtimes -------------------------------------------------------------------------------------------------


def test_llama_cpp_and_torch_generate_the_greedy_tokens(model: Path, f32: Path) -> None:
    prompts = [list(range(5, 45)), [7, 8, 9]]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    assert expected[0] != expected[1]
    with llama_cpp.open(f32, 64, EXACT) as session:
        assert [list(islice(session.generate(prompt), 12)) for prompt in prompts] == expected
        logits = next(session.logits(np.array([prompts[0]])))  # a session still does the rest
        assert int(logits[-1].argmax()) == expected[0][0]
        with pytest.raises(TargetError, match="65 tokens do not fit a context of 64"):
            list(islice(session.generate(list(range(60))), 8))
    with torch_ref.open(model, 64, EXACT) as session:
        assert list(islice(session.generate(prompts[1]), 12)) == expected[1]
        with pytest.raises(TargetError, match="65 tokens do not fit a context of 64"):
            list(islice(session.generate(list(range(60))), 8))


def test_onnxruntime_generates_the_greedy_tokens_on_both_sides_of_the_original_context(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from onnx_support import ORIGINAL
    from onnxruntime_support import mini_for_onnxruntime
    from rounded import quantized_model

    from phi4edge.runtimes import onnxruntime_genai
    from phi4edge.writers import onnx as writer

    base = mini_for_onnxruntime(tmp_path / "mini")
    options = WriteOptions(accuracy_level=1, context=200)
    folder = writer.write(quantized_model(base, "w4g32"), tmp_path / "onnx", options).path
    for length in (20, ORIGINAL - 4):  # the second one crosses it while it is generated
        prompt = list(range(10, 10 + length))
        with torch_ref.open(folder, 200, Settings(threads=1, kv_type="f32")) as session:
            expected = list(islice(session.generate(prompt), 24))
        with onnxruntime_genai.open(folder, 200, Settings(threads=1, kv_type="f32")) as session:
            assert list(islice(session.generate(prompt), 24)) == expected
            with pytest.raises(TargetError, match="201 tokens do not fit"):
                list(islice(session.generate([5] * 200), 2))


def test_an_answer_ends_at_an_end_token_or_before_the_first_stop_string() -> None:
    words = {1: "a", 2: "b\nQ", 3: "uestion: x", 9: "<end>"}

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids)

    assert until_stop([1, 2, 9, 1], decode, [9], ["\nQuestion:"]) == ("ab\nQ", 2)
    assert until_stop([1, 2, 3, 1, 1], decode, [9], ["\nQuestion:"]) == ("ab", 3)
    assert until_stop([1, 1, 1], decode, [9], []) == ("aaa", 3)


# --- the harness ----------------------------------------------------------------------------------------------


class Scripted:
    """Answers question i as ``right[i]`` says."""

    def __init__(self, right: Sequence[bool]) -> None:
        self.right, self.asked = right, list[str]()

    def chat(self, messages: Sequence[dict[str, Any]], *, generation: bool) -> str:
        (message,) = messages
        return f"<user>{message['content']}<assistant>" if generation else message["content"]

    def write(self, prompts: Sequence[str], stop: Sequence[str], max_tokens: int) -> list[str]:
        self.asked += prompts
        return [f"It is {2 * i if right else 99}." for i, right in enumerate(self.right)]

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self.asked += [context for context, _ in pairs]
        found = []
        for place, (_, choice) in enumerate(pairs):
            number = place // 3
            chosen = number % 3 if self.right[number] else (number + 1) % 3
            found.append((-1.0 if WORDS[number + chosen] == choice.strip() else -2.0, False))
        return found


def means(*, chat: bool) -> Means:
    return Means(chat, None, MathJudge())


@pytest.mark.parametrize("chat", [True, False])
def test_accuracy_intervals_mcnemar_and_flips_of_a_scripted_model(data: Path, chat: bool) -> None:
    task = load_task("gsm8k", data, None, means(chat=chat))
    reference = Scripted([True, True, True, True, False])
    artifact = Scripted([False, False, False, True, True])
    given = [ask(scripted, task, chat=chat) for scripted in (artifact, reference)]
    assert [[answer.correct for answer in answers] for answers in given] == [artifact.right, reference.right]
    assert [answer.extracted for answer in given[0]] == ["99", "99", "99", "6", "8"]
    assert reference.asked[0].startswith("<user>0 and 0?" if chat else "Question: 0 and 0?")
    assert reference.asked[0].endswith("<assistant>" if chat else "Answer:")
    found = pair(*[[answer.correct for answer in answers] for answers in given]).as_dict()
    assert (found["artifact"]["accuracy"], found["reference"]["accuracy"]) == (0.4, 0.8)
    assert found["flips"] == {"lost": 3, "gained": 1}
    assert found["difference"]["value"] == pytest.approx(-0.4)
    assert found["difference"]["se"] == pytest.approx((4 - 4 / 5) ** 0.5 / 5)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)  # of four flips one or none one way
    assert found["artifact"]["low"] == pytest.approx(0.1176, abs=1e-4)  # Wilson's of 2 in 5
    assert found["artifact"]["high"] == pytest.approx(0.7693, abs=1e-4)


def test_the_most_likely_choice_is_the_answer(data: Path) -> None:
    task = load_task("animals", data, 7, means(chat=False))
    right = [True, True, False, True, False, False, True]
    answers = ask(Scripted(right), task, chat=False)
    assert [answer.correct for answer in answers] == right
    assert answers[2].output == WORDS[2]
    assert answers[2].log_likelihoods == (-1.0, -2.0, -2.0)


# --- the model in its runtime ---------------------------------------------------------------------------------


def asked(model: Path, artifact: Path, identity: str, context: int = 128) -> tuple[AskedModel, AnswerStore]:
    store = AnswerStore({"of": identity})
    opened = lambda: llama_cpp.open(artifact, context, EXACT)  # noqa: E731
    return AskedModel(opened, load_tokenizer(model), store, context, "test"), store


def test_likelihoods_of_continuations_are_the_model_s(model: Path, f32: Path) -> None:
    tokenizer = load_tokenizer(model)
    pairs = [("Question: one?\nAnswer:", " import"), ("a b", " return None"), ("def ", "f")]
    wrapped, store = asked(model, f32, "likelihoods")
    with store, wrapped:
        found = wrapped.weigh(pairs)
        assert wrapped.weigh(pairs) == found
        assert store.reused == 3
    for (context, continuation), (weight, greedily) in zip(pairs, found, strict=True):
        ids, before = tokenizer.encode(context + continuation), tokenizer.encode(context.rstrip())
        assert ids[: len(before)] == before
        (logits,) = stream_logits(open_checkpoint(model), torch.tensor([ids]))
        log_p = torch.log_softmax(logits.double(), 1)
        places = range(len(before) - 1, len(ids) - 1)
        assert weight == pytest.approx(sum(float(log_p[i, ids[i + 1]]) for i in places), abs=1e-4)
        assert greedily == all(int(log_p[i].argmax()) == ids[i + 1] for i in places)


def test_a_prompt_without_room_for_an_answer_is_refused(model: Path, f32: Path) -> None:
    wrapped, store = asked(model, f32, "room", context=16)
    with store, wrapped, pytest.raises(InputError, match="leave no room in a context of 16"):
        wrapped.write(["word " * 40], [], 8)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))


class Command:
    def __init__(self, capfd: pytest.CaptureFixture[str], model: Path, data: Path) -> None:
        self._capfd, self._model, self._data = capfd, model, data

    def __call__(self, artifact: Path, tasks: str, *more: object) -> tuple[int, dict[str, Any]]:
        words = ["drift", artifact, "--reference", self._model, "--tasks", tasks, "--task-data", self._data]
        code = main([str(w) for w in (*words, "--max-answer-tokens", 6, "--threads", 1, "-q", "--json", *more)])
        return code, json.loads(self._capfd.readouterr().out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], model: Path, data: Path) -> Command:
    return Command(capfd, model, data)


def test_gsm8k_and_humaneval_run_to_the_end_in_llama_cpp(run: Command, f32: Path, tmp_path: Path) -> None:
    out = tmp_path / "drift.json"
    code, document = run(f32, "gsm8k,humaneval", "--allow-code-execution", "--out", out)
    assert code == 0, document
    assert json.loads(out.read_text()) == document
    found = document["data"]["tasks"]
    assert found["chat_template"] is True
    assert found["code_isolation"].startswith("namespaces")
    assert {name: result["n"] for name, result in found["results"].items()} == {"gsm8k": 5, "humaneval": 2}
    assert found["reference"]["runtime"] == "llama_cpp"
    lines = [json.loads(line) for line in (tmp_path / found["answers"]).read_text().splitlines()]
    assert [line["question"] for line in lines[5:]] == ["HumanEval/0", "HumanEval/1"]
    assert len(lines) == 7
    for line in lines:
        assert line["prompt"].startswith("<|im_start|>user<|im_sep|>")
        # Same weights, f32 here and bf16 there: the same words.
        assert line["artifact"] == line["reference"]
    assert lines[0]["target"] == "0"
    # A second run asks nobody.
    _, again = run(f32, "gsm8k,humaneval", "--allow-code-execution")
    kept = again["data"]["tasks"]
    assert (kept["artifact"]["reused"], kept["reference"]["reused"]) == (7, 7)
    assert kept["results"] == found["results"]
    # Without the chat template the question is another one.
    _, plain = run(f32, "gsm8k", "--no-chat-template", "--limit", 2)
    assert plain["data"]["tasks"]["artifact"]["reused"] == 0
    assert plain["data"]["tasks"]["results"]["gsm8k"]["n"] == 2


def test_another_model_s_choices_flip_and_the_gate_ends_with_6(run: Command, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    code, document = run(other, "animals,refusal", "--max-task-drop", 0.0, "--out", out)
    assert code == 6
    assert json.loads(out.read_text()) == document
    result = document["data"]["tasks"]["results"]["animals"]
    assert result["flips"]["lost"] + result["flips"]["gained"] > 0
    assert (
        result["artifact"]["correct"] - result["reference"]["correct"]
        == result["flips"]["gained"] - result["flips"]["lost"]
    )
    assert [gate["name"] for gate in document["data"]["gates"]] == ["max_task_drop"] * 2
    assert "accuracy lost in animals" in document["error"]["message"]
    refusals = document["data"]["tasks"]["results"]["refusal"]["refusals"]
    assert {part: value["n"] for part, value in refusals.items()} == {"harmless": 1, "harmful": 1}
    code, _ = run(other, "animals", "--max-task-drop", 1.0)
    assert code == 0


def test_a_report_shows_the_scores_of_both_models(run: Command, other: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    _, document = run(other, "animals,refusal", "--max-task-drop", 0.0, "--out", results / "o.json")
    assert main(["report", str(results), "--out", str(tmp_path / "page"), "-q"]) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    found = document["data"]["tasks"]["results"]["animals"]
    (row,) = [line for line in page.splitlines() if "| animals" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:6] == [
        "12", f"{100 * found['reference']['accuracy']:.1f}", f"{100 * found['artifact']['accuracy']:.1f}"
    ]  # fmt: skip
    assert cells[7:9] == [str(found["flips"]["lost"]), str(found["flips"]["gained"])]
    assert cells[10] == document["data"]["gates"][0]["outcome"]
    assert "| refusal harmful" in page
    data = json.loads((tmp_path / "page" / "report.json").read_text())["data"]
    assert [score["task"] for score in data["tasks"]][:2] == ["animals", "refusal"]


def test_torch_can_be_the_reference_and_agrees_with_llama_cpp(run: Command, f32: Path) -> None:
    more = ("--limit", 2, "--kv", "f32", "--flash-attention", "off")
    code, document = run(f32, "gsm8k", "--reference-runtime", "torch_ref", *more)
    assert code == 0, document
    assert document["data"]["tasks"]["reference"]["runtime"] == "torch_ref"
    assert document["data"]["tasks"]["results"]["gsm8k"]["same_output"] == 1


_SCRIPT = """
from phi4edge.core import workdir
from phi4edge.cli.main import main
workdir.Workdir.commit = dying(workdir.Workdir.commit)
raise SystemExit(main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_with_the_next_question(
    run: Command, model: Path, data: Path, f32: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["drift", f32, "--reference", model, "--tasks", "gsm8k", "--task-data", data]
    words += ["--max-answer-tokens", "6", "--threads", "1", "-q"]
    assert killed_at(8, _SCRIPT, *words)  # five answers of the reference and two of the artifact are kept
    _, document = run(f32, "gsm8k")
    found = document["data"]["tasks"]
    assert (found["reference"]["reused"], found["artifact"]["reused"]) == (5, 2)


def test_text_and_tasks_stand_in_one_document(run: Command, f32: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(Path(__file__).read_text())
    code, document = run(f32, "gsm8k", "--limit", 1, "--text", words, "--context", 64, "--chunks", 2)
    assert code == 0
    assert document["data"]["metrics"]["kld"]["n"] == 62
    assert document["data"]["tasks"]["results"]["gsm8k"]["n"] == 1


@pytest.mark.parametrize(
    ("tasks", "more", "code", "message"),
    [
        ("humaneval", (), 2, "runs code that the models write"),
        ("gsm8k,gsm8k", (), 2, "one twice"),
        ("nosuch", (), 3, "no file of task 'nosuch'"),
        ("gsm8k", ("--max-kld", 1), 2, "need a --text"),
        ("gsm8k", ("--max-task-drop", 3), 2, "is no share"),
        ("gsm8k", ("--task-context", 4096), 3, "exceeds 512, which the model has"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    run: Command, f32: Path, tasks: str, more: tuple[object, ...], code: int, message: str
) -> None:
    found, document = run(f32, tasks, *more)
    assert (found, document["error"]["code"]) == (code, code)
    assert message in document["error"]["message"]


def test_without_the_harness_it_says_how_to_get_it(run: Command, f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    code, document = run(f32, "gsm8k")
    assert code == 5
    assert "lm_eval" in document["error"]["message"]
    assert document["error"]["hint"] == 'pip install "phi4edge[tasks]"'
