"""Two gloo processes under torchrun do what one process does: FSDP2, tied and untied, full and LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftmix.config import LoraConfig
from sftmix.evaluation.figures import evaluate_model
from sftmix.model.lora import apply_lora
from sftmix.model.merge import merged_state
from sftmix.model.parallel import World, join_world, local_device, shard, spread, whole
from sftmix.training.metrics import Record, read_metrics
from sftmix.training.runs import train_plain
from tests.kernels.ranks import launch as on_ranks
from tests.once import made_once
from tests.recipe import tiny
from tests.recipe.model import two_processes
from tests.recipe.model.two_processes import DTYPES, KINDS, METHODS


class Interrupted(Exception):
    pass


def stop_after(limit: int) -> object:
    def progress(step: int, total: int, record: Record) -> None:
        if step == limit:
            raise Interrupted

    return progress


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of two processes."""
    folder = made_once(tmp_path_factory, "two_processes", launch)
    assert (folder / "results.pt").is_file(), "the two processes failed: see the test that ran them"
    return folder


def launch(folder: Path) -> None:
    # 3 steps make an epoch; the fourth is interrupted, so two processes go on from a checkpoint of one.
    with pytest.raises(Interrupted):
        two_processes.train("llama", "sftmix", "float32", folder / "resumed", progress=stop_after(4))
    on_ranks("tests.recipe.model.two_processes", folder, 2)


def single(folder: Path, kind: str, method: str, dtype: str, *flags: str) -> dict[str, torch.Tensor]:
    """The float32 weights one process ends with."""
    _, trainer = two_processes.train(kind, method, dtype, folder, *flags)
    return {name: weight.detach() for name, weight in trainer.weights.masters.items()}


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tiny.saved(folder / "weights", expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_losses_equal_those_of_one_process(
    out: Path, tmp_path: Path, kind: str, method: str, dtype: str
) -> None:
    """To 1e-5 after four steps, with an idle process in the last micro-batch and a short last step."""
    name = f"{kind}-{method}-{dtype}"
    expected = single(tmp_path / name, kind, method, dtype)
    start = dict(tiny.model(kind, dtype=getattr(torch, dtype)).named_parameters())
    assert max((value - start[key].float()).abs().max() for key, value in expected.items()) > 1e-2
    assert_same(out / name, expected)
    ours, theirs = (read_metrics(folder / name / "metrics.jsonl") for folder in (tmp_path, out))
    assert [record["step"] for record in theirs] == [1, 2, 3, 4]
    for key in ("loss", "ntp_loss", "grad_norm", "token_accuracy", "num_tokens", "num_mixed", "lr"):
        assert [record[key] for record in theirs] == pytest.approx([record[key] for record in ours], abs=1e-5)


@pytest.mark.parametrize("kind", two_processes.OTHERS)
def test_dropout_auxiliary_loss_and_float32_parameters_are_those_of_one_process(
    out: Path, tmp_path: Path, kind: str
) -> None:
    """Also the exported data types: a router stays float32 on both roads."""
    flags, options = two_processes.STEPS.get(kind, ()), two_processes.OTHERS[kind]
    model, trainer = two_processes.train(kind, "sftmix", "bfloat16", tmp_path, *flags, **options)
    start = dict(tiny.model(kind, dtype=torch.bfloat16, **options).named_parameters())
    moved = [(weight - start[name].float()).abs().max() for name, weight in trainer.weights.masters.items()]
    assert max(moved) > 1e-3
    assert_same(out / f"other-{kind}", {name: w.detach() for name, w in trainer.weights.masters.items()})
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, out / f"other-{kind}"))
    for key in ("loss", "ntp_loss", "aux_loss", "grad_norm"):
        if key in ours[0]:
            assert [record[key] for record in theirs] == pytest.approx([r[key] for r in ours], abs=1e-5)
    assert ("aux_loss" in ours[0]) is (kind == "mixtral")
    plain = AutoModelForCausalLM.from_pretrained(out / f"other-{kind}" / "export")
    kept = {name for name, p in plain.named_parameters() if p.dtype == torch.float32}
    assert bool(kept) is (kind == "ernie4_5_moe")
    assert kept == {name for name, dtype in model.dtypes.items() if dtype == torch.float32}


def test_weighted_examples_give_the_weights_and_losses_of_one_process(out: Path, tmp_path: Path) -> None:
    _, trainer = two_processes.train("llama", "sftmix", "bfloat16", tmp_path, weighted=True)
    assert_same(out / "weighted", {name: w.detach() for name, w in trainer.weights.masters.items()})
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, out / "weighted"))
    for key in ("loss", "ntp_loss", "mixup_loss", "grad_norm", "num_tokens", "num_mixed"):
        assert [record[key] for record in theirs] == pytest.approx([record[key] for record in ours], abs=1e-5)
    plain = read_metrics(out / "llama-sftmix-bfloat16" / "metrics.jsonl")
    assert abs(plain[0]["loss"] - theirs[0]["loss"]) > 1e-3


def test_lambda_weights_and_their_sums_reach_the_loss_unrounded_under_the_bfloat16_policy(out: Path) -> None:
    """bfloat16 has no 3001 (it is 3008 there) and no 0.123456789; float32 has no 3001.123456789."""
    seen = torch.load(out / "results.pt")["arrivals"]
    assert seen["hidden_dtype"] == seen["weight_dtype"] == torch.bfloat16
    for name, sent in seen["sent"].items():
        assert seen[name].dtype == torch.float32, name
        assert torch.equal(seen[name], sent), name
    assert (seen["ntp_denominator"], seen["mixup_denominator"]) == (3001.123456789, 1001)
    assert seen["loss"] == pytest.approx(seen["expected"], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_weights_equal_those_of_one_process(out: Path, tmp_path: Path, dtype: str) -> None:
    assert_same(out / f"lora-{dtype}", single(tmp_path, "llama", "sftmix", dtype, "train.tuning=lora"))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_trained_whole_beside_adapters_equal_those_of_one_process(
    out: Path, tmp_path: Path, kind: str
) -> None:
    """bfloat16 weights beside float32 adapters: their gradients are summed over processes in float32."""
    model, trainer = two_processes.train(
        kind, "sftmix", "bfloat16", tmp_path, "train.tuning=lora", lora=two_processes.whole_beside(kind)
    )
    expected = {name: weight.detach() for name, weight in trainer.weights.masters.items()}
    assert len({".lora_" in name for name in expected}) == 2
    assert_same(out / f"whole-{kind}", expected)
    plain = AutoModelForCausalLM.from_pretrained(out / f"whole-{kind}" / "export")
    merged = merged_state(model)
    for name, weight in plain.state_dict().items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, merged[name], rtol=2**-7, atol=1e-4, msg=name)


def test_a_run_resumes_on_another_number_of_processes(out: Path, tmp_path: Path) -> None:
    assert torch.load(out / "results.pt")["steps after resuming"] == 1
    assert_same(out / "resumed", single(tmp_path, "llama", "sftmix", "float32"))


def test_only_one_process_writes_whole_files(out: Path) -> None:
    folder = out / "llama-sftmix-float32" / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000003", "step-00000004"]
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]


def test_a_sharded_model_exports_whole(out: Path, tmp_path: Path) -> None:
    ids = torch.arange(8, 20).view(1, -1)
    model, _ = two_processes.train("qwen3", "sftmix", "bfloat16", tmp_path / "full")
    plain = AutoModelForCausalLM.from_pretrained(out / "export")
    assert plain.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.base(ids).logits, rtol=0.02, atol=0.02)
    lora, _ = two_processes.train("llama", "sftmix", "float32", tmp_path / "lora", "train.tuning=lora")
    plain = AutoModelForCausalLM.from_pretrained(out / "lora-float32" / "export")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, lora.base(ids).logits, rtol=1e-4, atol=1e-4)


def test_evaluation_and_online_dynamics_equal_those_of_one_process(out: Path, tmp_path: Path) -> None:
    results = torch.load(out / "results.pt")
    model, _ = two_processes.train("qwen3", "sftmix", "bfloat16", tmp_path / "run")
    expected = evaluate_model(model, list(two_processes.examples().values()))
    assert results["evaluation"] == pytest.approx(expected, rel=1e-3)
    config = tiny.config("train.micro_batch_size=2", "reference.epochs=1")
    rows = train_plain(config, tiny.model("llama"), two_processes.examples(), folder=tmp_path / "plain")
    assert [row["example"] for row in results["online"]] == [row["example"] for row in rows]
    for found, row in zip(results["online"], rows, strict=True):
        assert found == {**row, "nll_sum": pytest.approx(row["nll_sum"], rel=1e-5)}


def test_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world(torch.device("cpu"))
    assert world == World(rank=0, size=1, mesh=None)
    model = apply_lora(tiny.model("llama"), LoraConfig(rank=2))
    assert shard(model, world) is model
    value = torch.ones(3)
    assert torch.equal(whole(value), spread(value, like=value))
    assert not torch.distributed.is_initialized()
    if not torch.cuda.is_available():
        assert local_device() == torch.device("cpu")
