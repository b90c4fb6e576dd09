"""The trained model as files that plain ``AutoModelForCausalLM.from_pretrained`` loads.

The trained model itself is left as it is: adapters are added to copies of their weights, and the copies go
into a fresh model of the same class, without ``LossHead``, adapters or quantisation settings. Generation is told
the tokens that training ended answers with: a model whose end of turn is not its configured end token talks on.
The files are read again by plain transformers and compared (``proof``) before they take their place.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig

from sftmix.config import ModelConfig
from sftmix.model import proof
from sftmix.model.adapter import save_adapter
from sftmix.model.companions import copy_companions, keep_names
from sftmix.model.merge import merged_state
from sftmix.model.quantised import forget_settings, plain_conversions
from sftmix.progress import say
from sftmix.rank import is_main

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

MAX_SHARD = "5GB"  # of a weights file
CARD = "README.md"


def merge_and_export(
    model: SFTMixModel, tokenizer: Any, folder: str | Path, *, stop_ids: Sequence[int] = (),
    texts: Sequence[Sequence[int]] = (), source: ModelConfig | None = None, card: str | None = None,
) -> Any:  # fmt: skip
    """Write the model (adapters merged, safetensors, each weight in its own dtype) and the tokenizer into ``folder``.

    ``stop_ids``, the tokens that the training answers end with, come first in ``eos_token_id`` of
    generation_config.json and config.json; the ones that stood there follow. All other settings of generation, the
    padding token, and the tokenizer with its chat template and its own end token are left as they are: a text's end
    is another thing than an answer's, and tokenising must not change. ``card`` becomes README.md. Of ``source``, the
    base model, processor files, licences and code are copied.

    ``folder`` is written under another name, read back by plain transformers, and then put in place, so it is never
    half there and never wrong: every tensor is compared, and the logits of ``texts`` (token ids; random ones without)
    with the trained model's. Returns the model that was read back, on the CPU; None on processes but the first. A
    sharded model is gathered by all processes together; the first one writes.

    Raises ``ValueError``, on every process, where what was read back is not what was trained; ``folder`` is then as
    it was before.
    """
    expected = proof.trained_logits(model, texts, exact=True)
    state = merged_state(model)
    plain, problem = None, None
    if is_main():
        try:
            plain = _write(model, state, tokenizer, Path(folder), stop_ids, expected, source, card)
        except ValueError as error:
            problem = error
    _raise_together(problem)
    return plain


def export_adapter(
    model: SFTMixModel, tokenizer: Any, folder: str | Path, *, base: ModelConfig,
    texts: Sequence[Sequence[int]] = (), card: str | None = None,
) -> None:  # fmt: skip
    """Write the adapter as peft loads it onto ``base``, with tokenizer and card, into ``folder``.

    As ``merge_and_export``: under another name, read back by plain transformers and peft, compared, put in place.
    Raises ``ValueError``, on every process, where the two do not give the trained model's logits.
    """
    expected = dataclasses.replace(proof.trained_logits(model, texts), base=())
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    path = Path(base.name).expanduser()
    save_adapter(model, temporary, str(path.resolve()) if path.is_dir() else base.name)
    problem = None
    if is_main():
        tokenizer.save_pretrained(temporary)
        keep_names(base, temporary)
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")
        try:
            proof.check_logits(proof.reload_adapter(base, temporary, like=model), expected)
        except ValueError as error:
            problem = error
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            _put(temporary, folder)
    _raise_together(problem)


def _put(temporary: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _raise_together(problem: ValueError | None) -> None:
    """Raise the main process's error on every process: none waits for one that has stopped."""
    told = [None if problem is None else str(problem)]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    if problem is not None:
        raise problem
    if told[0] is not None:
        raise ValueError(told[0])


def stops(model: Any, stop_ids: Sequence[int]) -> list[int]:
    """The trained stop tokens, then those that generation and configuration of a transformers model name."""
    text = model.config.get_text_config()
    found = [int(token) for token in stop_ids]
    for source in (getattr(model, "generation_config", None), model.config, text):
        named = getattr(source, "eos_token_id", None)
        found += [named] if isinstance(named, int) else [int(token) for token in named or ()]
    return list(dict.fromkeys(found))


def _write(
    model: SFTMixModel, state: dict[str, Tensor], tokenizer: Any, folder: Path, stop_ids: Sequence[int],
    expected: proof.Logits, source: ModelConfig | None, card: str | None,
) -> Any:  # fmt: skip
    fresh, generation = _fresh(model, state, stop_ids)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    kept = _sound(generation)
    if generation is not None:
        fresh.generation_config = generation if kept else GenerationConfig()
    fresh.save_pretrained(temporary, max_shard_size=MAX_SHARD)
    if generation is not None and not kept:
        (temporary / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    tokenizer.save_pretrained(temporary)
    if source is not None:
        keep_names(source, temporary)
        copied = copy_companions(source, temporary, code=source.trust_remote_code)
        if copied:
            say(f"export: with {', '.join(copied)} of the base model")
    if card is not None:
        (temporary / CARD).write_text(card, encoding="utf-8")
    del fresh
    code = source is not None and source.trust_remote_code
    try:
        plain = proof.reload(temporary, like=model.base, trust_remote_code=code)
        proof.check_tensors(plain, state)
        state.clear()
        proof.check_logits(plain.to(_room(plain, model.device)), expected)
    except ValueError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _put(temporary, folder)
    return plain


def _fresh(model: SFTMixModel, state: dict[str, Tensor], stop_ids: Sequence[int]) -> tuple[Any, Any]:
    """A plain model that holds ``state``, and its settings of generation."""
    config = copy.deepcopy(model.base.config)
    generation = copy.deepcopy(getattr(model.base, "generation_config", None))  # a class may have none
    if stop_ids:
        union = stops(model.base, stop_ids)
        named = union if len(union) > 1 else union[0]
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.eos_token_id = named
        if generation is not None:
            generation.eos_token_id = named
    forget_settings(config)  # of the bits that have become numbers; those of a GGUF file could not be saved
    with torch.device("meta"):
        fresh = type(model.base)(config)
    fresh.load_state_dict(state, strict=True, assign=True)
    fresh.tie_weights()
    conversions = getattr(model.base, "_weight_conversions", None)
    if getattr(model.base, "is_quantized", False):
        conversions = plain_conversions(model.base)
    if conversions is not None:  # the names in the base model's files, which are not always those in memory
        fresh._weight_conversions = conversions
    return fresh, generation


def _room(plain: Any, device: torch.device) -> torch.device:
    """``device`` where a second model fits beside the trained one, else the CPU."""
    if device.type != "cuda":
        return device
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    return device if torch.cuda.mem_get_info(device)[0] > 1.2 * size else torch.device("cpu")


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
