"""``SFTMixTrainer``: a step is one of our own loop, through TRL's real trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from sftmix.model.causal_lm import install_head
from sftmix.scores.dynamics import read_dynamics, write_dynamics
from sftmix.training.metrics import read_metrics
from sftmix.training.runs import train_pairs, train_plain
from sftmix.trl import SFTMixConfig, SFTMixTrainer
from tests.recipe import tiny
from tests.recipe.trl.small import EXAMPLES, FLAGS, OPTIONS, assert_close, config, dataset, trainer, weights

SPLIT = tiny.halves(dict(EXAMPLES))


def ours(folder: Path, *flags: str, kind: str = "llama") -> Any:
    model = tiny.model(kind)
    train_pairs(tiny.config(*FLAGS, *flags), model, EXAMPLES, SPLIT, folder=folder)
    return model


def logged(found: SFTMixTrainer, key: str) -> list[float]:
    return [record[key] for record in found.state.log_history if key in record and "eval_loss" not in record]


@pytest.mark.parametrize("lam", ["pair", "token", "batch"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])  # untied, tied with a softcap, tied
def test_steps_are_those_of_our_own_loop(tmp_path: Path, kind: str, lam: str) -> None:
    """All steps of two epochs, the last of each with an odd number: weights, losses, shares, norms."""
    model = ours(tmp_path / "ours", f"mixup.lam={lam}", kind=kind)
    records = read_metrics(tmp_path / "ours" / "metrics.jsonl")
    found = trainer(tmp_path / "trl", model=tiny.causal_lm(kind), mixup_lam=lam)
    found.train()
    assert_close(
        weights(found.model),
        {
            n.removeprefix(
                "model.",
            ): p
            for n, p in weights(model).items()
        },
        2e-5,
    )
    for key, own in (("loss", "loss"), ("grad_norm", "grad_norm")):
        assert logged(found, key) == pytest.approx([r[own] for r in records], rel=2e-5), key
    for key, own in (
        ("mean_token_accuracy", "token_accuracy"),
        ("ntp_loss", "ntp_loss"),
        ("mixup_loss", "mixup_loss"),
    ):
        assert logged(found, key) == pytest.approx([r[own] for r in records], rel=2e-5), key


@pytest.mark.parametrize(
    "knobs",
    [
        {"schedule": "cosine", "warmup_ratio": 0.3},
        {"ntp_weight": 0.0, "weight": 1.0},
        {"ntp_weight": 0.5, "pairing": "length", "schedule": "linear"},
    ],
)
def test_every_knob_of_the_mixup_term_does_what_it_does_in_our_loop(
    tmp_path: Path, knobs: dict[str, Any]
) -> None:
    model = ours(tmp_path / "ours", *(f"mixup.{name}={value}" for name, value in knobs.items()))
    records = read_metrics(tmp_path / "ours" / "metrics.jsonl")
    found = trainer(tmp_path / "trl", **{f"mixup_{name}": value for name, value in knobs.items()})
    found.train()
    assert logged(found, "loss") == pytest.approx([r["loss"] for r in records], rel=2e-5)
    own = {name.removeprefix("model."): value for name, value in weights(model).items()}
    assert_close(weights(found.model), own, 2e-5)


def test_an_online_reference_trains_next_token_whatever_comes_after_it(tmp_path: Path) -> None:
    for name, changes in (("usual", {}), ("alone", {"mixup_ntp_weight": 0.0})):
        trainer(tmp_path / name, reference="online", **changes).train()
    usual, alone = (
        read_dynamics(tmp_path / name / "reference" / "dynamics.parquet") for name in ("usual", "alone")
    )
    assert (usual.nll_sum == alone.nll_sum).all()


def test_online_scores_are_those_of_our_own_loop(tmp_path: Path) -> None:
    """Of next-token training, which is what a reference run is."""
    rows = train_plain(
        tiny.config(*FLAGS, "reference.epochs=2"), tiny.model(), EXAMPLES, folder=tmp_path / "ours"
    )
    found = trainer(tmp_path / "trl", reference="online", reference_epochs=2)
    found.train()
    write_dynamics(tmp_path / "ours.parquet", rows)
    one, other = (
        read_dynamics(tmp_path / "ours.parquet"),
        read_dynamics(tmp_path / "trl" / "reference" / "dynamics.parquet"),
    )
    assert one.examples == other.examples and (one.num_tokens == other.num_tokens).all()
    torch.testing.assert_close(torch.tensor(other.nll_sum), torch.tensor(one.nll_sum), rtol=1e-4, atol=1e-4)
    assert (one.step == other.step).all() and (one.top1_share == other.top1_share).all()


def test_the_reference_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """With online scores the trained weights are those of a trainer that was given the scores, to the bit."""
    found = trainer(tmp_path / "online", reference="online")
    found.train()
    again = trainer(tmp_path / "given", dynamics=str(tmp_path / "online" / "reference" / "dynamics.parquet"))
    again.train()
    assert_close(weights(found.model), weights(again.model), 0)
    assert sorted(found.split.confident) == sorted(again.split.confident)
    third = trainer(tmp_path / "online", reference="online")  # the scores are there
    third.train()
    assert_close(weights(third.model), weights(again.model), 0)


def test_from_dynamics_takes_a_file_and_scores(tmp_path: Path) -> None:
    trainer(tmp_path / "a", reference="online").train()
    path = tmp_path / "a" / "reference" / "dynamics.parquet"
    arguments = {"model": tiny.causal_lm(), "args": config(tmp_path / "b"), "train_dataset": dataset()}
    tokenizer = tiny.tokenizer()
    one = SFTMixTrainer.from_dynamics(path, processing_class=tokenizer, **arguments)
    arguments["model"] = tiny.causal_lm()
    other = SFTMixTrainer.from_dynamics(read_dynamics(path), processing_class=tokenizer, **arguments)
    assert one.split.confident == other.split.confident and len(one.split.confident) == 11


def test_mixup_weight_zero_is_next_token_training(tmp_path: Path) -> None:
    model = ours(tmp_path / "ours", "train.method=ntp")
    found = trainer(tmp_path / "trl", mixup_weight=0.0)
    found.train()
    assert_close(weights(found.model), {n.removeprefix("model."): p for n, p in weights(model).items()}, 2e-5)


@pytest.mark.parametrize("way", ["checkpointing", "workers", "padding_free", "accumulation"])
def test_ways_of_training_give_the_same_weights(tmp_path: Path, way: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "checkpointing": {"gradient_checkpointing": True},
        "workers": {"dataloader_num_workers": 2},
        "padding_free": {"padding_free": True, "max_length": None},
        "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    }
    plain, other = trainer(tmp_path / "plain"), trainer(tmp_path / way, **changes[way])
    plain.train()
    other.train()
    assert_close(weights(other.model), weights(plain.model), 0 if way == "workers" else 2e-5)


@pytest.mark.parametrize("step", [1, 3, 4])  # in the first epoch, at its end, in the second
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, step: int) -> None:
    """Data, lambda, weights and the scores of every epoch."""
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    again = trainer(tmp_path / "again", save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert (checkpoint / "dynamics.parquet").exists()
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_close(weights(again.model), weights(whole.model), 0)
    assert again.dynamics_rows == whole.dynamics_rows and len(again.dynamics_rows) == 2 * len(EXAMPLES)
    assert (tmp_path / "again" / "dynamics.parquet").read_bytes() == (
        tmp_path / "whole" / "dynamics.parquet"
    ).read_bytes()


@pytest.mark.parametrize(
    "changes, epochs", [({"dataloader_drop_last": True}, 0), ({"max_steps": 4}, 1), ({"max_steps": 1}, 0)]
)
def test_an_epoch_that_is_not_whole_has_no_scores(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], epochs: int
) -> None:
    """Whether batches are dropped or the run ends in the middle: said, and the training ends well."""
    found = trainer(tmp_path, **changes)
    found.train()
    assert len(found.dynamics_rows) == epochs * len(EXAMPLES)
    assert (tmp_path / "dynamics.parquet").exists() == (epochs > 0)
    assert "of 22 examples were met in epoch" in "".join(capfd.readouterr())


@pytest.mark.parametrize("way", ["compile", "neftune", "bfloat16", "best", "batch_size"])
def test_trainers_own_options_hold(tmp_path: Path, way: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        "neftune": {"neftune_noise_alpha": 5.0},
        "bfloat16": {"bf16": True},
        "best": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
                 "save_steps": 2, "eval_dataset": dataset()},
        "batch_size": {"auto_find_batch_size": True},
    }  # fmt: skip
    plain, found = trainer(tmp_path / "plain"), trainer(tmp_path / way, **changes[way])
    plain.train()
    found.train()
    if way in ("compile", "batch_size"):
        assert_close(weights(found.model), weights(plain.model), 2e-5)
    else:
        assert logged(found, "loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=0.02)
    assert len(found.dynamics_rows) == 2 * len(EXAMPLES)


def test_what_it_saves_is_a_plain_model(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    found.train()
    found.save_model(str(tmp_path / "model"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(plain.lm_head) is torch.nn.Linear
    assert_close(weights(plain), weights(found.model), 0)


def test_adapters_train_and_are_saved(tmp_path: Path) -> None:
    base = tiny.causal_lm()
    before = weights(base)
    found = trainer(tmp_path, model=base, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    found.train()
    changed = [
        name for name, value in weights(found.model).items() if "lora_B" in name and value.abs().max() > 0
    ]
    assert changed and not any("lm_head" in name for name in changed)
    for name, value in before.items():
        now = dict(found.model.get_base_model().named_parameters())
        key = next(k for k in now if k.replace(".base_layer", "") == name)
        assert torch.equal(now[key], value), name
    found.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # untied, tied: peft trains a copy
def test_a_head_that_peft_trains_whole_is_trained(tmp_path: Path, kind: str) -> None:
    """``modules_to_save``: the copy that trains bears the loss and is saved; the base stays as it was."""
    base = tiny.causal_lm(kind)
    before = weights(base)
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = trainer(tmp_path, model=base, peft_config=settings)
    found.train()
    copied = found.model.base_model.model.lm_head
    assert torch.equal(
        copied.original_module.weight, before.get("lm_head.weight", before["model.embed_tokens.weight"])
    )
    moved = (copied.modules_to_save["default"].weight - copied.original_module.weight).abs().max()
    assert moved > 0.01
    found.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(tiny.causal_lm(kind), tmp_path / "adapter").eval()
    ids = torch.arange(7, 27).view(2, 10)
    torch.testing.assert_close(again(ids).logits, found.model.eval()(ids).logits, rtol=0, atol=0)


def test_adapters_on_a_head_that_is_not_ours_yet_are_refused(tmp_path: Path) -> None:
    settings = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):  # by TRL itself
        trainer(tmp_path, model=tiny.causal_lm(), peft_config=settings)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM to have a head without adapters before ours is there"
    ):
        install_head(get_peft_model(tiny.causal_lm(), settings).get_base_model())


def test_evaluation_is_the_next_token_loss_without_logits(tmp_path: Path) -> None:
    found = trainer(tmp_path, eval_dataset=dataset(), per_device_eval_batch_size=22)
    result = found.evaluate()
    model, expected = tiny.causal_lm(), []
    with torch.no_grad():
        for example in EXAMPLES.values():
            ids = torch.tensor([example.input_ids])
            logits = model(ids).logits[0, :-1]
            target = ids[0, 1:]
            nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            expected.append(nll[torch.tensor(example.supervised[1:])])
    assert result["eval_loss"] == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)
    assert {"eval_mean_token_accuracy", "eval_entropy"} <= result.keys()


def test_what_trl_logs_is_logged_and_ours_beside_it(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    found.train()
    first = found.state.log_history[0]
    wanted = {"loss", "entropy", "mean_token_accuracy", "num_tokens", "ntp_loss", "mixup_loss", "mixed_share"}
    assert wanted <= first.keys()
    assert 0 < first["entropy"] < 61 and 0 < first["mixed_share"] <= 1
    assert first["num_tokens"] == sum(
        len(EXAMPLES[place.name].input_ids) for place in found.get_train_dataloader().dataset.places(0)[:8]
    )


def test_ids_without_a_column_are_hashes_of_the_tokens(tmp_path: Path) -> None:
    found = trainer(tmp_path, rows=dataset(ids=False), reference="online")
    assert len(found.examples) == len(EXAMPLES)
    same = trainer(tmp_path, rows=dataset(dict(reversed(EXAMPLES.items())), ids=False), reference="online")
    assert set(same.examples) == set(found.examples)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"packing": True}, "packing: expected False"),
    ({"loss_type": "dft"}, "loss_type: expected 'nll'"),
    ({"per_device_train_batch_size": 3}, "per_device_train_batch_size: expected an even number"),
    ({"mixup_weight": -1.0}, "mixup_weight: expected"),
    ({"mixup_alpha": 0.0}, "mixup_alpha: expected"),
    ({"mixup_lam": "row"}, "mixup_lam: expected one of pair, token, batch"),
    ({"reference": "offline"}, "reference: expected 'online' or None"),
    ({"reference": "online", "reference_epochs": 0}, "reference_epochs: expected at least 1"),
    ({"use_liger_kernel": True}, "use_liger_kernel: expected False"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_it_cannot_be_beside_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_scores_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dynamics: expected scores of the training examples"):
        SFTMixTrainer(
            tiny.causal_lm(), config(tmp_path), train_dataset=dataset(), processing_class=tiny.tokenizer()
        )
    trainer(tmp_path / "a", reference="online").train()
    more = tiny.examples(24, longest=20)
    path = str(tmp_path / "a" / "reference" / "dynamics.parquet")
    with pytest.raises(
        ValueError,
        match=r"dynamics: expected every training example, .* 2 of 24 are missing, e\.g\. e022",
    ):
        trainer(tmp_path / "b", rows=dataset(more), dynamics=path)
    twice = dataset().select([0, 1, 1])
    with pytest.raises(ValueError, match="id: expected every id once, got 'e001' in rows 1 and 2"):
        trainer(tmp_path / "c", rows=twice, reference="online")
    with pytest.raises(ValueError, match="args: expected an SFTMixConfig, got SFTConfig"):
        SFTMixTrainer(tiny.causal_lm(), SFTConfig(str(tmp_path), **OPTIONS), train_dataset=dataset())
    assert SFTMixConfig(str(tmp_path), **OPTIONS).mixup_weight == 0.2


def test_fewer_examples_than_scores_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path / "a", reference="online").train()
    capfd.readouterr()
    fewer = dict(list(EXAMPLES.items())[:10])
    path = tmp_path / "a" / "reference" / "dynamics.parquet"
    found = trainer(tmp_path / "b", rows=dataset(fewer), dynamics=path)
    assert "12 scored examples are not among those that train" in "".join(capfd.readouterr())
    assert len(found.split.confident) == len(found.split.unconfident) == 5
