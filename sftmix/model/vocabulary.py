"""Token ids and the rows of the embedding: tokens that are added, ids without a row, and the id that pads.

Added tokens (``model.added_tokens``) get the tokenizer's next free ids. Where the embedding has no rows for them it
grows, and the head with it; new rows are drawn about the mean of the old ones, the same on every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from sftmix.config import Config, ModelConfig
from sftmix.progress import say

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

_SHOWN = 5  # tokens in a line


def added_tokens(model: ModelConfig) -> list[str]:
    """``model.added_tokens`` as a list. Raises ``ValueError`` for an empty token and one named twice."""
    if model.added_tokens is None:
        return []
    tokens = [token.strip() for token in model.added_tokens.split(",")]
    if "" in tokens or len(set(tokens)) < len(tokens):
        raise ValueError(
            f"model.added_tokens: expected different tokens, separated by commas, got {model.added_tokens!r}"
        )
    return tokens


def extend_tokenizer(tokenizer: Any, model: ModelConfig) -> list[str]:
    """Add the tokens that the tokenizer lacks, as special tokens, in place; they are returned."""
    known = tokenizer.get_vocab()
    new = [token for token in added_tokens(model) if token not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    return new


def highest_id(tokenizer: Any) -> int:
    """The largest id that the tokenizer can give."""
    return max(map(int, tokenizer.get_vocab().values()))


def extend_model(causal_lm: Any, tokenizer: Any, new: list[str]) -> None:
    """Give embedding and head of a transformers model a row for each id of the tokenizer, and say so.

    ``new`` are the tokens that were added to the tokenizer. Rows are never taken away.
    """
    rows = int(causal_lm.get_input_embeddings().weight.shape[0])
    wanted = highest_id(tokenizer) + 1
    if wanted <= rows:
        if new:
            say(f"vocabulary: {_tokens(len(new))} added, in rows that the embedding of {rows} already has")
        return
    # On the CPU, before anything is moved: the same draw on every device and process.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        causal_lm.resize_token_embeddings(wanted, mean_resizing=True)
    for part in (causal_lm.config, causal_lm.config.get_text_config()):
        if hasattr(part, "vocab_size"):
            part.vocab_size = wanted
    say(f"vocabulary: {_tokens(len(new))} added, embedding {rows} -> {wanted} rows")


def check_ids(tokenizer: Any, rows: int, ids: Iterable[int]) -> None:
    """Raise ``ValueError`` naming the tokens among ``ids`` that an embedding of ``rows`` rows does not hold."""
    beyond = sorted({int(token) for token in ids if not 0 <= int(token) < rows})
    if beyond:
        shown = [str(tokenizer.convert_ids_to_tokens(token)) for token in beyond[:_SHOWN]]
        more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
        raise ValueError(
            f"data: expected tokens that the model's embedding of {rows} rows holds, got {', '.join(shown)}{more}: "
            f"--model.added_tokens '{','.join(shown)}' adds rows for them"
        )


def safe_pad_id(tokenizer: Any, rows: int) -> int:
    """An id that pads: the tokenizer's, or any row where it has none or one beyond ``rows``; padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and 0 <= token < rows:
            return token
    return 0


def check_added_tokens(model: SFTMixModel, config: Config) -> None:
    """Raise ``ValueError`` where added tokens would keep untrained rows: LoRA that does not train them whole."""
    if config.model.added_tokens is None or config.train.tuning != "lora":
        return
    wanted = [_name_of(model, model.base.get_input_embeddings())]
    if not model.is_tied:
        wanted.append(_name_of(model, model.head))
    given = [name.strip() for name in (config.lora.modules_to_save or "").split(",")]
    absent = [name for name in wanted if not any(f".{name}".endswith(f".{one}") for one in given if one)]
    if absent:
        leaves = ",".join(name.rpartition(".")[2] for name in wanted)
        raise ValueError(
            f"lora.modules_to_save: expected {leaves} with model.added_tokens, whose rows adapters do not train, got "
            f"{config.lora.modules_to_save}"
        )


def _name_of(model: SFTMixModel, wanted: Any) -> str:
    return next(name for name, module in model.base.named_modules() if module is wanted)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
