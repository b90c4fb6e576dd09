"""The trained model as files that plain ``AutoModelForCausalLM.from_pretrained`` loads.

The trained model itself is left as it is: adapters are added to copies of their weights, and the copies go
into a fresh model of the same class, without ``LossHead``, adapters or quantisation settings. Generation is told
the tokens that training ended answers with: a model whose end of turn is not its configured end token talks on.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig

from sftmix.model.merge import merged_state
from sftmix.progress import say
from sftmix.rank import is_main

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel


def merge_and_export(
    model: SFTMixModel, tokenizer: Any, folder: str | Path, *, stop_ids: Sequence[int] = ()
) -> None:
    """Write the model (adapters merged, safetensors, its own dtype) and the tokenizer into ``folder``.

    ``stop_ids``, the tokens that the training answers end with, come first in ``eos_token_id`` of
    generation_config.json and config.json; the ones that stood there follow. All other settings of generation, the
    padding token, and the tokenizer with its chat template and its own end token are left as they are: a text's end
    is another thing than an answer's, and tokenising must not change.

    ``folder`` is written under another name and then replaced, so it is never half there. A sharded model is
    gathered by all processes together; the first one writes.
    """
    state = merged_state(model)
    if is_main():
        _write(model, state, tokenizer, Path(folder), stop_ids)
    if dist.is_initialized():
        dist.barrier()


def stops(model: Any, stop_ids: Sequence[int]) -> list[int]:
    """The trained stop tokens, then those that generation and configuration of a transformers model name."""
    text = model.config.get_text_config()
    found = [int(token) for token in stop_ids]
    for source in (model.generation_config, model.config, text):
        named = getattr(source, "eos_token_id", None)
        found += [named] if isinstance(named, int) else [int(token) for token in named or ()]
    return list(dict.fromkeys(found))


def _write(
    model: SFTMixModel, state: dict[str, Tensor], tokenizer: Any, folder: Path, stop_ids: Sequence[int]
) -> None:
    config = copy.deepcopy(model.base.config)
    generation = copy.deepcopy(model.base.generation_config)
    if stop_ids:
        union = stops(model.base, stop_ids)
        named = union if len(union) > 1 else union[0]
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.eos_token_id = named
        if generation is not None:
            generation.eos_token_id = named
    if hasattr(config, "quantization_config"):  # left by a GGUF file; it would refuse to be saved
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model.base)(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    kept = _sound(generation)
    plain.generation_config = generation if kept else GenerationConfig()
    plain.save_pretrained(temporary)
    if generation is not None and not kept:
        (temporary / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _sound(generation: Any) -> bool:
    """Whether transformers agrees to save these settings; where not, they are written as they are, with a word.

    Published models carry such ones (a temperature without sampling). transformers reads them with a warning, but
    raises when it is asked to write them: a trained model must not be lost for that.
    """
    if generation is None:
        return False
    try:
        generation.validate(strict=True)
    except ValueError as error:
        first = next((line for line in str(error).splitlines() if line.startswith("-")), str(error))
        say(
            f"generation settings: kept as the base model has them, though they disagree: {first.strip('- ')}"
        )
        return False
    return True
