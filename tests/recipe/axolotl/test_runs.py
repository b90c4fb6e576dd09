"""axolotl's own command, from YAML alone: what it trains is what our own loop trains on the same token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.data.tokenized import TokenizedExample
from sftmix.scores.confidence import make_split, write_split
from sftmix.scores.dynamics import read_dynamics, write_dynamics
from sftmix.training.metrics import read_metrics
from sftmix.training.runs import train_pairs, train_plain
from sftmix.transformers.pairs import examples_of
from tests.once import made_once
from tests.recipe import tiny
from tests.recipe.axolotl.runs import (
    EXAMPLES,
    FLAGS,
    assert_close,
    logged,
    options,
    prepare,
    row,
    run,
    train,
    weights,
)

pytestmark = pytest.mark.usefixtures("axolotl")


def named(examples: Mapping[str, TokenizedExample] = EXAMPLES) -> Any:
    """The examples by the ids that the trainer gives them."""
    from datasets import Dataset

    return examples_of(Dataset.from_list([row(example) for example in examples.values()]), "id")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its reference run before it, and an evaluation at the start and after each epoch."""

    def make(folder: Path) -> None:
        prepare(folder)
        told = {"test_datasets": options(folder)["datasets"], "eval_strategy": "epoch", "eval_batch_size": 17}
        train(
            folder,
            options(folder, **{**told, "test_datasets": [{**told["test_datasets"][0], "split": "train"}]}),
        )

    return made_once(tmp_path_factory, "axolotl_mixed", make)


def test_a_run_is_that_of_our_own_loop(mixed: Path, tmp_path: Path) -> None:
    """Weights, losses and their parts of every step, and whole epochs where the last step is a small one."""
    examples, model = named(), tiny.model()
    split = make_split(read_dynamics(mixed / "out" / "reference" / "dynamics.parquet"))
    train_pairs(tiny.config(*FLAGS), model, examples, split, folder=tmp_path)
    own = {name.removeprefix("model."): value for name, value in model.named_parameters()}
    assert_close(weights(mixed / "out"), own, 2e-5)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == 6
    for key in ("loss", "grad_norm", "ntp_loss", "mixup_loss"):
        ours = [
            record[key] for record in records if record[key] is not None
        ]  # a step without pairs has no Mixup
        assert logged(mixed / "out", key) == pytest.approx(ours, rel=2e-5), key
        assert len(ours) == (4 if key == "mixup_loss" else 6), key


def test_reference_scores_are_those_of_our_own_loop(mixed: Path, tmp_path: Path) -> None:
    rows = train_plain(tiny.config(*FLAGS), tiny.model(), named(), folder=tmp_path)
    write_dynamics(tmp_path / "ours.parquet", rows)
    one, other = (
        read_dynamics(p) for p in (tmp_path / "ours.parquet", mixed / "out/reference/dynamics.parquet")
    )
    assert one.examples == other.examples and (one.num_tokens == other.num_tokens).all()
    torch.testing.assert_close(torch.tensor(other.nll_sum), torch.tensor(one.nll_sum), rtol=1e-4, atol=1e-4)


def test_scores_of_every_epoch_are_left(mixed: Path) -> None:
    found = read_dynamics(mixed / "out" / "dynamics.parquet")
    assert found.num_checkpoints == 2 and sorted(found.examples) == sorted(named())


def test_evaluation_is_the_next_token_loss(mixed: Path) -> None:
    model, nll = tiny.causal_lm(), []
    with torch.no_grad():
        for example in EXAMPLES.values():
            ids = torch.tensor([example.input_ids])
            one = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            nll.append(one[torch.tensor(example.supervised[1:])])
    found = logged(mixed / "out", "eval_loss")
    assert len(found) == 3 and found[0] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)


def test_tokens_are_counted_as_axolotl_counts_them(mixed: Path) -> None:
    supervised = sum(sum(example.supervised) for example in EXAMPLES.values())
    assert logged(mixed / "out", "tokens/trainable")[-1] == 2 * supervised


@pytest.mark.parametrize(
    "way", ["dynamics", "split", "padding_free", "workers", "checkpointing", "accumulation"]
)
def test_other_ways_to_the_same_weights(mixed: Path, tmp_path: Path, way: str) -> None:
    """Scores or halves from a file, no padding, processes that load, activations made again, smaller batches."""
    scores = mixed / "out" / "reference" / "dynamics.parquet"
    write_split(tmp_path / "split.parquet", make_split(read_dynamics(scores)))
    given = {"dynamics": str(scores)}
    changes: dict[str, dict[str, Any]] = {
        "dynamics": {}, "split": {"sftmix": {"split": str(tmp_path / "split.parquet")}},
        "padding_free": {"sftmix": {**given, "padding_free": True}}, "workers": {"dataloader_num_workers": 2},
        "checkpointing": {"gradient_checkpointing": True},
        "accumulation": {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
    }  # fmt: skip
    prepare(tmp_path)
    train(tmp_path, options(tmp_path, **{"sftmix": given, **changes[way]}))
    assert_close(weights(tmp_path / "out"), weights(mixed / "out"), 2e-5)


def test_a_resumed_run_ends_in_the_same_bits(mixed: Path, tmp_path: Path) -> None:
    given = {"dynamics": str(mixed / "out" / "reference" / "dynamics.parquet")}
    prepare(tmp_path)
    checkpoint = str(mixed / "out" / "checkpoint-3")
    train(tmp_path, options(tmp_path, sftmix=given, resume_from_checkpoint=checkpoint))
    assert_close(weights(tmp_path / "out"), weights(mixed / "out"), 0)
    one, other = (read_dynamics(folder / "out" / "dynamics.parquet") for folder in (mixed, tmp_path))
    assert one.examples == other.examples and (one.nll_sum == other.nll_sum).all()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """As our loop alone, on as many examples as make whole steps."""
    made = tiny.examples(24, longest=20)
    prepare(tmp_path, made)
    examples, model = named(made), tiny.model()
    split = tiny.halves(dict(examples))
    write_split(tmp_path / "split.parquet", split)
    told = {"sftmix": {"split": str(tmp_path / "split.parquet")}, "micro_batch_size": 2}
    train(tmp_path, options(tmp_path, **told), processes=2)
    train_pairs(tiny.config(*FLAGS), model, examples, split, folder=tmp_path / "ours")
    own = {name.removeprefix("model."): value for name, value in model.named_parameters()}
    assert_close(weights(tmp_path / "out"), own, 2e-5)


def test_conversations_are_axolotls(tmp_path: Path) -> None:
    """Templated, tokenised and masked by axolotl, equal ones told apart; our loop on the tokens that came of it."""
    from datasets import load_from_disk

    prepare(tmp_path)
    words = [f"w{i} w{i + 1} w{2 * i}" for i in (*range(15), 3)]  # the last is the fourth again
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} w4"}] for text in words
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    data = [{"path": str(tmp_path / "data.jsonl"), "ds_type": "json", "type": "chat_template"}]
    told = {"datasets": data, "chat_template": "tokenizer_default", "num_epochs": 1}
    train(tmp_path, options(tmp_path, **told))
    log = (tmp_path / "log").read_text()
    assert "1 of 16 examples have the tokens and labels of another one" in log
    (prepared,) = [path.parent for path in (tmp_path / "prepared").rglob("dataset_info.json")]
    examples, model = examples_of(load_from_disk(str(prepared)), "id"), tiny.model()
    assert all(any(not s for s in e.supervised[1:]) and any(e.supervised) for e in examples.values())
    split = make_split(read_dynamics(tmp_path / "out" / "reference" / "dynamics.parquet"))
    train_pairs(tiny.config(*FLAGS, "train.epochs=1"), model, examples, split, folder=tmp_path / "ours")
    own = {name.removeprefix("model."): value for name, value in model.named_parameters()}
    assert_close(weights(tmp_path / "out"), own, 2e-5)


@pytest.mark.parametrize("bits", [16, 4])
def test_adapters_train_and_are_saved(tmp_path: Path, bits: int) -> None:
    """LoRA and QLoRA: the adapter is axolotl's, its base is as it was."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prepare(tmp_path, hidden_size=64, intermediate_size=128)
    # axolotl's Triton kernels for adapters need a GPU.
    kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    told: dict[str, Any] = {
        **kernels,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
    }
    if bits == 4:
        pytest.importorskip("bitsandbytes")
        told |= {"adapter": "qlora", "load_in_4bit": True}
    train(tmp_path, options(tmp_path, **told, num_epochs=4))
    losses = logged(tmp_path / "out", "ntp_loss")
    assert losses[-1] < losses[0] - 0.5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    changed = [
        name for name, value in adapted.named_parameters() if "lora_B" in name and value.abs().max() > 0
    ]
    assert changed and not any("lm_head" in name for name in changed)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"sample_packing": True, "pad_to_sequence_len": True},
        "sample_packing: expected false, as it joins examples",
    ),
    ({"sftmix": None}, "sftmix: expected a section"),
    ({"sftmix": {"reference": "online", "weight": 1}}, "weight"),
    (
        {"plugins": ["tests.recipe.axolotl.other_plugin.OtherPlugin", "sftmix.axolotl.SFTMixPlugin"]},
        "plugins: expected no other plugin with a trainer",
    ),
    ({"micro_batch_size": 3}, "micro_batch_size: expected an even number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=lambda value: str(value)[:20])
def test_what_cannot_be_beside_ends_the_command(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    prepare(tmp_path)
    result = run(tmp_path, options(tmp_path, **changes))
    assert result.returncode != 0 and message in result.stdout + result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_scores_of_other_tokens_are_refused(mixed: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    text = (tmp_path / "data.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in text]
    rows[0]["input_ids"][-1] = 7
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    given = {"dynamics": str(mixed / "out" / "reference" / "dynamics.parquet")}
    result = run(tmp_path, options(tmp_path, sftmix=given))
    assert result.returncode != 0
    assert "dynamics: expected every training example" in result.stdout + result.stderr


def test_without_its_section_the_plugin_is_not_there(tmp_path: Path) -> None:
    """A file that lists other plugins, or none, trains as axolotl does."""
    prepare(tmp_path)
    found = options(tmp_path, plugins=None, num_epochs=1)
    del found["sftmix"]
    train(tmp_path, found)
    assert logged(tmp_path / "out", "loss") and not (tmp_path / "out" / "dynamics.parquet").exists()
