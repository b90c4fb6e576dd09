"""Double patching against the packages themselves: Liger, cut-cross-entropy's patch (not on PyPI), TRL's head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sftmix.transformers import patch_lm_head, unpatch_lm_head
from tests.recipe import tiny

NEEDED = {"liger_kernel": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy.transformers"}
IDS = torch.arange(7, 27).view(2, 10)


def found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


@pytest.fixture(params=list(NEEDED))
def package(request: pytest.FixtureRequest) -> Iterator[str]:
    """A package's name; what it put on the class is undone afterwards."""
    if not found(NEEDED[request.param]):
        pytest.skip(f"needs {NEEDED[request.param]}")
    own = LlamaForCausalLM.forward
    yield request.param
    LlamaForCausalLM.forward = own


def patch(package: str, model: Any = None) -> Any:
    """The package's own patch, on a model or on its class; the loss alone."""
    if package == "cut_cross_entropy":
        from cut_cross_entropy.transformers import cce_patch

        cce_patch("llama" if model is None else model, impl="torch_compile")
        return model
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, model=model)
    return model


def makers(package: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Models that the package has patched."""

    def on_class() -> Any:
        patch(package)
        return tiny.causal_lm()

    made = {"instance": lambda: patch(package, tiny.causal_lm()), "class": on_class}
    if package == "liger_kernel":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        tiny.causal_lm().save_pretrained(folder)
        quiet = {"rope": False, "rms_norm": False, "swiglu": False}
        made["auto"] = lambda: AutoLigerKernelForCausalLM.from_pretrained(folder, **quiet)
    return made


@pytest.mark.parametrize("way", ["instance", "class", "auto"])
def test_a_patched_model_is_refused(package: str, way: str, tmp_path: Path) -> None:
    make = makers(package, tmp_path).get(way)
    if make is None:
        pytest.skip(f"{package} has no such door")
    with pytest.raises(ValueError, match=f"model: expected its own forward, got one of {package}"):
        patch_lm_head(make())


def test_over_ours_on_the_model_it_is_refused_at_the_next_call(package: str) -> None:
    model = patch_lm_head(tiny.causal_lm())
    patch(package, model)
    with pytest.raises(ValueError, match=f"model: expected patch_lm_head's forward, got one of {package}"):
        model(IDS, labels=IDS)
    with pytest.raises(ValueError, match="undo first what came after it"):
        unpatch_lm_head(model)


def test_on_the_class_after_ours_it_is_not_reached(package: str) -> None:
    """Ours stays, with its loss, and undone it leaves what the package made of the class."""
    model = patch_lm_head(tiny.causal_lm())
    expected = model(IDS, labels=IDS).loss
    patch(package)
    output = model(IDS, labels=IDS)
    assert torch.equal(output.loss, expected) and hasattr(output, "sftmix")
    unpatch_lm_head(model)
    with pytest.raises(ValueError, match=f"got one of {package}"):
        patch_lm_head(model)


@pytest.mark.parametrize("on_class", [False, True])
def test_the_trainer_refuses_a_patched_model(package: str, on_class: bool, tmp_path: Path) -> None:
    small = pytest.importorskip("tests.recipe.trl.small", reason="needs trl")
    if on_class:
        patch(package)
    model = tiny.causal_lm() if on_class else patch(package, tiny.causal_lm())
    with pytest.raises(ValueError, match=f"model: expected its own forward, got one of {package}"):
        small.trainer(tmp_path, model=model)


def test_over_the_trainers_model_the_loss_stays_ours(package: str, tmp_path: Path) -> None:
    """The trainer passes no labels, and without them these forwards call the head."""
    small = pytest.importorskip("tests.recipe.trl.small", reason="needs trl")
    plain, other = (small.trainer(tmp_path / name, max_steps=2) for name in ("plain", "other"))
    patch(package, other.model)
    plain.train()
    other.train()
    small.assert_close(small.weights(other.model), small.weights(plain.model), 1e-6)


def test_trls_head_over_ours_is_refused_at_the_next_call() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model = patch_lm_head(tiny.causal_lm())
    utils.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="model: expected patch_lm_head's forward, got one of trl"):
        model(IDS, labels=IDS)


def test_the_trainer_refuses_trls_head_and_our_own_patch(tmp_path: Path) -> None:
    small = pytest.importorskip("tests.recipe.trl.small", reason="needs trl")
    utils = pytest.importorskip("trl.trainer.utils")
    model = tiny.causal_lm()
    utils.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="model: expected its own forward, got one of trl"):
        small.trainer(tmp_path, model=model)
    with pytest.raises(ValueError, match="model: expected one without patch_lm_head"):
        small.trainer(tmp_path, model=patch_lm_head(tiny.causal_lm()))
