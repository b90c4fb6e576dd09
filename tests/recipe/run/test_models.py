"""The models of a run: each is read once, and what a stage is given is as it was read."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftmix.config import LoraConfig
from sftmix.demo.job import find_smollm2
from sftmix.model.live import Live
from sftmix.model.load import load_model
from sftmix.model.parallel import join_world
from sftmix.run import stages
from sftmix.run.folder import RunFolder
from sftmix.run.models import Models
from tests.recipe import tiny
from tests.recipe.run.small import run

SHORT = ["--train.epochs=1", "--reference.epochs=1"]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the weights of each folder are read in this process."""
    counts: Counter[str] = Counter()
    original = AutoModelForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
        counts[str(Path(name) / options.get("gguf_file", ""))] += 1
        return original(cls, name, *args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(counted))
    return counts


def exported(folder: Path, kind: str = "model") -> list[str]:
    """Where exports are read from: under the name they are written with."""
    return [str(folder / f"train-{method}" / f".{kind}.tmp") for method in stages.METHODS]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_model_of_a_run_is_read_once(
    material: tuple[Path, Path], tmp_path: Path, read: Counter[str], tuning: str
) -> None:
    run(material, tmp_path / "r", *SHORT, "--train.tuning", tuning)
    assert read == Counter([str(material[0]), *exported(tmp_path / "r")])


def test_a_reference_of_its_own_is_read_once_too(
    material: tuple[Path, Path], tmp_path: Path, read: Counter[str]
) -> None:
    tiny.causal_lm("gpt2", seed=3).save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    run(material, tmp_path / "r", *SHORT, "--reference.model", str(tmp_path / "gpt2"))
    assert read == Counter([str(material[0]), str(tmp_path / "gpt2"), *exported(tmp_path / "r")])


@pytest.mark.slow
def test_a_gguf_file_and_its_copy_are_read_once(tmp_path: Path, read: Counter[str]) -> None:
    """The real file of the demo: what its conversion read back is the model that the stages are given."""
    pytest.importorskip("gguf")
    try:
        place, name = find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    file = Path(place, name)
    config = tiny.config(f"model.name={file.parent}", f"model.gguf_file={file.name}", f"run_dir={tmp_path}")
    device = torch.device("cpu")
    models = Models(config, RunFolder(str(tmp_path)), device, join_world(device))
    models.keep_base = True
    loaded = [models.load(models.source, trainable=trainable) for trainable in (False, True, True)]
    assert loaded[0] is loaded[1] is loaded[2]
    assert read == Counter([str(file), str(tmp_path / ".base.tmp")])


def state(model: Any) -> dict[str, Any]:
    """Everything a stage may leave in a model: values, what trains, modes, gradients, checkpointing, hooks."""
    found: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        found[f"value of {name}"] = tensor.detach().clone()
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (parameter.requires_grad, parameter.grad is None, parameter.dtype)
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        checkpointing = getattr(module, "gradient_checkpointing", None)
        found[f"module {name}"] = (type(module), module.training, checkpointing, hooks)
    found["cache"] = model.base.config.use_cache
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name])
    ]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_later_stage_is_given_the_model_as_it_was_read(
    material: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tuning: str,
    checkpointing: str,
) -> None:
    """Bitwise the base's weights, the adapters as first drawn, and nothing that an earlier stage switched on."""
    given: list[dict[str, Any]] = []
    for name in ("train_plain", "train_pairs"):
        original = getattr(stages, name)

        def watched(config: Any, model: Any, *args: Any, original: Any = original, **options: Any) -> Any:
            given.append(state(model))
            return original(config, model, *args, **options)

        monkeypatch.setattr(stages, name, watched)
    flags = [
        f"--train.tuning={tuning}",
        f"--train.gradient_checkpointing={checkpointing}",
        "--lora.dropout=0.1",
    ]
    run(material, tmp_path / "r", *SHORT, *flags)
    config = tiny.config(f"model.name={material[0]}", "lora.dropout=0.1")
    fresh, _ = load_model(config.model)
    lora = config.lora if tuning == "lora" else None
    model = Live(config.model, fresh).fresh(lora, trainable=True, seed=config.seed, keep=False)
    assert model is not None and len(given) == 3
    for stage in given:
        assert differences(stage, state(model)) == []


def test_what_cannot_be_taken_back_is_not_given_again(material: tuple[Path, Path]) -> None:
    config = tiny.config(f"model.name={material[0]}")
    model, _ = load_model(config.model)
    live = Live(config.model, model)
    before = copy.deepcopy(model.state_dict())
    assert live.fresh(None, trainable=True, seed=0, keep=True) is model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert live.fresh(LoraConfig(), trainable=True, seed=0, keep=True) is None  # adapters on trained weights
    assert live.fresh(None, trainable=True, seed=0, keep=True) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = Live(config.model, load_model(config.model)[0])
    assert other.fresh(LoraConfig(), trainable=True, seed=0, keep=True) is not None
    assert (
        other.fresh(None, trainable=False, seed=0, keep=True) is None
    )  # the base itself, with adapters in it
