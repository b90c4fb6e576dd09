"""Bytes between GPUs: the ring's arithmetic, the head either way, and the parts of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftmix.planning.plan import make_plan
from sftmix.planning.traffic import head_bytes
from tests.recipe.planning.configs import CHECKPOINTED, PUBLIC, question


def test_the_head_is_gathered_or_its_rows_are_exchanged() -> None:
    # V D = 8 numbers in 2 bytes, gradients in 4; 3 rows of 2 numbers and their gradients, and 48 bytes of statistics
    # of each from 4 shards.
    found = head_bytes(3, 4, 2, shards=4)
    assert (found.gather, found.exchange) == (8 * 6 * 3 // 4, 3 * 3 * (2 * 6 + 48 * 4))
    assert found.chosen == "gather" and found.bytes == found.gather
    few = head_bytes(256, 128256, 4096, shards=8, micro_batches=2)
    assert few.chosen == "exchange" and few.bytes == few.exchange == 2 * 7 * 256 * (4096 * 6 + 48 * 8)
    assert head_bytes(256, 128256, 4096, shards=8, choice="gather").chosen == "gather"
    assert head_bytes(9, 8, 8, shards=1).bytes == 0
    frozen = head_bytes(3, 4, 2, shards=4, trained=False)
    assert frozen.gather == 8 * 2 * 3 // 4


def test_the_choice_turns_where_the_two_are_equal() -> None:
    """R N (6 D + 48 R) bytes against V D 6: somewhat fewer rows of all processes than the vocabulary has tokens."""
    vocab_size, shards = 1024, 8
    even = vocab_size * 64 * 6 // (shards * (64 * 6 + 48 * shards))
    assert head_bytes(even, vocab_size, 64, shards=shards).chosen == "gather"
    assert head_bytes(even - 1, vocab_size, 64, shards=shards).chosen == "exchange"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"shards": 0}, "shards"), ({"choice": "none"}, "head_sharding"), ({"itemsize": 0}, "itemsize")],
)
def test_bad_sizes_are_refused(changes: dict[str, object], message: str) -> None:
    told: dict[str, object] = {"shards": 2, **changes}
    with pytest.raises(ValueError, match=f"{message}: expected"):
        head_bytes(1, 2, 3, **told)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows: expected at least 0, got -1"):
        head_bytes(-1, 2, 3, shards=2)


def test_a_step_gathers_blocks_twice_and_reduces_every_gradient_in_float32(tmp_path: Path) -> None:
    plan = make_plan(question("Llama-3.1-8B", tmp_path, "train.batch_size=128", gpus=8))
    count, head = PUBLIC["Llama-3.1-8B"][1], 128256 * 4096
    blocks = count - 2 * head - 4096
    ring = plan.micro_batches * 7 / 8
    causes = plan.traffic.causes
    assert plan.micro_batches == 2
    assert causes["blocks, all-gather"] == ring * 2 * 2 * blocks
    assert causes["embedding, all-gather"] == ring * 2 * (head + 4096)
    assert causes["gradients, reduce-scatter"] == ring * 4 * (count - head)
    assert causes["head"] == ring * 6 * head
    assert plan.traffic.total == sum(causes.values())


def test_lora_reduces_adapters_alone(tmp_path: Path) -> None:
    plan = make_plan(question("Llama-3.1-8B", tmp_path, "train.tuning=lora", gpus=8))
    assert plan.traffic.causes["gradients, reduce-scatter"] == 4 * plan.model.trained * 7 // 8
    assert plan.traffic.head.gather == 2 * 128256 * 4096 * 7 // 8
    upper = make_plan(question("Llama-3.1-8B", tmp_path, "train.tuning=lora", "lora.layers=16:32", gpus=8))
    assert upper.traffic.causes["blocks, all-gather"] < 0.8 * plan.traffic.causes["blocks, all-gather"]


def test_exchanging_rows_leaves_the_head_where_it_is(tmp_path: Path) -> None:
    flags = ("train.micro_batch_size=2", CHECKPOINTED)
    told = {"gpus": 8, "answers": 0.25, "length": 512}
    gathered = make_plan(question("Llama-3.1-8B", tmp_path, *flags, **told))
    exchanged = make_plan(question("Llama-3.1-8B", tmp_path, *flags, "train.head_sharding=auto", **told))
    assert exchanged.traffic.head.chosen == "exchange"
    assert exchanged.traffic.total < gathered.traffic.total
    assert (
        exchanged.memory.phases["loss"]["gathered units"] < gathered.memory.phases["loss"]["gathered units"]
    )
    tied = make_plan(question("SmolLM2-135M", tmp_path, "train.head_sharding=auto", gpus=8))
    assert tied.traffic.head.chosen == "gather", "the embedding needs it whole"
