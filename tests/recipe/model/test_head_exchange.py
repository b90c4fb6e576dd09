"""A head that is exchanged, not gathered: the steps of one process, FSDP2's optimizer, clipping and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sftmix.config import LoraConfig
from sftmix.evaluation.figures import evaluate_model
from sftmix.model.head_exchange import exchanges_head, head_traffic, why_gathered
from sftmix.model.lora import apply_lora
from sftmix.model.parallel import World, shard
from sftmix.training.metrics import read_metrics
from tests import parity
from tests.kernels.ranks import launch
from tests.once import made_once
from tests.recipe import tiny
from tests.recipe.model.head_exchange_ranks import MODES, gradients, model_of, train
from tests.recipe.model.two_processes import examples


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of two processes."""
    folder = made_once(
        tmp_path_factory,
        "head_exchange",
        lambda folder: launch("tests.recipe.model.head_exchange_ranks", folder, 2),
    )
    assert (folder / "rank0.pt").is_file(), "the two processes failed: see the test that ran them"
    return folder


def results(out: Path) -> list[dict[Any, Any]]:
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


def weights(folder: Path) -> dict[str, Tensor]:
    return tiny.saved(folder / "weights", dict(tiny.model("llama").named_parameters()))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-6 of each tensor's largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].float() - value.float()).abs().max()
        assert error <= 1e-6 * value.abs().max(), f"{name}: {error / value.abs().max():.2e}"


@pytest.mark.parametrize("mode", MODES)
def test_two_steps_are_those_of_one_process(out: Path, tmp_path: Path, mode: str) -> None:
    """Weights and metrics, the norm that clips them among these; a short step leaves a process without rows."""
    model = train(None, tmp_path, "train.max_steps=2")
    start = dict(tiny.model("llama").named_parameters())
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert max((value - start[name]).abs().max() for name, value in expected.items()) > 1e-3
    assert_equal(weights(out / mode), expected)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, out / mode))
    for key in ("loss", "ntp_loss", "mixup_loss", "grad_norm", "token_accuracy", "num_tokens", "num_mixed"):
        assert [r[key] for r in theirs] == pytest.approx([r[key] for r in ours], rel=1e-6)
    assert ours[0]["grad_norm"] > 1  # so it was clipped
    found = results(out)[0]
    assert found[mode, "evaluation"] == pytest.approx(
        evaluate_model(model, list(examples().values())), rel=1e-5
    )
    with torch.no_grad():
        logits = model.logits(torch.arange(8, 20).view(1, -1))
    for each in results(out):
        torch.testing.assert_close(each[mode, "logits"], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_within_the_contract(out: Path, mode: str, dtype: str) -> None:
    """float32 shards under a bfloat16 model, ragged rows and pairs, a process without rows in its second call."""
    truth = gradients(model_of(None, dtype), (0, 1, 2, 3), torch.float64)
    same = gradients(model_of(None, dtype), (0, 1, 2, 3))
    found = results(out)[0][mode, dtype]
    assert found.keys() == truth.keys()
    # One draw of all parameters, each at a scale of its own: an error of one alone is luck.
    scales = {name: value.norm() for name, value in truth.items()}
    parts = (
        torch.cat([each[name].double().flatten() / scales[name] for name in truth])
        for each in (found, same, truth)
    )
    ours, torch_s, exact = parts
    kind = getattr(torch, dtype)
    rounded = ours.to(kind) if dtype == "bfloat16" else ours.float()
    parity.assert_within_contract("gradients", rounded, torch_s, exact)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_an_exchanged_head_goes_on_either_way(out: Path, tmp_path: Path, mode: str) -> None:
    model = train(None, tmp_path, "train.max_steps=4")
    assert_equal(weights(out / f"resumed-{mode}"), {name: p.detach() for name, p in model.named_parameters()})


def test_no_process_holds_more_than_its_rows(out: Path) -> None:
    """V = 61 over two: 31 and 30; a view of a part would keep the whole in memory."""
    for rank, size in enumerate((31, 30)):
        seen = results(out)[rank]["placement"]
        assert seen["is exchanged"] and seen["in the forward"] == (True, (1, 12, 16), torch.bfloat16)
        assert seen["local"] == seen["local gradient"] == (size, 16) and seen["memory"] == size * 16 * 4
        assert seen["dtypes"] == (torch.float32, torch.float32)
        assert "model.lm_head.weight" in seen["names"]


def test_it_exports_whole(out: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(out / "export")
    ids = torch.arange(8, 20).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(ids).logits, results(out)[0]["exchange", "logits"], rtol=1e-5, atol=1e-5
        )


def test_auto_exchanges_where_it_moves_less(out: Path) -> None:
    for result in results(out):
        assert result["auto", 1] and not result["auto", 1000]


def test_traffic_is_what_the_formulas_say() -> None:
    """Llama-3.1-8B's head over 8 processes: 2,048 rows each are exchanged, 65,536 are not; one alone moves nothing."""
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "itemsize": 2}
    found = head_traffic(rows=2048, processes=8, **sizes)
    assert found.gather == 7 * 128256 * 4096 * 6 // 8
    assert found.exchange == 7 * 2048 * (4096 * 6 + 48 * 8)
    assert found.exchange < found.gather
    many = head_traffic(rows=65536, processes=8, **sizes)
    assert many.exchange > many.gather == found.gather
    assert head_traffic(rows=2048, processes=1, **sizes) == (0, 0)


def test_heads_that_must_be_gathered_are_and_say_so() -> None:
    tied, adapted, frozen = (
        tiny.model("qwen3"),
        apply_lora(tiny.model("llama"), LoraConfig(rank=2)),
        tiny.model(),
    )
    frozen.head.weight.requires_grad_(False)
    assert why_gathered(tiny.model()) is None
    for model, reason in (
        (tied, "tied to the input embedding"),
        (adapted, "with adapters"),
        (frozen, "is frozen"),
    ):
        with pytest.raises(
            ValueError, match=f"head_sharding: expected 'gather' or 'auto', got 'exchange': .*{reason}"
        ):
            shard(model, World(), head_sharding="exchange")
        assert not exchanges_head(model, "auto", processes=8, rows=1)
    with pytest.raises(ValueError, match="head_sharding: expected one of gather, exchange, auto, got 'all'"):
        shard(tied, World(), head_sharding="all")
    with pytest.raises(ValueError, match="rows: expected an int >= 0 with head_sharding='auto', got None"):
        shard(tiny.model(), World(), head_sharding="auto")
    assert not exchanges_head(tiny.model(), "auto", processes=1, rows=1)
