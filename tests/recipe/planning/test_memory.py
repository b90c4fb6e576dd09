"""The memory of real steps on a CPU, by tensors that are alive, against the plan's: within 15 %, its parts too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sftmix.planning.live import LiveBytes
from tests.recipe.planning.configs import CHECKPOINTED
from tests.recipe.planning.measured import LENGTH, Case, measure, modelled

BOUND = 0.15
WIDE = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
DEEP = {**WIDE, "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4}
TIED = {**WIDE, "tie_word_embeddings": True}
GPT2 = {"vocab_size": 4096, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 128}
LORA = "train.tuning=lora"
CASES = [
    Case("llama", WIDE), Case("llama", WIDE, "bfloat16", micro_batches=2), Case("llama", DEEP, "bfloat16", 8),
    Case("llama", WIDE, "float32", 4, 2, (CHECKPOINTED,)), Case("llama", TIED, "float32", 4, 2),
    Case("llama", TIED, "bfloat16", 2), Case("llama", DEEP, "bfloat16", 4, 1, (LORA,)),
    Case("llama", WIDE, "float32", 8, 1, (LORA, CHECKPOINTED)), Case("gpt2", GPT2, "float32", 8),
    Case("gpt2", GPT2, "bfloat16", 4, 2, (CHECKPOINTED,)), Case("gpt2", GPT2, "bfloat16", 4, 2, (LORA,)),
]  # fmt: skip


def near(found: int, expected: int) -> None:
    assert abs(found - expected) <= BOUND * expected, f"{found:,} modelled, {expected:,} measured"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_takes_what_the_plan_says(case: Case) -> None:
    measured = measure(case, LiveBytes())
    found, skeleton, loss = modelled(case)
    near(found.total, measured.peak)
    # By cause: what stays, what the forward adds, and the gradients, which the trainer's peak holds too.
    causes = found.causes
    stays = sum(causes[cause] for cause in ("parameters", "main weights", "AdamW moments"))
    assert abs(stays - measured.between) <= 0.01 * stays
    phases = found.phases
    # The hidden states themselves go with the model's forward.
    hidden = case.sequences * LENGTH * skeleton.hidden_size * skeleton.itemsize
    kept = phases["loss"]["activations"] - hidden + loss.kept
    near(kept, measured.after_forward - measured.before_forward)
    assert phases["optimizer"]["gradients"] == 4 * skeleton.trained


SHARDED = """
import os, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from sftmix.planning.live import LiveBytes
from tests.recipe.planning import test_memory
from tests.recipe.planning.configs import CHECKPOINTED
from tests.recipe.planning.measured import measure
torch.set_num_threads(1)
processes = int(sys.argv[1])
dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
os.environ.update(WORLD_SIZE=str(processes), RANK="0")
live, resize = LiveBytes(), torch.UntypedStorage.resize_
def resized(storage, size):  # FSDP empties and fills storages outside operators
    resize(storage, size)
    live.resized(storage)
torch.UntypedStorage.resize_ = resized
for number in sys.argv[2:]:
    found = measure(test_memory.SHARDED_CASES[int(number)], live, processes=processes)
    print("measured", found.peak, found.between)
"""
SHARDED_CASES = [
    Case("llama", WIDE, "bfloat16"), Case("llama", DEEP, "bfloat16", 4, 1, (CHECKPOINTED,)),
    Case("llama", TIED, "float32"), Case("llama", DEEP, "bfloat16", 4, 1, (LORA,)),
]  # fmt: skip


def sharded(processes: int, number: int) -> None:
    """The first of ``processes`` of FSDP2 alone: a process group that moves nothing lets it run by itself."""
    command = [sys.executable, "-c", SHARDED, str(processes), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    _, peak, between = done.stdout.splitlines()[-1].split()
    found, *_ = modelled(SHARDED_CASES[number], shards=processes)
    near(found.total, int(peak))
    stays = sum(found.causes[cause] for cause in ("parameters", "main weights", "AdamW moments"))
    assert abs(stays - int(between)) <= 0.01 * stays


def test_a_sharded_step_takes_what_the_plan_says() -> None:
    sharded(8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 8])
@pytest.mark.parametrize("number", range(len(SHARDED_CASES)), ids=lambda n: str(SHARDED_CASES[n]))
def test_sharded_steps_take_what_the_plan_says(processes: int, number: int) -> None:
    sharded(processes, number)


def test_live_bytes_are_those_of_storages() -> None:
    live = LiveBytes()
    with live:
        first = torch.zeros(1000)
        view = first[:10].view(2, 5)
        assert live.now == 4000
        second = first + 1
        assert live.now == 8000
        del first
        assert live.now == 8000, "the view holds it"
        del view
        assert live.now == 4000
        second = second.double()
        assert live.now == 8000 and live.peak == 12000
    del second
    assert live.now == 0
