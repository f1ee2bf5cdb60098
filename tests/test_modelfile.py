"""Ollama's Modelfile: its Go template renders chats as the checkpoint's Jinja template does, or is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from go_template import render
from phi_tokenizers import CHATS, KINDS, SETTINGS, TEMPLATES
from rounded import quantized_model
from support import write_checkpoint

from phi4edge.cli.main import main
from phi4edge.core.errors import InputError, UsageError
from phi4edge.core.events import Progress
from phi4edge.core.hashing import sha256_file
from phi4edge.core.recipe import Recipe
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.stages.quantize import quantize
from phi4edge.writers import gguf
from phi4edge.writers._api import WriteOptions
from phi4edge.writers._modelfile import CHAT_FORMATS, chat_format, go_template


def checkpoint(folder: Path, kind: str, template: str | None = None, **config: Any) -> Path:
    """A small checkpoint whose template and settings are the family's."""
    write_checkpoint(folder, kind, **config)
    settings = {**SETTINGS[kind], "chat_template": template or TEMPLATES[kind]}
    settings |= {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if kind == "mini":  # its end of a turn among the special tokens
        raw = (folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|end|>")
        (folder / "tokenizer.json").write_text(raw)
    return folder


def written(folder: Path, out: Path, **options: Any) -> tuple[str, list[str]]:
    notes: list[str] = []

    class Listening(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    options = {"modelfile": True, "progress": Listening(), **options}
    artifact = gguf.write(quantized_model(folder, "q4_0"), out, WriteOptions(**options))
    path = out.with_suffix(".Modelfile")
    assert artifact.files[path.name] == sha256_file(path)
    return path.read_text(), notes


def template_of(text: str) -> str:
    (found,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    return str(found)


def messages(chat: list[dict[str, str]]) -> dict[str, Any]:
    """As Ollama gives them to a template."""
    return {"Messages": [{"Role": turn["role"], "Content": turn["content"]} for turn in chat]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_go_template_renders_multi_turn_chats_as_the_checkpoints_own(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", kind)
    text, notes = written(folder, tmp_path / "m.gguf")
    assert not [note for note in notes if "template" in note]
    template, tokenizer = template_of(text), load_tokenizer(folder)
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        assert render(template, messages(chat)) == expected
        # An answer that has begun is gone on with: no end of the turn, and no new header.
        begun = [*chat, {"role": "assistant", "content": "It is"}]
        assert render(template, messages(begun)) == expected + "It is"


@pytest.mark.parametrize("kind", KINDS)
def test_turns_end_and_context_and_licence_are_set(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", kind)
    (folder / "LICENSE").write_text("MIT License\n\nDo as you like.\n")
    text, _ = written(folder, tmp_path / "tiny model.gguf", context=256)
    lines = text.splitlines()
    assert lines[1] == "FROM ./tiny model.gguf"
    end = {"phi4": "<|im_end|>", "mini": "<|end|>"}[kind]
    assert [line for line in lines if "stop" in line] == [f'PARAMETER stop "{t}"' for t in (end, "<|endoftext|>")]
    assert "PARAMETER num_ctx 256" in lines
    assert ("# beyond 64 tokens of context, llama.cpp takes the long rope factors for every text" in lines) == (
        kind == "mini"
    )
    assert text.endswith('LICENSE """MIT License\n\nDo as you like."""\n')


def test_without_context_and_licence_nothing_is_said_of_them(phi4_checkpoint: Path, tmp_path: Path) -> None:
    text, _ = written(phi4_checkpoint, tmp_path / "m.gguf")
    assert "num_ctx" not in text
    assert "LICENSE" not in text
    assert text.count("PARAMETER stop") == 1  # eos and the end of a turn are one token there


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATES["phi4"].replace("'<|im_start|>user<|im_sep|>' +", "'<|im_start|>user<|im_sep|>\\n' +"),
        TEMPLATES["phi4"].replace("message['content'] +", "message['content'] | trim +"),
        TEMPLATES["phi4"].replace("{% for", "{{ '<|im_start|>system<|im_sep|>You are Phi.<|im_end|>' }}{% for", 1),
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        "{{ messages[0].content }}",
    ],
)
def test_another_template_is_left_out_with_a_note(template: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "phi4", template)
    assert load_tokenizer(folder).chat_template != TEMPLATES["phi4"]
    text, notes = written(folder, tmp_path / "m.gguf")
    assert "TEMPLATE" not in text
    assert "PARAMETER stop" in text
    assert any("no TEMPLATE" in note for note in notes)


def test_formats_are_not_taken_for_each_other(tmp_path: Path) -> None:
    for kind, expected in zip(KINDS, CHAT_FORMATS, strict=True):
        assert chat_format(load_tokenizer(checkpoint(tmp_path / kind, kind))) == expected
    other = messages([{"role": "user", "content": "x"}])
    assert render(go_template(CHAT_FORMATS[0]), other) != render(go_template(CHAT_FORMATS[1]), other)


def test_a_licence_that_cannot_be_quoted_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "phi4")
    (folder / "LICENSE").write_text('Say """no""".')
    text, notes = written(folder, tmp_path / "m.gguf")
    assert "LICENSE" not in text
    assert any("cannot quote" in note for note in notes)


def test_what_cannot_be_is_refused_before_anything_is_written(phi4_checkpoint: Path, tmp_path: Path) -> None:
    model = quantized_model(phi4_checkpoint, "q4_0")
    with pytest.raises(UsageError, match="Ollama takes a GGUF in one file"):
        gguf.write(model, tmp_path / "m.gguf", WriteOptions(modelfile=True, split_bytes=52 * 1024))
    with pytest.raises(InputError, match="context 513 exceeds the model's 512"):
        gguf.write(model, tmp_path / "m.gguf", WriteOptions(modelfile=True, context=513))
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.Modelfile").write_text("mine")
    with pytest.raises(InputError, match=r"m\.Modelfile: already exists"):
        gguf.write(model, tmp_path / "m.gguf", WriteOptions(modelfile=True))
    assert [p.name for p in tmp_path.iterdir()] == ["m.Modelfile"]


def test_the_command_writes_it_and_other_formats_refuse_it(phi4_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    run, out = tmp_path / "run", tmp_path / "m.gguf"
    quantize(phi4_checkpoint, Recipe(method="rtn", scheme="q4_0", corpus=None), run)
    command = ["export", str(run), "--json", "-q", "--modelfile", "--context", "128"]
    assert main([*command, "--format", "gguf", "--out", str(out)]) == 0
    assert set(json.loads(capsys.readouterr().out)["data"]["files"]) == {"m.gguf", "m.Modelfile"}
    assert "num_ctx 128" in (tmp_path / "m.Modelfile").read_text()
    assert main([*command, "--format", "gptq", "--out", str(tmp_path / "g")]) == 2
    assert "--modelfile is for gguf" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_the_evaluator_of_these_tests_knows_gos_rules() -> None:
    """Examples of its documentation: trimming, $, variables that end with their block."""
    data = {"Messages": [{"Role": "a"}, {"Role": "b"}]}
    assert render("{{23 -}} < {{- 45}}", {}) == "23<45"
    assert render("{{ range $i, $m := .Messages }}{{ if ne $i 0 }}, {{ end }}{{ .Role }}{{ end }}", data) == "a, b"
    assert render("{{ $x := 1 }}{{ if 1 }}{{ $x := 2 }}{{ $x }}{{ end }}{{ $x }}", {}) == "21"
    assert render("{{ range $i, $_ := .Messages }}{{ len (slice $.Messages $i) }}{{ end }}", data) == "21"
    with pytest.raises(AssertionError, match="not Go"):
        render("{{ .A | upper }}", {"A": 1})
