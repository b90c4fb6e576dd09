"""Plans of public models: counts, sums, what fits, what would, and that more GPUs never take more memory each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sftmix.hardware import GPUS, find_gpu
from sftmix.planning.plan import Question, make_plan, model_of
from sftmix.planning.remedies import find_remedies
from sftmix.planning.report import as_data, in_words
from tests.recipe.planning.configs import CHECKPOINTED, PUBLIC, folder, question


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_are_those_that_the_makers_count(name: str, tmp_path: Path) -> None:
    asked = question(name, tmp_path)
    found = model_of(asked.config.model, "full", asked.config.lora)
    assert found.count == found.trained == PUBLIC[name][1]
    numbers = PUBLIC[name][0]
    assert (found.vocab_size, found.hidden_size) == (numbers["vocab_size"], numbers["hidden_size"])
    assert found.is_tied == numbers["tie_word_embeddings"]


def test_adapters_are_counted_as_peft_makes_them(tmp_path: Path) -> None:
    asked = question("Llama-3.1-8B", tmp_path, "train.tuning=lora")
    found = model_of(asked.config.model, "lora", asked.config.lora)
    widths = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3  # q, o; k, v; gate, up, down
    assert found.trained == 32 * 16 * widths
    upper = dataclasses.replace(asked.config.lora, layers="24:32")
    part = model_of(asked.config.model, "lora", upper)
    assert (part.trained, part.first_trained) == (found.trained // 4, 24)


def test_seven_and_more_bytes_are_where_they_should_be(tmp_path: Path) -> None:
    """On one GPU 16-bit parameters, float32 main weights and gradients, two moments; on eight a share of 16 bytes."""
    count = PUBLIC["SmolLM2-135M"][1]
    causes = make_plan(question("SmolLM2-135M", tmp_path)).memory.phases["optimizer"]
    bytes_each = {
        "parameters": 2,
        "main weights": 4,
        "AdamW moments": 8,
        "gradients": 4,
        "optimizer scratch": 4,
    }
    assert causes == {
        **dict.fromkeys(causes, 0),
        **{cause: size * count for cause, size in bytes_each.items()},
    }
    causes = make_plan(question("SmolLM2-135M", tmp_path, gpus=8)).memory.phases["optimizer"]
    assert causes["parameters"] == 0
    assert causes["main weights"] + causes["AdamW moments"] + causes["gradients"] == 16 * count // 8


@pytest.mark.parametrize("gpus", [1, 8])
def test_sums_are_their_parts(gpus: int, tmp_path: Path) -> None:
    plan = make_plan(question("Mistral-7B", tmp_path, gpus=gpus, tokens=10**7))
    data = as_data(plan, [])
    assert data["memory"]["bytes"] == sum(data["memory"]["causes"].values())
    assert data["memory"]["bytes"] == max(
        sum(causes.values()) for causes in data["memory"]["phases"].values()
    )
    assert data["traffic"]["bytes"] == sum(data["traffic"]["causes"].values())
    flops = dict(data["flops"])
    assert flops.pop("total") == sum(flops.values())
    step = data["step"]
    assert step["seconds"] == max(step["compute"], step["traffic"]) + step["optimizer"]
    assert all(causes >= 0 for phase in data["memory"]["phases"].values() for causes in phase.values())


@pytest.mark.parametrize("flags", [(), (CHECKPOINTED,), ("train.tuning=lora",)], ids=str)
@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3.1-8B", "Llama-3.1-405B"])
def test_more_gpus_never_take_more_memory_each(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    asked = question(name, tmp_path, *flags)
    totals = [make_plan(dataclasses.replace(asked, gpus=2**power)).memory.total for power in range(13)]
    assert totals == sorted(totals, reverse=True)


def test_checkpointing_and_smaller_batches_take_less(tmp_path: Path) -> None:
    kinds = [
        make_plan(question("Mistral-7B", tmp_path, f"train.gradient_checkpointing={kind}", gpus=8))
        for kind in ("none", "selective", "full")
    ]
    totals = [plan.memory.total for plan in kinds]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[2]
    assert kinds[2].flops.recomputing > 0 == kinds[0].flops.recomputing == kinds[1].flops.recomputing
    sizes = [
        make_plan(question("Mistral-7B", tmp_path, f"train.micro_batch_size={size}", gpus=8)).memory.total
        for size in (8, 4, 2)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_405b_does_not_fit_on_eight_and_is_told_what_would(tmp_path: Path) -> None:
    plan = make_plan(question("Llama-3.1-405B", tmp_path, gpus=8))
    assert not plan.fits and not plan.starts
    remedies = find_remedies(plan)
    assert any("--gpus 256" in remedy.flags for remedy in remedies)
    assert any("--train.tuning lora" in remedy.flags for remedy in remedies)
    assert all(remedy.total <= GPUS["H100-80"].memory_bytes for remedy in remedies)
    text = "\n".join(in_words(plan, remedies))
    assert (
        "does not fit" in text
        and "before the first step" in text
        and "4 of 8 GPUs get no micro-batch" in text
    )


@pytest.mark.parametrize(
    ("name", "gpus", "gpu", "flags"),
    [
        ("Llama-3.1-8B", 8, "H100-80", ()), ("Llama-3.1-8B", 1, "H100-80", ()), ("SmolLM2-135M", 1, "RTX4090", ()),
        ("Qwen2.5-14B", 4, "A100-80", (CHECKPOINTED,)),
    ],
)  # fmt: skip
def test_a_remedy_is_one(name: str, gpus: int, gpu: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Asked with its flags, the plan fits, and takes what was said."""
    plan = make_plan(question(name, tmp_path, *flags, gpu=gpu, gpus=gpus))
    remedies = find_remedies(plan)
    assert bool(remedies) == (not plan.fits)
    for remedy in remedies:
        words = remedy.flags.split()
        more = dict(zip(words[::2], words[1::2], strict=True))
        changed = [f"{key.removeprefix('--')}={value}" for key, value in more.items() if key != "--gpus"]
        again = question(name, tmp_path, *flags, *changed, gpu=gpu, gpus=int(more.get("--gpus", gpus)))
        found = make_plan(again)
        assert found.fits and found.memory.total == remedy.total


def test_the_smallest_and_the_largest_that_there_are(tmp_path: Path) -> None:
    small = make_plan(question("SmolLM2-135M", tmp_path, gpu="RTX4090"))
    assert small.traffic.total == 0 and small.idle == 0
    large = make_plan(question("Llama-3.1-405B", tmp_path, CHECKPOINTED, "train.micro_batch_size=2",
                               "train.batch_size=8192", gpus=4096))  # fmt: skip
    assert large.fits and large.idle == 0
    assert large.traffic.total > 2 * 405 * 10**9


def test_nodes_repeat_what_is_sharded_within(tmp_path: Path) -> None:
    whole = make_plan(question("Mistral-7B", tmp_path, CHECKPOINTED, gpus=32))
    hybrid = make_plan(question("Mistral-7B", tmp_path, CHECKPOINTED, "train.replicas=4", gpus=32))
    eight = make_plan(question("Mistral-7B", tmp_path, CHECKPOINTED, gpus=8))
    assert hybrid.memory.causes["AdamW moments"] == eight.memory.causes["AdamW moments"]
    assert hybrid.traffic.repeated["gradients, all-reduce over nodes"] > 0
    assert sum(whole.traffic.repeated.values()) == 0
    assert hybrid.seconds.traffic < whole.seconds.traffic, "the links of a node are faster than the network"


def test_stages_are_paid_by_what_they_read(tmp_path: Path) -> None:
    stages = {s.name: s for s in make_plan(question("SmolLM2-135M", tmp_path, tokens=10**7)).stages}
    assert list(stages) == ["reference", "score", "train ntp", "train sftmix", "evaluate"]
    assert stages["reference"].seconds == stages["train ntp"].seconds == stages["train sftmix"].seconds
    assert (
        stages["score"].tokens == 3 * 10**7
        and 0.2 < stages["score"].seconds / stages["reference"].seconds < 0.45
    )
    online = make_plan(question("SmolLM2-135M", tmp_path, "reference.dynamics=online", tokens=10**7)).stages
    assert online[1].seconds == 0
    smaller = question(
        "Mistral-7B", tmp_path, f"reference.model={folder('SmolLM2-135M', tmp_path)}", tokens=10**7
    )
    found = {s.name: s.seconds for s in make_plan(smaller).stages}
    assert found["reference"] < found["train sftmix"] / 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "gpus: expected 1 to 4096, got 0"), ({"gpus": 5000}, "gpus: expected 1 to 4096"),
        ({"gpus": 8, "per_node": 0}, "gpus_per_node: expected at least 1, got 0"),
        ({"tokens": -1}, "tokens: expected at least 0"), ({"answers": 0.0}, "answers: expected a share"),
        ({"length": 10**6}, "length: expected at most the model's 8192 positions"),
    ],
)  # fmt: skip
def test_bad_questions_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    asked: Question = dataclasses.replace(question("SmolLM2-135M", tmp_path), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        make_plan(asked)


def test_what_a_run_refuses_a_plan_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.replicas: expected a divisor of gpus=8, got 3"):
        make_plan(question("SmolLM2-135M", tmp_path, "train.replicas=3", gpus=8))
    with pytest.raises(
        ValueError, match=r"train\.head_sharding: expected gather or auto for a head that is tied"
    ):
        make_plan(question("SmolLM2-135M", tmp_path, "train.head_sharding=exchange", gpus=8))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    asked = question("SmolLM2-135M", tmp_path)
    for name, text in (("none", None), ("broken", "{"), ("other", json.dumps({"model_type": "nothing"}))):
        path = tmp_path / name
        path.mkdir()
        if text is not None:
            (path / "config.json").write_text(text)
        model = dataclasses.replace(asked.config.model, name=str(path))
        with pytest.raises(
            ValueError, match=r"model\.name: expected a folder or file with a model's config\.json"
        ):
            model_of(model, "full", asked.config.lora)
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="expected a causal language model"):
        model_of(
            dataclasses.replace(asked.config.model, name=str(tmp_path / "other")), "full", asked.config.lora
        )


def test_gpus_are_found_and_changed() -> None:
    assert find_gpu("h100-80") == GPUS["H100-80"]
    gpu = find_gpu("L40S", memory=46, flops=300, network=10)
    assert (gpu.memory_bytes, gpu.flops, gpu.network) == (46 * 10**9, 300e12, 10e9)
    assert "as given" in gpu.source
    with pytest.raises(ValueError, match=r"gpu: expected one of A100-80, .*, got 'V100'"):
        find_gpu("V100")
    with pytest.raises(ValueError, match="gpu_link: expected a number above 0, got 0"):
        find_gpu("H200", link=0)
