"""Tokenizers of the Phi-4 family as published, but for the words: real split, special tokens, ids and chat template.

The vocabularies themselves cannot be had offline, so a byte-level BPE is trained on the texts below with each family's
own pattern. Special tokens stand at their published ids; what lies between is left empty.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from support import PATTERN, write_checkpoint
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# The split pattern of tiktoken's o200k, which Phi-4-mini's tokenizer.json carries.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("phi4", "mini")
_DUMMIES = (100256, *range(100261, 100264), *range(100267, 100276), *range(100277, 100352))
SPECIALS: dict[str, dict[str, int]] = {
    "phi4": {
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|im_start|>": 100264,
        "<|im_end|>": 100265,
        "<|im_sep|>": 100266,
        "<|endofprompt|>": 100276,
        **{f"<|dummy_{i}|>": number for i, number in enumerate(_DUMMIES)},
    },
    "mini": {
        "<|endoftext|>": 199999,
        "<|endofprompt|>": 200018,
        "<|assistant|>": 200019,
        "<|end|>": 200020,
        "<|user|>": 200021,
        "<|system|>": 200022,
        "<|tool|>": 200023,
        "<|/tool|>": 200024,
        "<|tool_call|>": 200025,
        "<|/tool_call|>": 200026,
        "<|tool_response|>": 200027,
        "<|tag|>": 200028,
    },
}
ROWS = {"phi4": 100352, "mini": 200064}
# As published: Phi-4's tokens swallow white space on both sides, of mini's these five that which follows.
STRIPPING = {"phi4": tuple(SPECIALS["phi4"]), "mini": ("<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tag|>")}
TEMPLATES = {
    "phi4": (
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant"
        "<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "mini": (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] "
        "is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + "
        "'<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    # Phi-4 as first shipped: its eos token is not the one that ends a chat's turn.
    "phi4": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "mini": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
TURN_ENDS = {"phi4": "<|im_end|>", "mini": "<|end|>"}
TEXTS = {
    "prose": "It's what they'd said: \"we'll see\", and SHE'LL too; I'M sure... aren't you? Well-known co-operation.",
    "code": "def f(x):\n\treturn {'a': x**2, \"b\": [i for i in range(10)]}  # noqa\r\n\r\n\n    if x!=y: pass\n",
    "camel case": "XMLHttpRequest getElementById HTTPServer2 parseJSONObject iPhone eBay McDonald",
    "digits": "1 12 123 1234 12345678901 3.14159 -1e-9 0xFF 2026-11-24 ½ Ⅳ ² 10,000,000",
    "other digits": "٣٤٥٦ १२३४ ๑๒๓๔ １２３４ 〇一二",
    "German": "Der Fluß über Köln trägt große Schiffe; Übermäßig viele Äpfel, süß!",
    "French": "Où est l'été? Ça va, garçon; l'œuvre d'André à Noël, naïve.",
    "Chinese": "机器学习是人工智能的一个分支，研究如何从数据中学习。东京是日本的首都。",
    "Japanese": "東京は日本の首都です。カタカナとひらがな、ー長音も。",
    "Korean": "서울은 대한민국의 수도이다. 기계 학습은 재미있다!",
    "Thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย น้ำใจ ที่นี่",
    "Arabic": "القاهرة هي عاصمة مصر، واللُّغَةُ العربيَّةُ جميلة؟",
    "Hebrew": "ירושלים היא בירת ישראל. שָׁלוֹם עוֹלָם",
    "Hindi": "नई दिल्ली भारत की राजधानी है। हिन्दी में लिखना",
    "Russian": "Москва — столица России. Привет, мир! Съешь ещё этих мягких булок.",
    "Greek": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας. Γειά σου Κόσμε",
    "Turkish": "İstanbul'da ığdır ılık; Çağrı şöyle dedi.",
    "Vietnamese": "Hà Nội là thủ đô của Việt Nam; tiếng Việt rất đẹp.",
    "emoji": "🚀 (normal) 😶‍🌫️ ✅ 🦙🦙 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️‍🔥",
    "white space": "  two\t\ttabs \u00a0nbsp\u2003em\u3000ideographic\n \n\n  \n\n\n trailing   \r\n \r end  ",
    "odd white space": "a\u200bb\u2028c\u2029d\u0085e\u000bf\u000cg\u1680h\u180ei\u202fj\u205fk\ufeffl  \u00a0 m",
    "punctuation": "'''''' ``````` ------======= ?!?!...,,;; a/b//c /path/to\n/x <|not a token|> [INST]",
    "contractions": "I'd I'D 'tis can't CAN'T y'all'd've 's'S x'RE’s l’été",
}
CHATS = (
    [{"role": "user", "content": "2+2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hallo, wie geht's?"},
        {"role": "assistant", "content": "Gut."},
        {"role": "user", "content": "第二个问题 🚀"},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "  lines\n\n of code:\n\tx = {{ 1 }} {% if %}\n"},
        {"role": "assistant", "content": "{\"a\": [1, 'b']}"},
        {"role": "user", "content": '"""quotes""" and $dollars \\ and `ticks`'},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks"},
    ],
)


@cache
def tokenizer_json(kind: str, stripping: bool = False) -> str:
    """tokenizer.json, as text; ``stripping``: special tokens swallow white space beside them, as published."""
    trained = Tokenizer(models.BPE())
    pattern = PATTERN if kind == "phi4" else O200K
    behavior, invert = ("removed", True) if kind == "phi4" else ("isolated", False)  # as each file spells it
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Twice, so that every piece of the texts becomes a token: a text split elsewhere then has other ids.
    trained.train_from_iterator([*TEXTS.values(), *TEXTS.values(), Path(__file__).read_text()], trainer)
    raw = json.loads(trained.to_str())
    raw["model"]["vocab"] |= SPECIALS[kind]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    strips = STRIPPING[kind] if stripping else ()
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False, lstrip=kind == "phi4" and name in strips,
                       rstrip=name in strips)
            for name in SPECIALS[kind]
        ]
    )  # fmt: skip
    return str(tokenizer.to_str())


def write_phi(folder: Path, kind: str, *, stripping: bool = False, **config: Any) -> Path:
    """A small checkpoint of ``kind`` with its family's tokenizer, vocabulary size and special ids."""
    specials, settings = SPECIALS[kind], SETTINGS[kind]
    ids = {f"{name}_token_id": specials[settings[f"{name}_token"]] for name in ("bos", "eos", "pad")}
    if kind == "mini":
        ids["eos_token_id"] = specials["<|end|>"]  # config.json and the tokenizer's settings disagree there
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    write_checkpoint(folder, kind, vocab_size=ROWS[kind], **{**small, "num_hidden_layers": 1, **ids, **config})
    (folder / "tokenizer.json").write_text(tokenizer_json(kind, stripping))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", **settings, "chat_template": TEMPLATES[kind]})
    )
    return folder
