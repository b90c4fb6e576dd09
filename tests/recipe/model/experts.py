"""Tiny mixtures of experts and two dense models, as plain causal LMs with weights large enough to tell apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.recipe import tiny

SHARED = {**tiny.GATED, "tie_word_embeddings": False, "max_position_embeddings": 64}
ROUTED = {**SHARED, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
GROUPED = {
    **SHARED, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 1,
    "num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHARED,
    "gpt2": {**tiny.ARCHITECTURES["gpt2"], "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "mixtral": {**SHARED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "glm4_moe": {**GROUPED, "head_dim": 8},
    "deepseek_v3": {**GROUPED, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4, "v_head_dim": 8},
    "qwen3_next": {**ROUTED, "head_dim": 8, "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {**ROUTED, "head_dim": 8},
    "gpt_oss": {**SHARED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                "layer_types": ["full_attention", "full_attention"]},
    "llama4_text": {**SHARED, "head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2,
                    "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    "olmoe": {**SHARED, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**SHARED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {**SHARED, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4},
}  # fmt: skip


def causal_lm(kind: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A random causal LM of ``CONFIGS`` in eval mode; the same one each time."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or not name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return model.to(dtype)


def randomise(model: Any, seed: int = 0) -> None:
    """Move every trainable parameter, as a training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter) * 0.2)


def logits(model: Any, seed: int = 1) -> torch.Tensor:
    """Logits [2, 9, V] of a plain causal LM or peft model, float32."""
    ids = torch.randint(7, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float()
    return found
