"""``patch_lm_head``: the loss and the gradients of the model's own forward, undone without a trace, never twice."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sftmix.transformers import patch_lm_head, unpatch_lm_head
from sftmix_kernels import LossHead
from tests.recipe import tiny

KINDS = ["llama", "gpt2", "gemma2", "cohere", "granite", "qwen3", "phi", "mixtral"]


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, 61, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_models_own(kind: str) -> None:
    own, ours = tiny.causal_lm(kind), patch_lm_head(tiny.causal_lm(kind))
    (expected, theirs), (found, mine) = gradients(own, **batch()), gradients(ours, **batch())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        # A router that sends each token to one expert has a gradient of zero, but for rounding.
        scale = max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_options_of_the_forward_hold() -> None:
    own, ours = tiny.causal_lm(), patch_lm_head(tiny.causal_lm())
    inputs = batch()
    for more in ({"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(17)}, {"use_cache": True}):
        expected, found = own(**inputs, **more), ours(**inputs, **more)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert found.logits is None
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    found = ours(inputs["input_ids"], inputs["attention_mask"], shift_labels=shifted)
    torch.testing.assert_close(found.loss, own(**inputs).loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="return_dict: expected True"):
        ours(**inputs, return_dict=False)
    nothing = ours(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss
    assert float(nothing) == 0.0


def test_without_labels_it_is_the_model_itself() -> None:
    own, ours = tiny.causal_lm(), patch_lm_head(tiny.causal_lm())
    ids = batch()["input_ids"]
    assert torch.equal(ours(ids).logits, own(ids).logits)
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **told), own.generate(ids, **told))


def test_undone_nothing_is_left() -> None:
    model = tiny.causal_lm("qwen3")
    before = dict(model.__dict__), [n for n, _ in model.named_modules()], model.lm_head, model.lm_head.weight
    expected = gradients(model, **batch())
    patch_lm_head(model)
    assert isinstance(model.lm_head, LossHead) and model.lm_head.weight is model.get_input_embeddings().weight
    assert unpatch_lm_head(model) is model
    assert set(model.__dict__) == set(before[0]) and [n for n, _ in model.named_modules()] == before[1]
    assert (
        model.lm_head is before[2]
        and model.lm_head.weight is before[3] is model.get_input_embeddings().weight
    )
    found = gradients(model, **batch())
    assert torch.equal(found[0], expected[0]) and all(
        torch.equal(found[1][n], v) for n, v in expected[1].items()
    )
    with pytest.raises(ValueError, match="model: expected one that patch_lm_head patched"):
        unpatch_lm_head(model)


def test_it_is_not_done_twice() -> None:
    model = patch_lm_head(tiny.causal_lm())
    with pytest.raises(ValueError, match="model: expected one that is not patched, got LlamaForCausalLM"):
        patch_lm_head(model)
    unpatch_lm_head(model)
    patch_lm_head(model)
    outer = model.forward
    model.forward = types.MethodType(lambda self, *a, **k: outer(*a, **k), model)
    with pytest.raises(ValueError, match="undo first what came after it"):
        unpatch_lm_head(model)


def test_trls_head_is_refused() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model = tiny.causal_lm()
    utils.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="model: expected its own forward, got one of trl"):
        patch_lm_head(model)


@pytest.mark.parametrize("package", ["liger_kernel", "cut_cross_entropy"])
@pytest.mark.parametrize("on_class", [False, True])
def test_other_packages_heads_are_refused(tmp_path: Path, package: str, on_class: bool) -> None:
    """By where the forward's code stands: on the model and on its class."""
    space: dict[str, Any] = {}
    code = compile("def forward(self, *a, **k):\n    pass\n", str(tmp_path / package / "patch.py"), "exec")
    exec(code, space)
    model = tiny.causal_lm()
    if on_class:
        kind = type("Patched", (type(model),), {"forward": space["forward"]})
        model.__class__ = kind
    else:
        model.forward = types.MethodType(space["forward"], model)
    with pytest.raises(ValueError, match=f"got one of {package}"):
        patch_lm_head(model)


def test_adapters_on_the_head_train_where_they_come_after_and_are_refused_before() -> None:
    settings = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    own = get_peft_model(tiny.causal_lm(), copy.deepcopy(settings))
    torch.manual_seed(0)
    ours = get_peft_model(patch_lm_head(tiny.causal_lm()), copy.deepcopy(settings))
    (expected, theirs), (found, mine) = gradients(own, **batch()), gradients(ours, **batch())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert any("lm_head.lora_A" in name for name in mine) and mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            mine[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name
        )
    with pytest.raises(ValueError, match="model: expected a head without adapters"):
        patch_lm_head(own)
    with pytest.raises(ValueError, match="model: expected a head without adapters"):
        unpatch_lm_head(ours)


def test_a_peft_model_is_patched_inside() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.causal_lm(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    )
    expected = gradients(model, **batch())
    found = gradients(patch_lm_head(model), **batch())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()


def test_a_head_that_peft_trains_whole_is_patched_inside() -> None:
    """``modules_to_save``: the gradient is that of the copy which trains; undone, the copy is a plain layer again."""
    settings = LoraConfig(
        r=2, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model = get_peft_model(tiny.causal_lm(), settings)
    expected = gradients(model, **batch())
    found = gradients(patch_lm_head(model), **batch())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys() and any("modules_to_save" in name for name in found[1])
    for name, value in expected[1].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name
        )
    unpatch_lm_head(model)
    assert not any(isinstance(module, LossHead) for module in model.modules())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_compiles() -> None:
    own, ours = tiny.causal_lm(), patch_lm_head(tiny.causal_lm())
    compiled = torch.compile(ours, backend="aot_eager")
    for _ in range(2):
        (expected, theirs), (found, mine) = gradients(own, **batch()), gradients(compiled, **batch())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert len(mine) == len(theirs)


def test_trainer_trains_saves_and_evaluates_with_it(tmp_path: Path) -> None:
    inputs = batch()
    rows = [{name: value[i].tolist() for name, value in inputs.items()} for i in range(3)]
    told: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "max_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }
    told |= {"learning_rate": 0.01, "disable_tqdm": True, "prediction_loss_only": True}
    ends = []
    for model in (tiny.causal_lm(), patch_lm_head(tiny.causal_lm())):
        trainer = Trainer(
            model, TrainingArguments(str(tmp_path), **told), train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        ends.append((model, trainer.evaluate()["eval_loss"]))
    for (name, one), other in zip(ends[0][0].named_parameters(), ends[1][0].parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5, msg=name)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
    ends[1][0].save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(plain.lm_head) is torch.nn.Linear
    assert torch.equal(plain.lm_head.weight, ends[1][0].lm_head.weight)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected a causal LM of transformers, got str"):
        patch_lm_head("HuggingFaceTB/SmolLM2-135M")  # type: ignore[type-var]
