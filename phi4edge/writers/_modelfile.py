"""A Modelfile, with which Ollama takes a GGUF: ``ollama create NAME -f FILE``.

Ollama renders chats by a template in Go's text/template and not by the Jinja template in the file. It is written here
for the two formats of the family, and only where the checkpoint's own template renders a set of trial chats to the
very same text; otherwise the Modelfile has no TEMPLATE and a note says so. As in Ollama's own library, an assistant's
message that comes last is left open, to be continued.
"""

from __future__ import annotations

__all__ = ["CHAT_FORMATS", "ChatFormat", "chat_format", "go_template", "modelfile"]

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from phi4edge import __version__
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import InputError
from phi4edge.model.tokenizer import Tokenizer

Chat = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class ChatFormat:
    """Every turn is ``before``, its role, ``behind``, its words, ``end``; nothing else stands between or around."""

    before: str
    behind: str
    end: str

    def render(self, chat: Chat) -> str:
        """``chat`` and the header of the answer to come."""
        turns = "".join(f"{self.before}{t['role']}{self.behind}{t['content']}{self.end}" for t in chat)
        return f"{turns}{self.before}assistant{self.behind}"


CHAT_FORMATS = (
    ChatFormat("<|im_start|>", "<|im_sep|>", "<|im_end|>"),  # Phi-4
    ChatFormat("<|", "|>", "<|end|>"),  # Phi-4-mini
)
_WORDS = ("One.", "  two\n\n lines\n", "", "{{ three }} {% x %} \"'\\ <|", "四 🚀")


def chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """The format in which the checkpoint's template renders all trial chats, or None."""
    for found in CHAT_FORMATS:
        try:
            if all(
                tokenizer.apply_chat_template(chat, add_generation_prompt=True) == found.render(chat)
                for chat in _trial_chats()
            ):
                return found
        except InputError:  # no template, or one that refuses a chat
            continue
    return None


def _trial_chats() -> Iterator[Chat]:
    """Up to six turns with and without a system message, of words that careless templates change."""
    for start in range(len(_WORDS)):
        words = [*_WORDS[start:], *_WORDS[:start]]
        for opening in (["system"], []):
            for turns in (1, 3, 5):
                roles = opening + [("user", "assistant")[i % 2] for i in range(turns)]
                yield [{"role": r, "content": words[i % len(words)]} for i, r in enumerate(roles)]


def go_template(found: ChatFormat) -> str:
    """``found`` in Go's template language, as Ollama fills it in (.Messages of .Role and .Content)."""
    return (
        "{{- range $i, $_ := .Messages }}"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}"
        f"{found.before}{{{{ .Role }}}}{found.behind}{{{{ .Content }}}}"
        f'{{{{- if not (and $last (eq .Role "assistant")) }}}}{found.end}{{{{ end }}}}'
        f'{{{{- if and $last (ne .Role "assistant") }}}}{found.before}assistant{found.behind}{{{{ end }}}}'
        "{{- end }}"
    )


def modelfile(
    file: str, tokenizer: Tokenizer, config: ModelConfig, *, context: int | None, licence: str | None
) -> tuple[str, list[str]]:
    """The Modelfile of GGUF ``file`` (its name), and notes on what it leaves out.

    Raises:
        InputError: ``context`` exceeds the model's.
    """
    if context is not None and context > config.context_length:
        raise InputError(f"context {context} exceeds the model's {config.context_length}")
    notes = []
    lines = [f"# written by phi4edge {__version__}", f"FROM ./{file}"]
    found = chat_format(tokenizer)
    if found is not None:
        lines.append(f'TEMPLATE """{go_template(found)}"""')
    else:
        notes.append("the chat template is none of the family's, so the Modelfile has no TEMPLATE; write one by hand")
    by_id = {number: token for token, number in tokenizer.ids.items()}
    ends = [by_id[i] for i in dict.fromkeys((tokenizer.eot_id, tokenizer.eos_id)) if i is not None]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
    if context is not None:
        original = config.rope.original_context
        if config.rope.is_longrope and original and context > original:
            lines.append(f"# beyond {original} tokens of context, llama.cpp takes the long rope factors for every text")
        lines.append(f"PARAMETER num_ctx {context}")
    if licence is not None and '"""' not in licence:
        lines.append(f'LICENSE """{licence.strip()}"""')
    elif licence is not None:
        notes.append('the licence text holds """, which a Modelfile cannot quote; it is left out')
    return "\n".join(lines) + "\n", notes
