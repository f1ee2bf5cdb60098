"""The tokenizer: tokenizer.json's own ids, the same in llama.cpp, chats as transformers renders them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import gguf as gguf_py
import llama_cpp
import pytest
from gguf_support import Llama
from rounded import quantized_model
from support import PATTERN, SPECIAL, tiny_config, write_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from phi4edge.checkpoint.config import parse_config
from phi4edge.checkpoint.reader import open_checkpoint
from phi4edge.core.errors import InputError
from phi4edge.model.pretokenizer import gguf_pre_tokenizer
from phi4edge.model.tokenizer import load_tokenizer
from phi4edge.writers import gguf
from phi4edge.writers._api import WriteOptions

# The split pattern of tiktoken's o200k, which Phi-4-mini's tokenizer.json carries.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = {
    "prose": "It's what they'd said: \"we'll see\", and SHE'LL too; I'M sure... aren't you? Well-known co-operation.",
    "code": "def f(x):\n\treturn {'a': x**2, \"b\": [i for i in range(10)]}  # noqa\r\n\r\n\n    if x!=y: pass\n",
    "digits": "1 12 123 1234 12345678901 3.14159 -1e-9 0xFF 2026-11-24 ٣٤٥ ½ Ⅳ 10,000,000",
    "languages": "Der Fluß über Köln. Où est l'été? 東京は日本の首都です。 Привет, мир! Γειά σου Κόσμε 서울",
    "emoji": "🚀 (normal) 😶‍🌫️ ✅ 🦙🦙 👩‍👩‍👧‍👦 🇩🇪",
    "white space": "  two\t\ttabs \u00a0nbsp\u2003em\u3000ideographic\n \n\n  \n\n\n trailing   \r\n \r end  ",
    "punctuation": "'''''' ``````` ------======= ?!?!...,,;; a/b//c /path/to\n/x <|not a token|> [INST]",
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?\n  "},
    {"role": "assistant", "content": "It's 4."},
]


def train(first: Any, *, splits_again: bool = False, words: str = "") -> Tokenizer:
    """A byte-level BPE with pre-tokenizer ``first`` before the bytes, trained on this file and many ``words``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits_again)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*Path(__file__).read_text().splitlines(), *[words] * 99], trainer)
    return tokenizer


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


TOKENIZERS: dict[str, Any] = {
    "dbrx": lambda: train(split(PATTERN, "removed", invert=True)),  # as Phi-4's file spells it
    "gpt-4o": lambda: train(split(O200K)),
    "smollm": lambda: train(pre_tokenizers.Digits(individual_digits=True), splits_again=True),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with each kind of tokenizer; the embedding has a few rows more than the vocabulary."""
    path = write_checkpoint(tmp_path_factory.mktemp("model"), "phi4")
    TOKENIZERS[request.param]().save(str(path / "tokenizer.json"))
    (path / "expected").write_text(request.param)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    return gguf.write_f16(open_checkpoint(folder), folder / "m.gguf", WriteOptions()).path


def test_ids_are_tokenizer_jsons(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in [*TEXTS.values(), tokenizer.apply_chat_template(CHAT)]:
        ids = tokenizer.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_llama_cpp_gives_the_same_ids_token_for_token(folder: Path, artifact: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.gguf_pre == (folder / "expected").read_text()
    assert gguf_py.GGUFReader(artifact).fields["tokenizer.ggml.pre"].contents() == tokenizer.gguf_pre
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    texts = TEXTS | {"chat": chat, "specials in a row": "".join(SPECIAL) + " " + SPECIAL[1] + "\n"}
    with Llama(artifact, vocab_only=True) as llama:
        for kind, text in texts.items():
            assert llama.tokenize(text) == tokenizer.encode(text), kind
        plain = llama.tokenize(chat, parse_special=False)
        assert tokenizer.encode("<|im_end|>")[0] not in plain


def test_where_llama_cpps_gpt_4o_split_is_known_to_differ(tmp_path: Path) -> None:
    """It splits words at combining marks, so llama.cpp cannot use the vocabulary's longer pieces; nothing is lost."""
    path = write_checkpoint(tmp_path / "mini", "phi4")
    train(split(O200K), words="हिन्दी").save(str(path / "tokenizer.json"))
    out = gguf.write_f16(open_checkpoint(path), tmp_path / "m.gguf", WriteOptions()).path
    tokenizer = load_tokenizer(path)
    with Llama(out, vocab_only=True) as llama:
        ours, theirs = tokenizer.encode("हिन्दी"), llama.tokenize("हिन्दी")
    assert len(ours) < len(theirs)
    assert tokenizer.decode(ours) == tokenizer.decode(theirs) == "हिन्दी"


def test_rows_beyond_the_vocabulary_are_unused_tokens(folder: Path, artifact: Path) -> None:
    assert load_tokenizer(folder).vocab_size == 500
    fields = gguf_py.GGUFReader(artifact).fields
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert tokens[500:] == [f"[PAD{i}]" for i in range(500, 512)]
    assert set(types[500:]) == {gguf_py.TokenType.UNUSED}
    assert types[:5] == [gguf_py.TokenType.CONTROL] * 4 + [gguf_py.TokenType.NORMAL]
    with Llama(artifact, vocab_only=True) as llama:
        assert llama_cpp.llama_vocab_n_tokens(llama.vocab) == 512


# --- which pre-tokenizer ------------------------------------------------------------------------


def described(first: dict[str, Any], second: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [first, {**level, **(second or {})}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "normalizer": None, **others}


def split_json(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


@pytest.mark.parametrize("pattern", [PATTERN, O200K])
def test_equivalent_spellings_of_a_pattern_are_recognised(pattern: str) -> None:
    expected = "dbrx" if pattern == PATTERN else "gpt-4o"
    spelled_out = pattern.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    assert spelled_out != pattern
    for spelling in (pattern, spelled_out, pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")):
        assert gguf_pre_tokenizer(described(split_json(spelling)), "t") == expected
    assert gguf_pre_tokenizer(described(split_json(pattern, "Removed", invert=True)), "t") == expected


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (described(split_json(PATTERN.replace("{1,3}", ""))), "split pattern .* is not one that llama.cpp"),
        (described(split_json(PATTERN.replace("{1,3}", "{1,2}"))), "split pattern"),
        (described(split_json(PATTERN, "Removed")), "Split . ByteLevel. is not one"),
        (described(split_json(PATTERN, "MergedWithPrevious")), "Split . ByteLevel. is not one"),
        (described(split_json(PATTERN), {"use_regex": True}), "Split . ByteLevel. is not one"),
        (described(split_json(PATTERN), {"add_prefix_space": True}), "Split . ByteLevel. is not one"),
        (described({"type": "Digits", "individual_digits": False}, {"use_regex": True}), "Digits . ByteLevel. is not"),
        (described({"type": "Digits", "individual_digits": True}), "Digits . ByteLevel. is not one"),
        (described({"type": "Whitespace"}), "Whitespace . ByteLevel. is not one"),
        (described(split_json(PATTERN), normalizer={"type": "NFC"}), "normalizer NFC"),
        ({"pre_tokenizer": None}, r"pre-tokenizer \(none\)"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, r"pre-tokenizer \(Metaspace\)"),
    ],
)
def test_an_unknown_split_is_an_error_and_never_a_default(tokenizer: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"t: .*{words}"):
        gguf_pre_tokenizer(tokenizer, "t")


def test_a_gguf_of_an_unknown_split_is_refused_and_not_written(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, lambda raw: raw["pre_tokenizer"]["pretokenizers"].pop(0))
    reason = gguf.refusal(quantized_model(path, "q4_0"), WriteOptions())
    assert "pre-tokenizer (ByteLevel) is not one" in str(reason)
    with pytest.raises(InputError, match=r"pre-tokenizer \(ByteLevel\) is not one that llama\.cpp is known to have"):
        gguf.write_f16(open_checkpoint(path), tmp_path / "m.gguf", WriteOptions())
    assert not (tmp_path / "m.gguf").exists()


# --- special tokens and chats -------------------------------------------------------------------


def edited_tokenizer(source: Path, tmp_path: Path, change: Any, **settings: Any) -> Path:
    """A copy of checkpoint ``source`` with tokenizer.json changed in place, and other settings."""
    path = tmp_path / "model"
    shutil.copytree(source, path)
    raw = json.loads((path / "tokenizer.json").read_text())
    change(raw)
    (path / "tokenizer.json").write_text(json.dumps(raw))
    found = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**found, **settings}))
    return path


def unchanged(raw: dict[str, Any]) -> None:
    """Leave tokenizer.json as it is."""


def test_special_tokens_come_from_the_settings_or_else_from_config_json(phi4_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(phi4_checkpoint)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 3, 0, None)
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged, eos_token=None, pad_token={"content": "<|im_sep|>"})
    assert (load_tokenizer(path).eos_id, load_tokenizer(path).pad_id) == (0, 2)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # As Phi-4 was published: the next turn's header follows the user's words.
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user<|im_sep|>' + m['content'] +"
            " '<|im_end|><|im_start|>assistant<|im_sep|>' }}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
            "{% endfor %}",
            3,
        ),
        ("{% for m in messages %}{{ m['content'] }}\n<|im_sep|>{% endfor %}", 2),  # another token than the usual one
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", 3),  # none at all: by its usual name
        ("{{ raise_exception('no') }}", 3),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_puts_there(
    phi4_checkpoint: Path, tmp_path: Path, template: str, expected: int
) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged, eos_token="<|endoftext|>", chat_template=template)
    assert load_tokenizer(path).eos_id == 0
    assert load_tokenizer(path).eot_id == expected


TEMPLATES = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "{{ bos_token }}\n{% for message in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
    "    {{ message | tojson }}\n{% endfor %}\n{{ eos_token }}{{ {'ü': [1, 2]} | tojson(indent=2) }}\n",
    "{% for message in messages %}{% generation %}{{ message.content | trim }}{% endgeneration %}{% endfor %}"
    "{{ strftime_now('%Y') }}{% if tools %}{{ tools[0].name }}{% endif %}",
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_rendered_as_transformers_does(
    phi4_checkpoint: Path, tmp_path: Path, template: str, prompt: bool
) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged, chat_template=template)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    expected = reference.apply_chat_template(CHAT, chat_template=template, add_generation_prompt=prompt, tokenize=False)
    assert load_tokenizer(path).apply_chat_template(CHAT, add_generation_prompt=prompt) == expected


def test_a_template_file_is_preferred_to_the_settings(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert load_tokenizer(path).apply_chat_template(CHAT) == "Be brief.!"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages[0].content + 1 }}", "refuses the messages"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe|refuses the messages"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_fails_says_why(
    phi4_checkpoint: Path, tmp_path: Path, template: str | None, words: str
) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged, chat_template=template)
    with pytest.raises(InputError, match=words):
        load_tokenizer(path).apply_chat_template(CHAT)


@pytest.mark.parametrize(("setting", "expected"), [(True, True), (False, False), (None, False)])
def test_bos_is_added_as_the_settings_say_when_no_post_processor_does(
    phi4_checkpoint: Path, tmp_path: Path, setting: bool | None, expected: bool
) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged, add_bos_token=setting)
    assert load_tokenizer(path).add_bos is expected
    out = gguf.write_f16(open_checkpoint(path), tmp_path / "m.gguf", WriteOptions()).path
    with Llama(out, vocab_only=True) as llama:
        assert bool(llama_cpp.llama_vocab_get_add_bos(llama.vocab)) is expected


def test_a_post_processor_that_adds_bos_is_believed(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged, add_bos_token=False)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)
    assert tokenizer.encode("a", add_special=True) == [0, *tokenizer.encode("a")]


# --- bad input ----------------------------------------------------------------------------------


def test_a_vocabulary_beyond_the_embedding_is_refused(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def add(raw: dict[str, Any]) -> None:
        raw["added_tokens"].append({**copy.deepcopy(raw["added_tokens"][0]), "id": 512, "content": "<|extra|>"})

    path = edited_tokenizer(phi4_checkpoint, tmp_path, add)
    tokenizer = load_tokenizer(path)
    with pytest.raises(InputError, match=r"has 513 ids \(the last is '<\|extra\|>'\), but the embedding has 512 rows"):
        tokenizer.check_vocabulary(parse_config(tiny_config()))
    with pytest.raises(InputError, match="513 ids"):
        gguf.write_f16(open_checkpoint(path), tmp_path / "m.gguf", WriteOptions())
    tokenizer.check_vocabulary(parse_config(tiny_config(vocab_size=513)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["model"].update(type="Unigram"), "tokenizer model is Unigram, not BPE"),
        (lambda raw: raw.pop("model"), "tokenizer model is None, not BPE"),
        (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
        (lambda raw: raw["model"].update(byte_fallback=True), "byte_fallback is True"),
        (lambda raw: raw["model"].update(merges=[["no", "such"]]), "damaged"),
    ],
)
def test_other_tokenizers_are_refused(phi4_checkpoint: Path, tmp_path: Path, change: Any, words: str) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, change)
    with pytest.raises(InputError, match=f"tokenizer.json: .*{words}"):
        load_tokenizer(path)


def test_a_missing_or_damaged_file_is_named(phi4_checkpoint: Path, tmp_path: Path) -> None:
    path = edited_tokenizer(phi4_checkpoint, tmp_path, unchanged)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(path)
    (path / "tokenizer.json").write_text("[1]")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a JSON object"):
        load_tokenizer(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(path)


def test_tokens_that_merging_cannot_make_are_refused(phi4_checkpoint: Path, tmp_path: Path) -> None:
    def orphan(raw: dict[str, Any]) -> None:
        raw["model"]["ignore_merges"] = True
        raw["model"]["merges"] = raw["model"]["merges"][:-1]

    path = edited_tokenizer(phi4_checkpoint, tmp_path, orphan)
    with pytest.raises(InputError, match="ignore_merges, and 1 tokens such as"):
        gguf.write_f16(open_checkpoint(path), tmp_path / "m.gguf", WriteOptions())
