"""The training loop against hand-written steps, and its promises about batches, counts and resuming."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sftmix.config import LoraConfig
from sftmix.evaluation.figures import score_examples
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.lora import apply_lora
from sftmix.scores.dynamics import read_dynamics, write_dynamics
from sftmix.training import trainer as trainer_module
from sftmix.training.batch import blank_batch, collate_pairs
from sftmix.training.checkpoint import complete_checkpoints
from sftmix.training.metrics import Record, read_metrics
from sftmix.training.pairs import epoch_pairs
from sftmix.training.plan import plain_entries, plan_steps, point_steps
from sftmix.training.randomness import seed_chunk
from sftmix.training.runs import train_pairs, train_plain
from sftmix.training.trainer import Trainer
from tests.recipe import tiny

EXAMPLES = tiny.examples(21)
SPLIT = tiny.halves(EXAMPLES)


def run(folder: Path, *flags: str, model: SFTMixModel | None = None, progress: Any = None) -> Trainer:
    model = tiny.model() if model is None else model
    return train_pairs(tiny.config(*flags), model, EXAMPLES, SPLIT, folder=folder, progress=progress)


def same(one: Trainer, other: Trainer) -> bool:
    a, b = tiny.weights(one.model), tiny.weights(other.model)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(one: Trainer, other: Trainer, tolerance: float) -> None:
    a, b = tiny.weights(one.model), tiny.weights(other.model)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def test_one_step_is_the_papers_equation(tmp_path: Path) -> None:
    """Against plain torch: full logits, soft labels on mixed hidden states, clipping, AdamW."""
    flags = ("train.max_steps=1", "optim.schedule=constant", "optim.warmup_ratio=0", "mixup.weight=0.3")
    trainer = run(tmp_path, *flags)
    model = tiny.causal_lm()
    pairs = epoch_pairs(SPLIT, seed=0, epoch=0, alpha=0.5)[:4]
    ntp, mixup, num_tokens, num_mixed = torch.zeros(()), torch.zeros(()), 0, 0
    for pair in pairs:
        parts = []
        for name in (pair.confident, pair.unconfident):
            example = EXAMPLES[str(name)]
            ids = torch.tensor([example.input_ids])
            hidden = model.model(ids).last_hidden_state[0]
            kept = [t for t, loss in enumerate(example.supervised) if loss]
            z, y = hidden[[t - 1 for t in kept]], ids[0, kept]
            ntp = ntp + F.cross_entropy(model.lm_head(z), y, reduction="sum")
            num_tokens += len(kept)
            parts.append((z, F.one_hot(y, tiny.VOCAB).float()))
        (z_c, y_c), (z_u, y_u) = parts
        size = min(len(z_c), len(z_u))
        z_x = pair.lam * z_c[:size] + (1 - pair.lam) * z_u[:size]
        y_x = pair.lam * y_c[:size] + (1 - pair.lam) * y_u[:size]
        mixup = mixup - (y_x * model.lm_head(z_x).log_softmax(-1)).sum()
        num_mixed += size
    loss = ntp / num_tokens + 0.3 * mixup / num_mixed
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": decayed, "weight_decay": 0.1}]
    groups.append({"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0})
    torch.optim.AdamW(groups, lr=0.01).step()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["ntp_loss"] == pytest.approx(ntp.item() / num_tokens, rel=1e-6)
    assert record["mixup_loss"] == pytest.approx(mixup.item() / num_mixed, rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert (record["num_tokens"], record["num_mixed"]) == (num_tokens, num_mixed)
    found = dict(trainer.model.base.named_parameters())
    for name, parameter in model.named_parameters():
        # Adam divides by the gradient's size, so where it is almost 0 its rounding error is all there is.
        assert parameter.grad is not None
        clear = parameter.grad.abs() > 1e-6
        torch.testing.assert_close(found[name][clear], parameter[clear], rtol=0, atol=2e-5, msg=name)


def test_no_mixup_weight_is_bit_for_bit_next_token_training(tmp_path: Path) -> None:
    ntp = run(tmp_path / "ntp", "train.method=ntp")
    zero = run(tmp_path / "zero", "train.method=sftmix", "mixup.weight=0")
    mixed = run(tmp_path / "mixed", "train.method=sftmix")
    assert same(ntp, zero)
    assert not same(ntp, mixed)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ntp", "zero", "mixed")]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    for a, b in zip(records[0], records[2], strict=True):  # the baseline draws the same batches
        assert (a["num_tokens"], a["num_mixed"], a["lr"]) == (b["num_tokens"], b["num_mixed"], b["lr"])
        assert a["mixup_loss"] is None
        assert b["mixup_loss"] > 0


def test_no_mixup_weight_gives_the_gradients_of_a_batch_without_pairs() -> None:
    pairs = epoch_pairs(SPLIT, seed=0, epoch=0, alpha=0.5)[:3]
    items = [(EXAMPLES[p.confident], EXAMPLES[str(p.unconfident)], p.lam) for p in pairs]
    batch = collate_pairs(items, pad_id=0)
    gradients = []
    for lam in (batch.lam, None):
        model = tiny.model()
        inputs = (batch.input_ids, batch.attention_mask, batch.rows, batch.target, lam)
        model(*inputs, mixup_weight=0.0).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", ["sftmix", "ntp"])
def test_accumulated_micro_batches_make_the_step_of_one_large_batch(tmp_path: Path, method: str) -> None:
    """Lengths differ, so dividing by micro-batches in place of tokens would be far off."""
    flags = (f"train.method={method}", "optim.eps=1e-3")
    whole = run(tmp_path / "8", *flags, "train.micro_batch_size=8")
    for size in (2, 4):
        parts = run(tmp_path / str(size), *flags, f"train.micro_batch_size={size}")
        assert_close(parts, whole, 1e-6)


@pytest.mark.parametrize("lam", ["token", "batch"])
def test_lambda_per_token_and_per_batch_accumulate_too(tmp_path: Path, lam: str) -> None:
    flags = (f"mixup.lam={lam}", "optim.eps=1e-3")
    whole = run(tmp_path / "8", *flags, "train.micro_batch_size=8")
    assert_close(run(tmp_path / "2", *flags, "train.micro_batch_size=2"), whole, 1e-6)
    assert not same(whole, run(tmp_path / "pair", "optim.eps=1e-3", "train.micro_batch_size=8"))


def test_every_example_is_trained_once_an_epoch(tmp_path: Path) -> None:
    """21 examples in steps of 8: the last step, short and with an unpaired example, is not dropped."""
    run(tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[2]["epoch"] == 1.0
    total = sum(example.num_supervised for example in EXAMPLES.values())
    assert sum(r["num_tokens"] for r in records[:3]) == sum(r["num_tokens"] for r in records[3:]) == total
    assert all(r["seconds"] > 0 and 0 <= r["token_accuracy"] <= 1 for r in records)


def test_a_blank_batch_gives_zero_loss_and_zero_gradients() -> None:
    model = tiny.model()
    batch = blank_batch(pad_id=0)
    result = model(
        batch.input_ids, batch.attention_mask, batch.rows, batch.target, batch.lam, ntp_denominator=5
    )
    result.loss.backward()
    assert result.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    def progress(done: int, total: int, record: Record) -> None:
        if done == step:
            raise Killed

    return progress


def dropout_model() -> SFTMixModel:
    return tiny.model("gpt2", resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.0)


MODELS = {
    "full": tiny.model,
    "bfloat16": lambda: tiny.model(dtype=torch.bfloat16),
    "tied": lambda: tiny.model("qwen3"),
    "dropout": dropout_model,
    "lora": lambda: apply_lora(tiny.model(), LoraConfig(rank=2, dropout=0.3)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Killed in the second epoch, it starts again from the end of the first; a caller's seed changes nothing."""
    flags = ("train.tuning=lora",) if kind == "lora" else ()
    torch.manual_seed(7)
    whole = run(tmp_path / "whole", *flags, model=MODELS[kind]())
    torch.manual_seed(9)
    with pytest.raises(Killed):
        run(tmp_path / "killed", *flags, model=MODELS[kind](), progress=kill_at(5))
    torch.manual_seed(8)
    again = run(tmp_path / "killed", *flags, model=MODELS[kind]())
    assert (again.first_step, again.step) == (3, 6)
    assert same(whole, again)
    assert all(torch.equal(whole.weights.masters[n], again.weights.masters[n]) for n in whole.weights.masters)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert [r["step"] for r in records[1]] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]


@pytest.mark.parametrize("kind", ["dropout", "lora"])
def test_the_seed_decides_dropout_and_the_caller_keeps_his_random_states(tmp_path: Path, kind: str) -> None:
    """Weights of one order of pairs and lambdas, with other dropout: the mask follows the seed, stage and step."""
    flags = ("train.tuning=lora",) if kind == "lora" else ()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    one = run(tmp_path / "one", *flags, model=MODELS[kind]())
    drawn = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(3)
    MODELS[kind]()
    expected_torch = torch.rand(1).item()
    random.seed(3)
    np.random.seed(3)
    assert drawn == (expected_torch, random.random(), np.random.rand())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "seed_chunk", lambda seed, *at: seed_chunk(seed + 1, *at))
        other = run(tmp_path / "other", *flags, model=MODELS[kind]())
    assert not same(one, other)


def test_dropout_differs_between_stages_steps_and_chunks() -> None:
    draws = set()
    for key in [
        (0, "a", 0, 0),
        (1, "a", 0, 0),
        (0, "b", 0, 0),
        (0, "a", 1, 0),
        (0, "a", 0, 1),
        (0, "a", 10, 1),
    ]:
        seed_chunk(*key)
        draws.add((torch.rand(1).item(), random.random(), np.random.rand()))
    assert len({d[0] for d in draws}) == len({d[1] for d in draws}) == len({d[2] for d in draws}) == 6


def test_an_auxiliary_loss_is_trained_and_recorded(tmp_path: Path) -> None:
    """In chunks as the mean over the step by tokens; the record's parts add up to its loss."""

    def moe() -> SFTMixModel:
        return tiny.model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)

    with_aux = run(tmp_path / "aux", model=moe())
    without = run(tmp_path / "none", model=tiny.model("mixtral"))
    assert not same(with_aux, without)
    first = read_metrics(tmp_path / "aux" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(
        first["ntp_loss"] + 0.2 * first["mixup_loss"] + 0.5 * first["aux_loss"]
    )
    assert first["ntp_loss"] == pytest.approx(
        read_metrics(tmp_path / "none" / "metrics.jsonl")[0]["ntp_loss"]
    )
    with pytest.raises(
        ValueError, match=r"belongs to another run: train.micro_batch_size is 4 there, 8 here"
    ):
        run(tmp_path / "aux", "train.micro_batch_size=8", model=moe())


def test_a_padding_token_outside_the_vocabulary_is_replaced(tmp_path: Path) -> None:
    folders = [run_padded(tmp_path / str(pad), pad) for pad in (0, tiny.VOCAB + 5, -1)]
    assert same(folders[0], folders[1]) and same(folders[0], folders[2])


def run_padded(folder: Path, pad_id: int) -> Any:
    return train_pairs(tiny.config(), tiny.model(), EXAMPLES, SPLIT, folder=folder, pad_id=pad_id)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first = run(tmp_path)
    again = run(tmp_path, model=tiny.model())
    assert again.first_step == again.step == again.total == 6
    assert same(first, again)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6


def test_two_runs_are_bitwise_equal(tmp_path: Path) -> None:
    assert same(run(tmp_path / "a"), run(tmp_path / "b"))


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path: Path, where: str) -> None:
    model = tiny.model()

    def spoil(step: int, total: int, record: Record) -> None:
        if step == 3 and where == "loss":
            with torch.no_grad():
                model.head.weight[5, 0] = float("inf")
        elif step == 3:
            model.head.weight.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(
        ValueError, match=rf"{where}: expected a finite number at step 4, got .*; examples: e0\d\d,"
    ):
        run(tmp_path, "train.max_bad_steps=0", model=model, progress=spoil)
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, where: str, capfd: Any) -> None:
    """It is said with its examples, recorded, and changes neither weights nor moments; the run goes on."""
    model = tiny.model()
    kept: dict[str, torch.Tensor] = {}

    def spoil(step: int, total: int, record: Record) -> None:
        if step == 3:
            kept.update(tiny.weights(model))
            scale = float("nan") if where == "gradient norm" else 1.0
            kept["hook"] = model.head.weight.register_hook(lambda gradient: gradient * scale)  # type: ignore[assignment]
            if where == "loss":
                model.base.model.norm.weight.data[0] = float("nan")
        if step == 4:
            assert all(torch.equal(v, kept[n]) for n, v in tiny.weights(model).items() if "norm.w" not in n)
            kept.pop("hook").remove()  # type: ignore[operator]
            model.base.model.norm.weight.data.copy_(kept["model.model.norm.weight"])

    trainer = run(tmp_path, model=model, progress=spoil)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record.get("skipped", False) for record in records] == [False] * 3 + [True, False, False]
    assert records[3]["loss" if where == "loss" else "grad_norm"] is None
    assert f"left out, {where}: expected a finite number at step 4" in capfd.readouterr().out
    assert {float(s["step"]) for s in trainer.optimizer.state.values()} == {5.0}
    assert all(weight.isfinite().all() for weight in tiny.weights(model).values())


def test_too_many_bad_steps_in_a_row_end_the_run_also_over_a_restart(tmp_path: Path) -> None:
    model = tiny.model()
    model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    flags = ("train.max_bad_steps=3", "train.checkpoint_every=1 steps")
    with pytest.raises(ValueError, match="gradient norm: expected a finite number at step 4"):
        run(tmp_path, *flags, model=model)
    again = tiny.model()
    again.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="at step 4"):
        run(tmp_path, *flags, model=again)
    assert run(tmp_path, *flags).step == 6


def test_only_adapters_move_under_lora(tmp_path: Path) -> None:
    model = apply_lora(tiny.model(), LoraConfig(rank=2))
    before = tiny.weights(model)
    run(tmp_path, "train.tuning=lora", model=model)
    for name, value in tiny.weights(model).items():
        assert torch.equal(value, before[name]) is (".lora_" not in name), name


def test_the_configuration_and_the_model_must_agree_on_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: expected adapters with train.tuning=lora"):
        run(tmp_path, "train.tuning=lora")
    with pytest.raises(ValueError, match=r"model: expected no adapters with train.tuning=full"):
        run(tmp_path, model=apply_lora(tiny.model(), LoraConfig(rank=2)))


def test_a_model_can_be_trained_again(tmp_path: Path) -> None:
    model = tiny.model(dtype=torch.bfloat16)
    first = tiny.weights(run(tmp_path / "a", model=model).model)
    second = tiny.weights(run(tmp_path / "b", model=model).model)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    recomputed = run(tmp_path / "recomputed", "train.gradient_checkpointing=true")
    assert_close(plain, recomputed, 1e-6)
    adapted = apply_lora(tiny.model(), LoraConfig(rank=2))
    run(tmp_path / "lora", "train.gradient_checkpointing=true", "train.tuning=lora", model=adapted)


def test_max_steps_and_log_every(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    flags = ("train.max_steps=5", "train.log_every=2")
    trainer = run(tmp_path, *flags, progress=lambda step, total, record: seen.append((step, total)))
    assert seen == [(step, 5) for step in range(1, 6)]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 5]
    assert trainer.step == 5
    assert complete_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000005"


def test_scoring_points_are_evenly_spaced() -> None:
    assert point_steps(9, 3) == [3, 6, 9]
    assert point_steps(10, 3) == [4, 7, 10]
    assert point_steps(1, 1) == [1]
    with pytest.raises(
        ValueError, match="checkpoints_per_epoch: expected at most the epoch's 2 steps, got 3"
    ):
        point_steps(2, 3)


def test_the_reference_run_calls_its_points_and_resumes(tmp_path: Path) -> None:
    config = tiny.config("reference.checkpoints_per_epoch=3")
    points: list[tuple[int, int]] = []
    modes: list[bool] = []
    model = tiny.model()

    def on_point(index: int, step: int) -> None:
        points.append((index, step))
        modes.append(model.training)

    rows = train_plain(config, model, EXAMPLES, folder=tmp_path / "whole", on_point=on_point)
    assert points == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert not any(modes)
    with pytest.raises(Killed):
        train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "killed", progress=kill_at(5))
    again = train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "killed")
    assert again == rows


def test_online_dynamics_are_the_scores_of_the_steps(tmp_path: Path) -> None:
    """Without learning they equal the scores of the model as it is; every example at every epoch."""
    config = tiny.config("optim.lr=1e-30", "optim.weight_decay=0")
    model = tiny.model()
    expected = score_examples(model, list(EXAMPLES.values()), checkpoint=0, step=3)
    rows = train_plain(config, model, EXAMPLES, folder=tmp_path)
    assert len(rows) == 2 * len(EXAMPLES)
    for row, score in zip(rows[: len(EXAMPLES)], expected, strict=True):
        close = pytest.approx(score["nll_sum"], rel=1e-5)
        assert row == {**score, "nll_sum": close, "source": "online"}
    write_dynamics(tmp_path / "dynamics.parquet", rows)
    assert read_dynamics(tmp_path / "dynamics.parquet", "online").num_checkpoints == 2


def test_a_bad_token_is_refused_before_the_forward(tmp_path: Path) -> None:
    bad = dict(EXAMPLES)
    name = min(bad)
    bad[name] = type(bad[name])(name, (*bad[name].input_ids[:-1], tiny.VOCAB), bad[name].supervised)
    with pytest.raises(ValueError, match=r"expected values in \[0, V=61\)"):
        train_pairs(tiny.config(), tiny.model(), bad, SPLIT, folder=tmp_path)


def test_batches_go_where_sharding_put_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes a model is read on the CPU, and ``shard`` moves it to the GPU, here the meta device."""
    real = trainer_module.shard

    def moving(model: SFTMixModel, *args: Any, **options: Any) -> SFTMixModel:
        found = real(model, *args, **options)
        monkeypatch.setattr(SFTMixModel, "device", property(lambda self: torch.device("meta")))
        return found

    monkeypatch.setattr(trainer_module, "shard", moving)
    examples = tiny.examples(8)
    steps = plan_steps(
        plain_entries(sorted(examples)), examples, epoch=0, batch_size=8, micro_batch_size=4
    )  # fmt: skip
    made = Trainer(
        tiny.config(), tiny.model(), examples, tmp_path, plan=lambda epoch: steps, epochs=1, mixup_weight=0.0,
        stage="reference",
    )  # fmt: skip
    assert made.device.type == "meta"
