"""Configurations of public models, as their config.json has them, with the parameters that their makers count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftmix.config import load_config
from sftmix.hardware import find_gpu
from sftmix.planning.plan import Question

CHECKPOINTED = "train.gradient_checkpointing=full"
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (
        {
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "max_position_embeddings": 8192, "tie_word_embeddings": True,
        },
        134_515_008,
    ),
    "Llama-3.1-8B": (LLAMA_8B, 8_030_261_248),
    "Llama-3.1-70B": (
        {
            **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        70_553_706_496,
    ),
    "Llama-3.1-405B": (
        {
            **LLAMA_8B, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
            "num_attention_heads": 128,
        },
        405_853_388_800,
    ),
    "Mistral-7B": (
        {
            "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 32768, "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "Qwen2.5-14B": (
        {
            "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "tie_word_embeddings": False,
        },
        14_770_033_664,
    ),
}  # fmt: skip


def folder(name: str, within: Path) -> Path:
    """A folder with a public model's config.json and nothing else."""
    path = within / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(PUBLIC[name][0]))
    return path


def question(
    name: str, within: Path, *flags: str, gpu: str = "H100-80", gpus: int = 1, **more: Any
) -> Question:
    """A question about a public model in bfloat16."""
    told = [
        f"model.name={folder(name, within)}",
        "run_dir=none",
        "data.train=none",
        "model.dtype=bfloat16",
        *flags,
    ]
    return Question(load_config(None, told), find_gpu(gpu), gpus=gpus, **more)
