"""Every causal LM architecture of transformers that a CPU runs, as a tiny random model: ``build("llama", folder)``.

A row of ``ROWS`` names an architecture (a ``model_type``, or a variant of the one under ``"of"``) and what its
configuration has besides ``SIZES``, which go to every configuration, and to the parts of a composed one, that know
the setting. No hub is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.recipe import tiny

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "sliding_window": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # Older names of the same sizes.
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_ctx": 64, "d_model": 16, "n_layers": 2, "n_heads": 2,
    "num_layers": 2, "attention_heads": 2, "num_heads": 2, "rotary_dim": 4, "ffn_dim": 24, "dff": 24, "n_inner": 24,
    "d_inner": 24, "d_head": 8, "max_seq_len": 64, "ffn_hidden_size": 24, "dim_ff": 24, "dim_head": 8,
    "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "num_decoder_layers": 2,
    "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "embedding_size": 16,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "dense_intermediate_size": 24, "expert_ffn_hidden_size": 16,
    "shared_experts_intermediate_size": 16, "first_k_dense_replace": 1, "num_dense_layers": 1, "n_shared_experts": 1,
    "zero_expert_num": 1, "router_hidden_size": 8, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    # Latent and indexed attention.
    "kv_lora_rank": 8, "q_lora_rank": 8, "o_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "qk_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 16, "kv_channels": 8,
    # State-space and linear attention.
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 32, "mamba_chunk_size": 8,
    "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "n_groups": 2,
    "chunk_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_head_dim": 8, "linear_num_heads": 2,
    "attention_hidden_size": 16, "lru_width": 16,
    # What a head does beyond a product, large enough to show.
    "final_logit_softcapping": 2.0, "logits_soft_cap": 2.0, "output_logit_soft_cap": 2.0, "logit_scale": 0.25,
    "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "logits_mup_width_multiplier": 4.0, "embedding_multiplier": 2.0,
    # Towers of a composed model.
    "image_size": 8, "patch_size": 4, "mm_tokens_per_image": 4,
}  # fmt: skip
PLAIN = """
    afmoe apertus arcee aria_text bart beam biogpt bitnet blenderbot blenderbot-small bloom cohere cohere2
    cohere2_moe ctrl cwm doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo
    flint fuyu gemma gemma2 gemma3 gemma3_text gemma4_unified glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2 gpt_bigcode
    gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium
    hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1
    laguna lfm2 llama llama4 llama4_text mamba marian mbart mellum mimo_v2_flash minimax minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi moss_transcribe_diarize mpt
    mvp nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3
    phi4_multimodal phimoe plbart qwen2_moe qwen3 qwen3_moe rwkv seed_oss smollm3 solar_open stablelm starcoder2
    trocr vaultgemma whisper xglm
"""
ENCODERS = """
    bert bert-generation camembert data2vec-text electra ernie megatron-bert roberta roberta-prelayernorm roformer
    xlm-roberta xlm-roberta-xl
"""
PARTS = {"text_config", "vision_config", "audio_config"}
MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
LATENT: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 4}
SPARSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
WINDOWED: dict[str, Any] = {
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 8, "rel_extent": 16,
}  # fmt: skip
INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 2, "hc_lowrank": 4, "ple_embed_dim": 16,
}  # fmt: skip
DECODER: dict[str, Any] = {"is_decoder": True}
LONG: dict[str, Any] = {"max_position_embeddings": 256}
ROWS: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN.split()},
    **dict.fromkeys(ENCODERS.split(), DECODER),
    "axk1": {**LATENT, **SPARSE},
    "axk2": {**LATENT, **SPARSE},
    "bailing_hybrid": {**LATENT, **SPARSE, **MIXED},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "codegen": {"n_embd": 32, "n_head": 4, "n_inner": 48},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "cohere_untied": {"of": "cohere", "tie_word_embeddings": False},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 1, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": {**LATENT, **SPARSE},
    "deepseek_v4": {"o_groups": 2, "rope_head_dim": 4},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 2, **SPARSE},
    "falcon_alibi": {"of": "falcon", "alibi": True, "bias": True},
    "falcon_new": {"of": "falcon", "new_decoder_architecture": True, "num_kv_heads": 1, "bias": True},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": tiny.VOCAB, "hidden_size_per_layer_input": 4,
        "intermediate_size": 24, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4": {"text_config": {"global_head_dim": 8, "vocab_size_per_layer_input": tiny.VOCAB}},
    "gemma4_text": {"global_head_dim": 8, "vocab_size_per_layer_input": tiny.VOCAB, "hidden_size_per_layer_input": 4},
    "gemma4_moe": {
        "of": "gemma4_text", "global_head_dim": 8, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "gemma4_unified_text": {"global_head_dim": 8},
    "glm4_moe_lite": {**LATENT, **SPARSE},
    "glm_moe_dsa": {**LATENT, **SPARSE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2_text": WINDOWED,
    "inkling_text": WINDOWED,
    "inkling_padded": {"of": "inkling_text", **WINDOWED, "vocab_size": 64, "unpadded_vocab_size": tiny.VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, **SPARSE, **MIXED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm2_conv": {"of": "lfm2", "layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama_tied": {"of": "llama", "tie_word_embeddings": True},
    "longcat_flash": {**LATENT, "num_layers": 1},
    "mamba2": {"num_heads": 4},
    "minicpm3": LATENT,
    "mixtral_router_loss": {"of": "mixtral", "output_router_logits": True},
    "nemotron_h": {},
    "qwen2": LONG,
    "qwen3_5": {"text_config": MIXED},
    "qwen3_5_moe": {"text_config": {**MIXED, **LONG}},
    "qwen3_5_moe_text": {**MIXED, **LONG},
    "qwen3_5_text": MIXED,
    "qwen3_next": MIXED,
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention", "indexed_attention"], **INDEXER}},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], **INDEXER},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rembert": {**DECODER, "input_embedding_size": 8, "output_embedding_size": 12},
    "roc_bert": {
        **DECODER, "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 64, "shape_embed_dim": 8,
        "shape_vocab_size": 64,
    },
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "reformer": {
        **DECODER, "attn_layers": ["local", "local"], "axial_pos_embds": False, "feed_forward_size": 24,
        "attention_head_size": 8,
    },
    "xmod": {**DECODER, "default_language": "en_XX", "languages": ["en_XX"]},
    "xlm": {"emb_dim": 16, "causal": True},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 2,
        "attention_hidden_size": 32, "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 2,
        "n_mamba_heads": 4, "attention_hidden_size": 32,
    },
    "youtu": {**LATENT, "pad_token_id": None},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
SPELT = (
    "qwen2",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
)  # transformers takes their own tokenizer class, whatever is saved
PADDED = "expected InklingForCausalLM to give 64 logits a token, as many as its head has rows, got"
# What the message of a refusal must match, by architecture and tuning.
REFUSED: dict[tuple[str, str], str] = {
    ("inkling_padded", "full"): PADDED, ("inkling_padded", "lora"): PADDED,
    ("xlstm", "bfloat16"): "xLSTMForCausalLM to read 12 tokens on cpu, got RuntimeError: expected m1 and m2 to have",
    ("reformer", "lora"): "adapters the loss of ReformerModelWithLMHead does not reach",
}  # fmt: skip
# Trained in bfloat16 too: other casts, caps and scales, routers in float32, state-space layers, fused experts.
IN_BFLOAT16 = """
    llama mistral qwen2 qwen3 qwen3_next gemma gemma2 gemma3_text phi phi3 olmo2 granite granitemoehybrid cohere
    smollm3 glm4 ernie4_5_moe flint mamba mamba2 falcon_mamba recurrent_gemma llama4_text xlstm rwkv gpt2 mpt
""".split()
CASES = [(name, tuning) for tuning in ("full", "lora") for name in ROWS]
CASES += [(name, "bfloat16") for name in IN_BFLOAT16]


def configuration(name: str) -> PreTrainedConfig:
    """The tiny configuration of a row of ``ROWS``."""
    changes = dict(ROWS[name])
    kind = changes.pop("of", name)
    return AutoConfig.for_model(kind, **_tiny(AutoConfig.for_model(kind), changes))


def _tiny(whole: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` over those ``SIZES`` that the configuration knows, and the same for its parts."""
    known = whole.to_dict()
    settings = {key: value for key, value in SIZES.items() if key in known}
    for part in PARTS & set(whole.sub_configs):
        if getattr(whole, part, None) is not None:
            settings[part] = _tiny(getattr(whole, part), changes.get(part, {}))
    return {**settings, **{key: value for key, value in changes.items() if key not in PARTS}}


def class_of(name: str) -> str:
    """The class that ``AutoModelForCausalLM`` takes for a row of ``ROWS``."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ROWS[name].get("of", name)])


def causal_lm(name: str, *, seed: int = 0) -> Any:
    """The random model, float32, in eval mode: no bias is zero, no norm is one, and logits are of the order of 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configuration(name)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def spelling() -> Qwen2Tokenizer:
    """A tokenizer of the class that Qwen has: the words of ``tiny.tokenizer()`` letter by letter, and its template."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    letters = [
        *special,
        "\u0120",
        *sorted(set("w0123456789userassistantsystem")),
    ]  # U+0120 stands for a space
    found: Qwen2Tokenizer = Qwen2Tokenizer(
        vocab={letter: n for n, letter in enumerate(letters)}, merges=[], pad_token="<pad>", eos_token="<|im_end|>",
        unk_token="<unk>", additional_special_tokens=["<|im_start|>"], chat_template=tiny.CHATML,
    )  # fmt: skip
    return found


def build(name: str, folder: Path, *, seed: int = 0) -> Path:
    """The folder with the model's files and the tokenizer's."""
    causal_lm(name, seed=seed).save_pretrained(folder)
    (spelling() if name in SPELT else tiny.tokenizer()).save_pretrained(folder)
    return folder
