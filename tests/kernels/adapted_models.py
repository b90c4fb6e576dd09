"""Models whose head peft has adapted, and what their loss must be."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from sftmix_kernels import LossHead, SFTMixLoss, sftmix_loss
from tests.parity import Case, make_case

peft = pytest.importorskip("peft")

R = 3
V, D = 64, 32  # sizes that every kind of adapter divides


def case_of_pairs() -> Case:
    return make_case(12, V, D, num_pairs=5)


class Tiny(nn.Module):
    """A body and a head, the least that peft can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.lm_head = LossHead(D, V, bias=True, softcap=4.0, logit_scale=0.7)

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        return self.lm_head(self.body(hidden), *args, **options)


def adapted(**changes: Any) -> tuple[Any, Any]:
    """A peft model whose head has a LoRA layer with weights that show, and that layer."""
    options = {"r": R, "lora_alpha": 6, "target_modules": ["lm_head"], **changes}
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    return model, model.base_model.model.lm_head


def merged_loss(model: Any, case: Case) -> SFTMixLoss:
    """By the specification, with the head's weight as peft merges it into a copy of the model."""
    plain = copy.deepcopy(model).merge_and_unload()
    head = plain.lm_head
    assert type(head) is LossHead
    return sftmix_loss(
        plain.body(case.hidden), head.weight, case.target, case.lam, bias=head.bias, softcap=4.0, logit_scale=0.7,
        impl="reference",
    )  # fmt: skip


def assert_same_loss(found: SFTMixLoss, expected: SFTMixLoss) -> None:
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=1e-5, msg=name)


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)
