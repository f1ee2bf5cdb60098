"""The checkpoint's tokenizer: text to ids exactly as tokenizer.json says, its special tokens and its chat template.

Built on the ``tokenizers`` library alone. transformers' AutoTokenizer rebuilds the split of a GPT2Tokenizer, the
class that Phi-4 names, from the class and not from tokenizer.json, and then gives other ids.
"""

from __future__ import annotations

__all__ = ["Tokenizer", "load_tokenizer"]

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tokenizers

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import InputError
from phi4edge.core.jsonfile import read_object
from phi4edge.model.pretokenizer import gguf_pre_tokenizer

if TYPE_CHECKING:
    import jinja2

_KNOWN_END_OF_TURN = ("<|im_end|>", "<|end|>", "<|eot_id|>")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE tokenizer. ``raw`` is tokenizer.json's object, ``settings`` tokenizer_config.json's."""

    folder: Path
    raw: Mapping[str, Any] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)
    backend: tokenizers.Tokenizer = field(repr=False)
    chat_template: str | None = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of ``text``; special tokens spelled in it become their ids, as transformers does.

        ``add_special`` puts the tokens of the post-processor (a beginning-of-sequence token) around them.
        """
        return list(self.backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Every token, added ones included, and its id."""
        return dict(self.backend.get_vocab(with_added_tokens=True))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values()) + 1

    @cached_property
    def added(self) -> Mapping[int, Mapping[str, Any]]:
        """tokenizer.json's entries of the tokens that are never split, by id."""
        return {int(entry["id"]): entry for entry in self.raw.get("added_tokens", [])}

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        plain, framed = self.encode("a"), self.encode("a", add_special=True)
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                return framed[:start], framed[start + len(plain) :]
        raise InputError(f"{self.folder / 'tokenizer.json'}: the post-processor changes the text's own tokens")

    @property
    def add_bos(self) -> bool:
        """Whether a sequence begins with the bos token: as the post-processor does, or else as the settings say."""
        if self.raw.get("post_processor") is None:
            return bool(self.settings.get("add_bos_token")) and self.bos_id is not None
        return self.bos_id is not None and self._frame[0] == [self.bos_id]

    @property
    def add_eos(self) -> bool:
        """Whether a sequence ends with the eos token by itself."""
        if self.raw.get("post_processor") is None:
            return bool(self.settings.get("add_eos_token")) and self.eos_id is not None
        return self.eos_id is not None and self._frame[1] == [self.eos_id]

    @cached_property
    def eot_id(self) -> int | None:
        """The token that ends an answer in a chat; not always the eos token (Phi-4 ships another one).

        It is the special token that the chat template puts behind an assistant's message, or else a token
        with one of the usual names.
        """
        if self.chat_template is not None:
            marks = ("first.message", "second.message")
            turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant"), marks, strict=True)]
            try:
                rendered = self.apply_chat_template(turns)
            except InputError:
                rendered = ""  # a template that wants more than two turns; its names are tried below
            for mark in reversed(marks):
                behind = rendered.rpartition(mark)[2].lstrip() if mark in rendered else ""
                found = [e for e in self.added.values() if e["content"] and behind.startswith(e["content"])]
                if found:
                    return int(max(found, key=lambda entry: len(entry["content"]))["id"])
        known = [self.ids[name] for name in _KNOWN_END_OF_TURN if name in self.ids]
        return known[0] if known else self.eos_id

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """``messages`` (role, content) as the model was trained to read them; ``variables`` reach the template.

        Raises:
            InputError: no chat template, or one that refuses the messages.
        """
        import jinja2

        special = {f"{n}_token": _content(self.settings.get(f"{n}_token")) or "" for n in ("bos", "eos", "pad", "unk")}
        turns = [dict(message) for message in messages]
        try:
            return str(
                self._template.render(
                    messages=turns, add_generation_prompt=add_generation_prompt, **special, **variables
                )
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{self.folder}: the chat template refuses the messages ({error})") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2

        if self.chat_template is None:
            raise InputError(
                f"{self.folder}: the tokenizer has no chat template",
                "use a corpus without chat, or add chat_template.jinja to the checkpoint",
            )
        try:
            return _template_environment().from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise InputError(f"{self.folder}: the chat template is not valid Jinja ({error})") from error

    def check_vocabulary(self, config: ModelConfig) -> None:
        """Refuse a vocabulary that the embedding cannot hold.

        Raises:
            InputError: an id beyond the embedding's rows.
        """
        if self.vocab_size > config.vocab_size:
            last = max(self.ids, key=lambda token: self.ids[token])
            raise InputError(
                f"{self.folder / 'tokenizer.json'}: the vocabulary has {self.vocab_size} ids (the last is {last!r}), "
                f"but the embedding has {config.vocab_size} rows",
                "tokenizer and weights do not belong together",
            )

    @property
    def gguf_pre(self) -> str:
        """llama.cpp's name of the pre-tokenizer.

        Raises:
            InputError: llama.cpp has none that is known to be the same.
        """
        return gguf_pre_tokenizer(self.raw, str(self.folder / "tokenizer.json"))

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that BPE joins, in order of priority."""
        pairs = self.raw["model"].get("merges", [])
        split = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs)
        return [(str(left), str(right)) for left, right in split]

    @property
    def unreachable(self) -> list[str]:
        """Tokens that merging alone cannot make; with ``ignore_merges`` the vocabulary is looked at first."""
        if not self.raw["model"].get("ignore_merges"):
            return []
        vocab = self.raw["model"]["vocab"]
        merging = tokenizers.models.BPE(vocab, self.merges)
        words = (token for token, number in vocab.items() if number not in self.added)
        return [word for word in words if [t.id for t in merging.tokenize(word)] != [vocab[word]]]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    Raises:
        InputError: no tokenizer.json, or not a byte-level BPE tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder}: no tokenizer.json in it", "copy it from the original checkpoint")
    raw, settings = read_object(path), _settings(folder)
    model = raw.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise InputError(f"{path}: tokenizer model is {kind}, not BPE", "the Phi-4 family has byte-level BPE")
    for option, plain in _PLAIN_BPE.items():
        if model.get(option) not in (plain, None):
            raise InputError(f"{path}: BPE option {option} is {model[option]!r}; the family has none")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: damaged ({error})", "copy it again from the original checkpoint") from error
    backend.no_truncation()
    backend.no_padding()
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}

    def special(name: str) -> int | None:
        """By name from the tokenizer's settings, or else by id from config.json, as llama.cpp's converter does."""
        token = _content(settings.get(f"{name}_token"))
        if token is not None and (found := backend.token_to_id(token)) is not None:
            return int(found)
        listed = config.get(f"{name}_token_id")
        first = listed[0] if isinstance(listed, list) and listed else listed
        return first if isinstance(first, int) and backend.id_to_token(first) is not None else None

    return Tokenizer(
        folder=folder,
        raw=raw,
        settings=settings,
        backend=backend,
        chat_template=_chat_template(folder, settings),
        bos_id=special("bos"),
        eos_id=special("eos"),
        pad_id=special("pad"),
        unk_id=special("unk"),
    )


_PLAIN_BPE = {"dropout": 0, "continuing_subword_prefix": "", "end_of_word_suffix": "", "byte_fallback": False}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token's text; settings spell it as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja if there is one, as transformers prefers, or else the settings' template."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _template_environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates: sandboxed, and with its helpers."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant said; the text is the same with or without the mark."""

        tags = {"generation"}  # noqa: RUF012  as the base class declares it

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
