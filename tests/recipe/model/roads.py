"""The short road of a model from its files through training and export to files, without a run's other stages."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sftmix.config import Config
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.export import export_adapter, merge_and_export
from sftmix.model.load import load_model
from sftmix.model.lora import apply_lora
from sftmix.model.vocabulary import check_added_tokens
from tests.recipe import tiny
from tests.recipe.model.test_causal_lm import batch

IDS = batch()["input_ids"]
LORA = ("train.tuning=lora", "lora.rank=3")


def save(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return folder


def values(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's files, by the names that stand there."""
    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def rewrite(path: Path, drop: Iterable[str] = (), **changes: Any) -> None:
    """Change settings of a JSON file."""
    found = {key: value for key, value in read(path).items() if key not in set(drop)}
    path.write_text(json.dumps({**found, **changes}), encoding="utf-8")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits [2, 9, V] in float32."""
    found: Tensor = model.eval()(IDS).logits.float()
    return found


def forget_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers read code of models as a new process does."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).name != "modules"])
    importlib.invalidate_caches()


@dataclass
class Road:
    """What was trained and what was written of it."""

    base: Path
    out: Path
    live: SFTMixModel
    config: Config

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"

    def changed(self) -> set[str]:
        """Names in the exported files of the tensors that are not the base's, bit for bit."""
        before, after = values(self.base), values(self.model)
        assert before.keys() == after.keys()
        return {name for name, value in after.items() if not torch.equal(value, before[name])}

    def plain(self) -> Any:
        """The export as plain transformers reads it: its logits are the trained model's, and not the base's."""
        code = self.config.model.trust_remote_code
        found = AutoModelForCausalLM.from_pretrained(self.model, trust_remote_code=code)
        torch.testing.assert_close(logits(found), logits(self.live.base), rtol=1e-4, atol=1e-4)
        return found

    def with_peft(self) -> Any:
        """The adapter as peft puts it on the plain base: its logits are the trained model's."""
        from peft import PeftModel

        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), str(self.adapter))
        torch.testing.assert_close(logits(found), logits(self.live.base), rtol=1e-5, atol=1e-5)
        return found


def road(
    base: Path, out: Path, *flags: str, steps: int = 3, stop_ids: tuple[int, ...] = (), lr: float = 0.05
) -> Road:
    """Load, train a few steps of AdamW without decay, export; no step leaves the model as it is."""
    config = tiny.config(f"model.name={base}", *flags)
    model, tokenizer = load_model(config.model, tuning=config.train.tuning)
    check_added_tokens(model, config)
    if config.train.tuning == "lora":
        model = apply_lora(model, config.lora, export=config.export)
    before = logits(model.base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    for step in range(steps):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (float((logits(model.base) - before).abs().max()) > 1e-3) is (steps > 0)
    if config.export in ("merged", "both"):
        merge_and_export(model, tokenizer, out / "model", stop_ids=stop_ids, source=config.model)
    if config.export in ("adapter", "both"):
        export_adapter(model, tokenizer, out / "adapter", base=config.model)
    return Road(base, out, model, config)
