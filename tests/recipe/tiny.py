"""Tiny random models, a tokenizer and tokenized examples, built from configurations: no hub."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sftmix.config import Config, load_config
from sftmix.data.tokenized import TokenizedExample
from sftmix.model.causal_lm import SFTMixModel, install_head, verify_head
from sftmix.scores.halves import Split
from sftmix.training.tensor_files import read_tensors, tensor_files

VOCAB = 61
CHATML = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] "
    "+ ' <|im_end|> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
SHARED = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SHARED, "intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "tie_word_embeddings": False},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {**SHARED, "intermediate_size": 24},
    "gemma2": {**GATED, "head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {**GATED, "logit_scale": 0.25},
    "granite": {**GATED, "logits_scaling": 4.0},
    "phi": {**SHARED, "intermediate_size": 24, "tie_word_embeddings": False},
    "opt": {**SHARED, "ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    "mixtral": {**GATED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3": {**GATED, "head_dim": 8, "tie_word_embeddings": True},
    "ernie4_5_moe": {**GATED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
                     "moe_num_shared_experts": 1, "moe_layer_start_index": 0, "moe_layer_interval": 1},
}  # fmt: skip


def causal_lm(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of an architecture in ``ARCHITECTURES``, float32, eval mode, biases not zero."""
    config = AutoConfig.for_model(kind, **{**ARCHITECTURES[kind], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif parameter.ndim >= 2:
                parameter.mul_(4)  # logits large enough for a softcap or a scale to show
    return model


def model(kind: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any) -> SFTMixModel:
    """The model in ``dtype``, what transformers keeps in float32 excepted, as loading gives it."""
    built = causal_lm(kind, **options)
    kept = [re.compile(pattern) for pattern in built._keep_in_fp32_modules_strict or ()]
    for name, parameter in built.named_parameters():
        if not any(pattern.search(name) for pattern in kept):
            parameter.data = parameter.data.to(dtype)
    built = install_head(built)
    verify_head(built)
    return built


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "system"]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>",
        chat_template=CHATML,
    )  # fmt: skip


def examples(count: int, *, seed: int = 0, longest: int = 14) -> dict[str, TokenizedExample]:
    """Prompts of 1 to 4 tokens and answers of 1 to ``longest - 4``, of differing length."""
    draw = random.Random(seed)
    made = {}
    for index in range(count):
        prompt, answer = draw.randint(1, 4), draw.randint(1, longest - 4)
        ids = tuple(draw.randrange(7, VOCAB) for _ in range(prompt + answer))
        name = f"e{index:03d}"
        made[name] = TokenizedExample(name, ids, (False,) * prompt + (True,) * answer)
    return made


def weighted(found: dict[str, TokenizedExample]) -> dict[str, TokenizedExample]:
    """The same examples, the first half of each answer at one weight and the rest at another, every third without."""
    made = {}
    for index, (name, example) in enumerate(found.items()):
        start, size = example.supervised.index(True), len(example.input_ids)
        turns = (0.5, 3.0) if index % 2 else (1.0, 0.25)
        weights = tuple(turns[2 * t >= start + size] if t >= start else 0.0 for t in range(size))
        made[name] = example if index % 3 == 0 else replace(example, weights=weights)
    return made


def halves(found: dict[str, TokenizedExample]) -> Split:
    names = sorted(found)
    middle = (len(names) + 1) // 2
    return Split(confident=names[:middle], unconfident=names[middle:])


def config(*flags: str) -> Config:
    """A configuration of small steps that still moves the weights."""
    defaults = [
        "run_dir=run", "model.name=tiny", "data.train=none", "model.dtype=float32", "train.batch_size=8",
        "train.micro_batch_size=4", "train.epochs=2", "optim.lr=0.01", "reference.epochs=2",
    ]  # fmt: skip
    return load_config(None, [*defaults, *flags])


def weights(found: SFTMixModel) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in found.named_parameters()}


def saved(folder: Path, like: Mapping[str, torch.Tensor], kind: str = "weights") -> dict[str, torch.Tensor]:
    """The tensors of one kind in a checkpoint or scoring point, whole, by the names of ``like``."""
    values = {f"{kind}/{name}": torch.empty_like(value) for name, value in like.items()}
    read_tensors(folder, [path.name for path in tensor_files(folder)], values)
    return {name: values[f"{kind}/{name}"] for name in like}


def assert_gradients(ours: Any, own: Any, *, rtol: float, atol: float) -> None:
    """The parameters of two models of one class have the same gradients; one without has zeros."""
    found = dict(ours.named_parameters())
    for name, parameter in own.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        got = torch.zeros_like(parameter) if found[name].grad is None else found[name].grad
        torch.testing.assert_close(
            got, expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
