"""A benchmark's choices by a real model with a real tokenizer, against its own log-probabilities (slow)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sftmix.config import load_config
from sftmix.demo.job import find_smollm2
from sftmix.evaluation.benchmarks import Asking, run_tasks
from sftmix.evaluation.requests import TaskRequest
from sftmix.evaluation.task_sources import write_tasks
from sftmix.model.load import load_model

ROWS = [
    ("Does aspirin thin the blood?", "Aspirin inhibits platelet aggregation in healthy volunteers.", "yes"),
    ("Is the moon made of cheese?", "Lunar samples consist of basalt and anorthosite.", "no"),
    (
        "Does the drug prevent relapse?",
        "The trial was stopped early; the interval included no effect.",
        "maybe",
    ),
    ("Do antibiotics cure viral infections?", "Antibiotics had no effect on the course of influenza.", "no"),
    ("Is smoking linked to lung cancer?", "The cohort showed a twentyfold higher risk in smokers.", "yes"),
    ("Does exercise lower blood pressure?", "Mean systolic pressure fell by 5 mmHg after training.", "yes"),
]


@pytest.mark.slow
def test_the_choices_of_a_real_model_are_those_of_its_log_probabilities(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder, gguf = find_smollm2()
    flags = [
        "run_dir=r",
        "data.train=none",
        f"model.name={folder}",
        f"model.gguf_file={gguf}",
        "model.dtype=float32",
    ]
    model, tokenizer = load_model(load_config(None, flags).model)
    path = tmp_path / "p.jsonl"
    names = ("question", "context", "final_decision")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in ROWS))
    sources = write_tasks([TaskRequest("pubmedqa", path)], {}, tmp_path / "tasks", max_tokens=8)
    asking = Asking(batch_size=4, max_length=2048)
    found = run_tasks(
        lambda: model.base, tokenizer, sources, asking, {}, label="base", folder=tmp_path / "out"
    )["pubmedqa"]  # fmt: skip
    samples = [json.loads(line) for line in (tmp_path / "out" / "pubmedqa.jsonl").read_text().splitlines()]
    right = 0
    for (question, context, answer), sample in zip(ROWS, samples, strict=True):
        asked = f"Abstract: {context}\nQuestion: {question}\nAnswer with yes, no or maybe.\nAnswer:"
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        assert sample["prompt"] == prompt
        # The harness scores the line's end before the answer too: it is the same for every choice.
        start = len(tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"])
        scores = []
        for choice in ("yes", "no", "maybe"):
            ids = tokenizer(prompt + choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logprob = model.base(ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(logprob.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        torch.testing.assert_close([pair[0][0] for pair in sample["resps"]], scores, rtol=1e-3, atol=1e-3)
        right += max(zip(scores, ("yes", "no", "maybe"), strict=True))[1] == answer
    assert found["metrics"][0]["value"] == pytest.approx(right / len(ROWS)) and found["prompts_cut"] == 0
