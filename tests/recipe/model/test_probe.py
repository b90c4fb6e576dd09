"""What a model does around its head is measured: scale, cap, casts, layers before it, and what it adds to the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from sftmix.model.causal_lm import SFTMixModel, install_head, verify_head
from sftmix.model.probe import measure
from tests.recipe import tiny

HYBRID = {**tiny.GATED, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
          "mamba_expand": 2, "mamba_d_conv": 2, "mamba_chunk_size": 8}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4,
               "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "falcon_h1": {**HYBRID, "mamba_d_ssm": 32, "lm_head_multiplier": 0.375},
    "recurrent_gemma": {**tiny.GATED, "head_dim": 8, "lru_width": 16, "logits_soft_cap": 3.0,
                        "block_types": ("recurrent", "attention"), "attention_window_size": 8},
    "llama4_text": {**tiny.GATED, "head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2},
    "bamba": {**HYBRID, "attn_layer_indices": [1], "z_loss_coefficient": 0.03},
}  # fmt: skip


def build(kind: str, **changes: Any) -> Any:
    tiny_kinds = tiny.ARCHITECTURES
    if kind in tiny_kinds:
        return tiny.causal_lm(kind, **changes)
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**OTHERS[kind], **changes})).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return found


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two whole sequences: every row that has a next token."""
    ids = torch.randint(7, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([*range(8), *range(9, 17)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "rows": rows,
        "target": ids.view(-1)[rows + 1],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, softcap, scale",
    [("llama", None, 1.0), ("gemma2", 2.0, 1.0), ("cohere", None, 0.25), ("granite", None, 0.25),
     ("recurrent_gemma", 3.0, 1.0), ("falcon_h1", None, 0.375), ("mamba", None, 1.0), ("mamba2", None, 1.0),
     ("falcon_mamba", None, 1.0), ("llama4_text", None, 1.0)],
)  # fmt: skip
def test_cap_and_scale_are_measured(
    kind: str, softcap: float | None, scale: float, dtype: torch.dtype
) -> None:
    model = install_head(build(kind).to(dtype))
    assert (model.head.softcap, model.head.logit_scale) == (softcap, scale)
    verify_head(model)
    blocks = model.base.get_submodule(model.around.blocks)
    assert len(blocks) == 2


@pytest.mark.parametrize("kind", [*(kind for kind in OTHERS if kind != "bamba"), "mixtral"])
def test_loss_and_gradients_are_the_models_own(kind: str) -> None:
    """Against the model's own loss of the same labels: an auxiliary loss is in both."""
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.3} if kind == "mixtral" else {}
    ours, own, data = install_head(build(kind, **options)), build(kind, **options), batch()
    loss: Any = ours(**data)
    loss.loss.backward()
    expected = own(data["input_ids"], attention_mask=data["attention_mask"], labels=data["input_ids"])
    expected.loss.backward()
    torch.testing.assert_close(loss.loss, expected.loss.float(), rtol=1e-5, atol=1e-5)
    tiny.assert_gradients(ours.base, own, rtol=1e-3, atol=1e-5)


def test_an_auxiliary_loss_counts_by_the_batchs_share() -> None:
    model = install_head(build("mixtral", output_router_logits=True, router_aux_loss_coef=0.3))
    assert model.extra.aux_weight == 0.3
    data = batch()
    none, half = model(**data, aux_share=0.0).loss, model(**data, aux_share=0.5).loss
    assert model.aux_loss is not None and float(model.aux_loss) > 1
    torch.testing.assert_close(half - none, 0.15 * model.aux_loss)
    model(**data, stats=True)
    assert model.aux_loss is None


def test_the_weight_of_an_auxiliary_loss_is_measured_not_looked_up() -> None:
    class Renamed(type(build("mixtral"))):  # type: ignore[misc]
        """Adds three times its auxiliary loss, under no name."""

        def forward(self, input_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
            output = super().forward(input_ids=input_ids, output_router_logits=True, **rest)
            if labels is not None:
                own = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
                output.loss = own + 3.21 * output.aux_loss
            return output

    found = install_head(Renamed(build("mixtral").config).eval())
    verify_head(found)
    assert found.extra.aux_weight == pytest.approx(3.21, rel=1e-4)


def test_a_z_loss_is_carried() -> None:
    """On the rows that bear loss: the model itself counts every position."""
    model, plain, data = (
        install_head(build("bamba")),
        install_head(build("bamba", z_loss_coefficient=0.0)),
        batch(),
    )
    assert (model.extra.z_loss, plain.extra.z_loss) == (0.03, 0.0)
    verify_head(model)
    ours, none = model(**data), plain(**data)
    torch.testing.assert_close(ours.loss - none.loss, 0.03 * none.lse.square().mean(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


class Around(LlamaForCausalLM):
    """A Llama with something of its own between hidden states, head and logits."""

    def before(self, hidden: Tensor) -> Tensor:
        return hidden

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def added(self, logits: Tensor) -> Tensor:
        return logits.new_zeros(())

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **rest: Any
    ) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = self.after(self.lm_head(self.before(output.last_hidden_state)))
        if labels is not None:
            own = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            output.loss = own + self.added(output.logits)
        return output


def around(**methods: Any) -> Any:
    torch.manual_seed(0)
    model = type("Around", (Around,), methods)(tiny.causal_lm("llama").config).eval()
    nn.init.normal_(model.lm_head.weight)
    return model


def test_what_happens_before_the_head_is_the_models_own() -> None:
    """A scale of the hidden states under no key that we know, as MiniCPM has it."""
    model = install_head(around(before=lambda self, hidden: hidden / 3))
    verify_head(model)
    data = batch()
    logits = model.base(data["input_ids"], attention_mask=data["attention_mask"]).logits.flatten(0, 1)
    own = F.cross_entropy(logits[data["rows"]], data["target"])
    torch.testing.assert_close(model(**data).loss, own, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("cap, scale", [(7.3, 1.0), (None, 0.0123), (41.0, 0.31)])
def test_unnamed_scale_and_cap_are_measured(cap: float | None, scale: float) -> None:
    def after(self: Any, logits: Tensor) -> Tensor:
        return scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)

    model = install_head(around(after=after))
    assert model.head.logit_scale == pytest.approx(scale, rel=1e-5)
    assert model.head.softcap == (None if cap is None else pytest.approx(cap, rel=1e-5))
    verify_head(model)


@pytest.mark.parametrize(
    "after, message",
    [
        (lambda self, x: x.sign() * x.abs() ** 1.1, "neither a scale nor a cap"),
        (
            lambda self, x: x.index_fill(-1, torch.tensor([5]), -1e4),
            r"neither a scale nor a cap \(.* first seen at token 5\)",
        ),
        (lambda self, x: x.clamp(-30, 30), "neither a scale nor a cap"),
        (lambda self, x: x.log_softmax(-1), "neither a scale nor a cap"),
        (lambda self, x: 0 * x, "neither a scale nor a cap"),
        (
            lambda self, x: x[..., :-1],
            "expected Around to give 61 logits a token, as many as its head has rows",
        ),
    ],
)
def test_other_heads_are_refused_with_the_reason(after: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        install_head(around(after=after))


def test_an_unknown_part_of_the_loss_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"it adds .* neither an auxiliary loss that it returns nor a z-loss"
    ):
        install_head(around(added=lambda self, logits: logits.abs().mean()))


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = AutoConfig.for_model("bert", **tiny.SHARED, intermediate_size=24, is_decoder=False)
    with pytest.raises(ValueError, match="expected BertLMHeadModel to be causal, got logits that move"):
        install_head(AutoModelForCausalLM.from_config(config).eval())


def test_a_model_that_cannot_run_is_refused_with_its_error() -> None:
    def before(self: Any, hidden: Tensor) -> Tensor:
        raise RuntimeError("needs a kernel\nand more")

    with pytest.raises(
        ValueError, match=r"expected Around to read 12 tokens on cpu, got RuntimeError: needs a kernel$"
    ):
        install_head(around(before=before))


def test_measuring_leaves_no_trace() -> None:
    model = build("llama").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = install_head(model)
    assert model.training and found.training
    assert all(torch.equal(p, before[name]) for name, p in found.base.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    found(**batch())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(found, SFTMixModel) and measure(model.eval()).head == "lm_head"
