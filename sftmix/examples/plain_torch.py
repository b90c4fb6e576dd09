"""SFTMix in a training loop of one's own, PyTorch and transformers alone.

    python -m sftmix.examples.plain_torch MODEL FILE.jsonl OUT

FILE: JSON lines with ``prompt`` and ``completion``. One epoch of next-token training scores the examples, its weights
are forgotten, and the model is trained on pairs of the confident and the unconfident half.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.data.tokenized import TokenizedExample
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.scores.halves import Split, median_split
from sftmix.training.batch import Batch, collate_pairs, collate_plain
from sftmix.training.pairs import epoch_order, epoch_pairs

Examples = dict[str, TokenizedExample]
PAIRS, MU, ALPHA, LR = 4, 0.2, 0.5, 1e-4


def read(path: str, tokenizer: Any) -> Examples:
    """Tokens of each example, those of the completion bearing loss."""
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        bears = (False,) * len(prompt) + (True,) * len(answer)
        found[str(number)] = TokenizedExample(str(number), tuple(prompt + answer), bears)
    return found


def plain_batches(examples: Examples, pad_id: int) -> Iterator[Batch]:
    order = epoch_order(examples, seed=0, epoch=0)
    for start in range(0, len(order), 2 * PAIRS):
        yield collate_plain([examples[name] for name in order[start : start + 2 * PAIRS]], pad_id=pad_id)


def mixed_batches(examples: Examples, split: Split, pad_id: int) -> Iterator[Batch]:
    pairs = epoch_pairs(split, seed=0, epoch=0, alpha=ALPHA)
    for start in range(0, len(pairs), PAIRS):
        part = pairs[start : start + PAIRS]
        members = [
            (examples[p.confident], examples[p.unconfident] if p.unconfident else None, p.lam) for p in part
        ]
        yield collate_pairs(members, pad_id=pad_id)


def epoch(model: SFTMixModel, batches: Iterator[Batch], mu: float) -> Iterator[tuple[Batch, Any]]:
    """One pass over the batches; each with what the loss gave."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for batch in batches:
        batch = batch.to(model.device)
        out: Any = model(
            batch.input_ids, batch.attention_mask, batch.rows, batch.target, batch.lam, mixup_weight=mu
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield batch, out


def main(name: str, data: str, out: str) -> Split:
    tokenizer = AutoTokenizer.from_pretrained(name)
    pad_id = tokenizer.pad_token_id or 0
    examples = read(data, tokenizer)

    reference, confidence = install_head(AutoModelForCausalLM.from_pretrained(name)), {}
    for batch, found in epoch(reference.train(), plain_batches(examples, pad_id), 0.0):
        for index, example in enumerate(batch.ids):
            confidence[example] = -float(
                found.nll[batch.example == index].mean().exp()
            )  # minus its perplexity

    split = Split(*median_split(confidence))
    model = install_head(AutoModelForCausalLM.from_pretrained(name))
    for _, found in epoch(model.train(), mixed_batches(examples, split, pad_id), MU):
        print(f"loss {float(found.loss):.4f}", flush=True)
    model.base.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return split


if __name__ == "__main__":
    main(*sys.argv[1:])
