"""A tokenizer that knows the words of benchmarks, and a tiny random model that says them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.recipe import tiny

WORDS = [
    "<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "####", "yes", "no", "maybe",
    *"ABCD", *map(str, range(10)), "Question:", "Answer:",
]  # fmt: skip
WORDS += [f"w{i}" for i in range(tiny.VOCAB - len(WORDS))]
END = WORDS.index("<|im_end|>")


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    given = {
        "pad_token": "<pad>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "chat_template": tiny.CHATML,
    }
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**given, **changes})


def counting_model() -> Any:
    """A random model that often says #### and a number, and sometimes ends: what follows what is in its head."""
    model = tiny.causal_lm(seed=9)
    follows = [("####", "w3"), ("####", "w5"), ("####", "w17"), ("7", "####"), ("w3", "7"), ("3", "####")]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for word, before in [*follows, ("<|im_end|>", "3")]:
            row = embedding[WORDS.index(before)]
            head[WORDS.index(word)] += 6 * row / row.norm()
    return model


def prompt(question: str, *, chat: bool, shots: list[tuple[str, str]] | None = None) -> str:
    """A benchmark's prompt as it should be, written out by hand."""
    if not chat:
        return "".join(f"{q} {a}\n\n" for q, a in shots or []) + question
    turns = [turn for q, a in shots or [] for turn in (("user", q), ("assistant", a))]
    text = "".join(
        f"<|im_start|> {role} {content} <|im_end|> " for role, content in [*turns, ("user", question)]
    )
    return text + "<|im_start|> assistant "
