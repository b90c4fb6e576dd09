"""Benchmarks by the real lm-evaluation-harness against the model's own logits and greedy tokens, by hand."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftmix.data.tokens import TokenOptions
from sftmix.evaluation.benchmarks import Asking, run_tasks
from sftmix.evaluation.requests import TaskRequest, parse_tasks
from sftmix.evaluation.task_sources import Source, write_tasks
from tests.recipe import tiny
from tests.recipe.evaluation import words

pytest.importorskip("lm_eval")
ASK = "Reason step by step, and end with #### and the number."


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    sources: Sequence[Source], folder: Path, *, model: Any = None, tokenizer: Any = None, before: Any = None,
    **asking: Any,
) -> dict[str, Any]:  # fmt: skip
    asking = {"ends": (words.END,), "max_length": 2048, **asking}
    chosen = model if model is not None else tiny.causal_lm(seed=1)
    return run_tasks(
        lambda: chosen, tokenizer or words.tokenizer(), sources, Asking(**asking), before or {}, label="base",
        folder=folder / "samples",
    )  # fmt: skip


def mean_and_error(scores: Sequence[float]) -> tuple[Any, Any]:
    error = np.std(scores, ddof=1) / np.sqrt(len(scores))
    return pytest.approx(float(np.mean(scores))), pytest.approx(float(error))


@torch.no_grad()
def greedy(model: Any, text: str, tokens: int) -> tuple[str, bool]:
    """Greedy words after a text, and whether they end: whole forwards without padding or cache, a token at a time."""
    tokenizer = words.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + tokens:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == words.END:
            return str(tokenizer.decode(ids[start:], skip_special_tokens=True)), True
        ids.append(token)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)), False


@torch.no_grad()
def choose(model: Any, text: str, choices: Sequence[str]) -> str:
    """The choice, one token each, whose logit is the largest after a text."""
    tokenizer = words.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0, -1]
    return max(choices, key=lambda choice: float(logits[words.WORDS.index(choice)]))


def sums(
    model: Any, *, chat: bool, count: int = 14, tokens: int = 20
) -> tuple[list[dict[str, str]], list[str], int]:
    """Questions whose answers are the model's own in every second row, its texts, and how many have no end."""
    rows, texts, unfinished = [], [], 0
    for i in range(count):
        question = f"w{i} w{3 * i % 30} w{7 * i % 30}"
        text, ended = greedy(model, words.prompt(f"Question: {question}\n{ASK}\nAnswer:", chat=chat), tokens)
        strict, numbers = (
            re.findall(r"#### (\d+)", text),
            re.findall(r"\d+", text),
        )  # of w12 too, as the task's own
        own = strict[0] if strict and i % 4 == 1 else numbers[-1] if numbers else "8"
        number = own if i % 2 else "77"
        rows.append({"question": question, "answer": f"w1 #### {number}"})
        texts.append(text)
        unfinished += not ended
    return rows, texts, unfinished


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_exact_match_is_that_of_the_models_own_greedy_answers(
    tmp_path: Path, chat: bool, batch_size: int
) -> None:
    model = words.counting_model()
    rows, texts, unfinished = sums(model, chat=chat)
    file = write(tmp_path / "g.jsonl", rows)
    sources = write_tasks([TaskRequest("gsm8k", file)], {}, tmp_path / "tasks", max_tokens=20)
    template = "on" if chat else "off"
    found = run(sources, tmp_path, model=model, batch_size=batch_size, template=template)["gsm8k"]
    scores: dict[str, list[float]] = {"strict": [], "flexible": []}
    for row, text in zip(rows, texts, strict=True):
        number = row["answer"].split("#### ")[1]
        strict = re.search(r"#### (\d+)", text)
        numbers = re.findall(r"\d+", text)
        scores["strict"].append(float(strict is not None and strict[1] == number))
        scores["flexible"].append(float(bool(numbers) and numbers[-1] == number))
    assert (
        0 < sum(scores["flexible"]) < len(rows) and scores["strict"] != scores["flexible"]
    )  # or nothing is shown
    assert sum(scores["strict"]) > 0
    for metric in found["metrics"]:
        value, error = mean_and_error(scores[metric["filter"]])
        assert (metric["metric"], metric["value"], metric["stderr"]) == ("exact_match", value, error)
    assert [metric["filter"] for metric in found["metrics"]] == ["strict", "flexible"]
    kept = [json.loads(line) for line in (tmp_path / "samples" / "gsm8k.jsonl").read_text().splitlines()]
    assert [k["resps"][0][0] for k in kept if k["filter"] == "strict"] == texts
    assert (found["num_examples"], found["num_rows"], found["num_fewshot"]) == (14, 14, 0)
    assert found["answers_unfinished"] == unfinished
    assert found["about"]["chat_template"] is chat and found["generation"]["max_gen_toks"] == 20


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_multiple_choice_is_that_of_the_models_own_logits(
    tmp_path: Path, chat: bool, batch_size: int
) -> None:
    model = tiny.causal_lm(seed=2)
    draw = random.Random(0)
    pubmed, medqa, right = [], [], {"pubmedqa": [], "medqa": []}  # type: ignore[var-annotated]
    for i in range(24):
        question, context = f"w{draw.randrange(30)} w{i}", f"w{draw.randrange(30)} w{draw.randrange(30)}"
        answer = draw.choice(["yes", "no", "maybe"])
        pubmed.append({"question": question, "context": context, "final_decision": answer})
        text = f"Abstract: {context}\nQuestion: {question}\nAnswer with yes, no or maybe.\nAnswer:"
        chosen = choose(model, words.prompt(text, chat=chat), ["yes", "no", "maybe"])
        right["pubmedqa"].append(float(chosen == answer))
        letters = "ABCD"[: 2 + i % 3]
        options = {letter: f"w{10 * n + i % 7}" for n, letter in enumerate(letters)}
        answer = draw.choice(letters)
        medqa.append({"question": question, "options": options, "answer_idx": answer})
        shown = "\n".join(f"{letter}. {option}" for letter, option in options.items())
        text = f"Question: {question}\n{shown}\nAnswer with the letter.\nAnswer:"
        right["medqa"].append(float(choose(model, words.prompt(text, chat=chat), letters) == answer))
    files = {"pubmedqa": write(tmp_path / "p.jsonl", pubmed), "medqa": write(tmp_path / "m.jsonl", medqa)}
    requests = [TaskRequest(form, file) for form, file in files.items()]
    sources = write_tasks(requests, {}, tmp_path / "tasks", max_tokens=4)
    found = run(sources, tmp_path, model=model, batch_size=batch_size, template="on" if chat else "off")
    for name, scores in right.items():
        assert 0 < sum(scores) < 24
        (metric,) = found[name]["metrics"]
        assert (metric["value"], metric["stderr"]) == mean_and_error(scores)
        low, high = metric["interval95"]
        assert low < metric["value"] < high


def test_examples_come_from_their_own_file_or_from_the_rows_that_are_not_asked(tmp_path: Path) -> None:
    """Issue 4145 of the harness: without a named split a row can be its own example."""
    rows = [{"question": f"w{i}", "answer": f"w{i} #### {i}"} for i in range(6)]
    shots = [{"question": f"w{i}", "answer": f"w{i} #### {i}"} for i in range(20, 26)]
    files = {"gsm8k": write(tmp_path / "train.jsonl", shots)}
    request = TaskRequest("gsm8k", write(tmp_path / "g.jsonl", rows))
    for fewshot, pool in (({}, range(6)), (files, range(20, 26))):
        sources = write_tasks([request], fewshot, tmp_path / "tasks", max_tokens=2)
        found = run(sources, tmp_path, num_fewshot=3)["gsm8k"]
        assert found["num_fewshot"] == 3
        for line in (tmp_path / "samples" / "gsm8k.jsonl").read_text().splitlines():
            sample = json.loads(line)
            asked = [int(n) for n in re.findall(r"Question: w(\d+)", sample["prompt"])]
            answered = [int(n) for n in re.findall(r"#### (\d+)", sample["prompt"])]
            assert asked == [
                *answered,
                sample["doc_id"],
            ]  # the whole answers, before the question without one
            assert set(answered) <= set(pool) - {sample["doc_id"]} and len(set(answered)) == 3
            told = [(f"Question: w{n}\n{ASK}\nAnswer:", f"w{n} #### {n}") for n in answered]
            question = f"Question: w{sample['doc_id']}\n{ASK}\nAnswer:"
            assert sample["prompt"] == words.prompt(question, chat=True, shots=told)


def test_more_examples_than_rows_are_refused_by_name(tmp_path: Path) -> None:
    request = TaskRequest("gsm8k", write(tmp_path / "g.jsonl", [{"question": "w1", "answer": "#### 1"}] * 2))
    sources = write_tasks([request], {}, tmp_path / "tasks", max_tokens=2)
    with pytest.raises(
        ValueError, match=r"evaluate.tasks: gsm8k: expected a task that runs on local files, got "
    ):
        run(sources, tmp_path, num_fewshot=5)


MINE = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["w9"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def mine(tmp_path: Path, *more: str) -> Path:
    file = write(tmp_path / "mine.jsonl", [{"q": f"w{i}", "a": "w1"} for i in range(5)])
    path = tmp_path / "mine" / "mine.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(MINE.format(file=file) + "".join(line + "\n" for line in more))
    return path


def sources_of(path: Path, tmp_path: Path) -> list[Source]:
    return write_tasks(parse_tasks(str(path)), {}, tmp_path / "tasks", max_tokens=4)


def test_a_users_file_and_folder_are_asked_and_functions_of_theirs_run(tmp_path: Path) -> None:
    path = mine(tmp_path, "process_docs: !function rows.first")
    (path.parent / "rows.py").write_text("def first(rows):\n    return rows.select([0, 1, 2])\n")
    for given in (path, path.parent):
        found = run(sources_of(given, tmp_path), tmp_path)
        assert found["mine"]["num_rows"] == 3 and found["mine"]["metrics"][0]["metric"] == "exact_match"


def test_examples_from_the_rows_asked_are_refused_unless_the_split_is_named(tmp_path: Path) -> None:
    path = mine(tmp_path)
    with pytest.raises(
        ValueError, match=r"evaluate.num_fewshot: expected 0 for mine, whose examples come from the"
    ):
        run(sources_of(path, tmp_path), tmp_path, num_fewshot=2)
    path.write_text(path.read_text() + "fewshot_split: test\n")
    assert run(sources_of(path, tmp_path), tmp_path, num_fewshot=2)["mine"]["num_fewshot"] == 2


def test_a_file_that_says_no_examples_keeps_none_with_a_word(tmp_path: Path, capfd: Any) -> None:
    path = mine(tmp_path, "num_fewshot: 0")
    assert run(sources_of(path, tmp_path), tmp_path, num_fewshot=2)["mine"]["num_fewshot"] == 0
    assert "evaluate.num_fewshot: mine has no examples, as its file says" in capfd.readouterr().out


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("dataset_path: json", "dataset_path: openai/none-such-set", "Offline|offline|Hub"),
        ("doc_to_target: ", "doc_to_target: !function none.such\n#", "No module|none"),
        ("metric: exact_match", "metric: none_such_metric", ""),
        ("output_type: generate_until", "output_type: multiple_choice", ""),
        ("max_gen_toks: 6", "max_gen_toks: 5000", "max tokens to generate"),
    ],
)
def test_a_task_that_cannot_run_is_one_line_that_names_it(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = mine(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(
        ValueError, match=r"^evaluate.tasks: .*mine.*: expected a task that runs on "
    ) as caught:
        run(sources_of(path, tmp_path), tmp_path)
    assert "\n" not in str(caught.value) and re.search(message, str(caught.value))


def test_nothing_is_downloaded_though_the_hub_may_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    import datasets
    import huggingface_hub.constants

    def refuse(*args: Any) -> None:
        raise AssertionError("a connection")

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    kept = datasets.config.HF_DATASETS_CACHE
    path = mine(tmp_path)
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: openai/none-such-set"))
    with pytest.raises(ValueError, match=r"expected a task that runs on local files, got .*[Oo]ffline"):
        run(sources_of(path, tmp_path), tmp_path)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_DATASETS_CACHE == kept


def test_code_that_the_model_writes_runs_only_when_it_is_allowed(tmp_path: Path) -> None:
    path = mine(tmp_path, "unsafe_code: true")
    with pytest.raises(ValueError, match=r"mine: .*evaluate.unsafe_code|mine: expected .* unsafe"):
        run(sources_of(path, tmp_path), tmp_path)
    assert run(sources_of(path, tmp_path), tmp_path, unsafe=True)["mine"]["num_examples"] == 5


def test_figures_stand_until_something_they_are_about_changes(tmp_path: Path, capfd: Any) -> None:
    path = mine(tmp_path)

    def again(before: Any, **asking: Any) -> tuple[dict[str, Any], str]:
        capfd.readouterr()
        found = run(sources_of(path, tmp_path), tmp_path, before=before, **asking)
        return found, capfd.readouterr().out

    first, _ = again({}, about={"model": "a"})
    second, told = again(first, about={"model": "a"})
    assert second == first and "evaluate base: mine done before" in told
    for asking, word in [
        ({"about": {"model": "b"}}, "model"), ({"limit": 3}, "evaluate.task_limit"),
        ({"template": "off"}, "evaluate.task_template"),
    ]:  # fmt: skip
        third, told = again(first, **{"about": {"model": "a"}, **asking})
        assert f"mine anew, the figures that stand there are about another {word}" in told, told
        assert third["mine"]["about"] != first["mine"]["about"]
    assert "the first 3 of 5 rows" in again(first, limit=3)[1]
    write(tmp_path / "mine.jsonl", [{"q": "w3", "a": "w1"}] * 5)
    assert "about another rows or examples" in again(first, about={"model": "a"})[1]
    path.write_text(path.read_text().replace('["w9"]', '["w8"]'))
    assert "about another task file, rows" in again(first, about={"model": "a"})[1]


def test_long_prompts_and_answers_without_an_end_are_counted_and_said(tmp_path: Path, capfd: Any) -> None:
    """Issues 3115 and 1426 of the harness: the beginning of a prompt goes, and only a log tells."""
    rows = [{"question": "w1 " * n, "answer": "#### 1"} for n in (2, 40, 60)]
    medqa = [{"question": "w1 " * n, "options": ["w1", "w2"], "answer": "A"} for n in (2, 60)]
    requests = [
        TaskRequest("gsm8k", write(tmp_path / "g.jsonl", rows)),
        TaskRequest("medqa", write(tmp_path / "m.jsonl", medqa)),
    ]  # fmt: skip
    sources = write_tasks(requests, {}, tmp_path / "tasks", max_tokens=8)
    found = run(sources, tmp_path, model=tiny.causal_lm(seed=1), max_length=48)
    told = capfd.readouterr().out
    assert found["gsm8k"]["prompts_cut"] == 2 and found["medqa"]["prompts_cut"] == 2  # one a choice
    assert "gsm8k: 2 prompts are longer than the model's positions and lost their beginning" in told
    assert f"gsm8k: {found['gsm8k']['answers_unfinished']} of 3 answers have no end within 8 tokens" in told


def test_the_models_own_settings_of_generation_change_nothing_and_stay(tmp_path: Path) -> None:
    rows, texts, _ = sums(words.counting_model(), chat=True, count=4, tokens=12)
    file = write(tmp_path / "g.jsonl", rows)
    sources = write_tasks([TaskRequest("gsm8k", file)], {}, tmp_path / "tasks", max_tokens=12)
    model = words.counting_model()
    settings = model.generation_config
    stop = words.WORDS.index(texts[0].split()[3])
    settings.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=1, eos_token_id=stop
    )
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    run(sources, tmp_path, model=model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[union-attr]
    kept = [json.loads(line) for line in (tmp_path / "samples" / "gsm8k.jsonl").read_text().splitlines()]
    for text, line in zip(texts, kept, strict=False):  # strict comes first; the model's own end stays one
        expected = text.split()
        cut = expected.index(words.WORDS[stop]) if words.WORDS[stop] in expected else len(expected)
        assert line["filter"] == "strict" and line["resps"][0][0].split() == expected[:cut]
    assert model.generation_config is settings


def test_a_tokenizer_that_puts_a_token_before_texts_does_not_before_a_rendered_prompt(tmp_path: Path) -> None:
    """Issue 3347 of the harness: BOS twice, or once where training had none. As in training: the template's text."""
    from tokenizers.processors import TemplateProcessing

    from sftmix.evaluation.harness import Harness

    tokenizer = words.tokenizer(bos_token="w0")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="w0 $A", special_tokens=[("w0", words.WORDS.index("w0"))]
    )
    assert tokenizer("w5")["input_ids"] == [words.WORDS.index("w0"), words.WORDS.index("w5")]
    for chat, before in ((True, []), (False, ["w0"])):
        harness = Harness(tiny.causal_lm(), tokenizer, ends=(words.END,), batch_size=2, chat=chat)
        ids, _ = harness.tok_batch_encode(["w5 w6", "w7"])
        assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == [*before, "w5", "w6"]
        assert tokenizer.convert_ids_to_tokens(harness.tok_encode("w5 w6")) == [*before, "w5", "w6"]


def test_a_template_that_refuses_the_systems_message_is_not_asked_without_it(tmp_path: Path) -> None:
    path = mine(tmp_path, 'description: "w2 w3"')
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHATML
    )
    with pytest.raises(
        ValueError, match=r"evaluate.task_template: expected off, or a chat template that renders sys"
    ):
        run(sources_of(path, tmp_path), tmp_path, tokenizer=words.tokenizer(chat_template=refusing))
    dropping = "{% for message in messages if message['role'] != 'system' %}" + tiny.CHATML.split("%}", 1)[1]
    with pytest.raises(ValueError, match=r"shows all of system, user, got one that leaves out 'w2 w3'"):
        run(sources_of(path, tmp_path), tmp_path, tokenizer=words.tokenizer(chat_template=dropping))
    none = words.tokenizer(chat_template=None)
    assert (
        run(sources_of(path, tmp_path), tmp_path, tokenizer=none)["mine"]["about"]["chat_template"] is False
    )
    with pytest.raises(
        ValueError, match=r"evaluate.task_template: expected a tokenizer with a chat template, got one"
    ):
        run(sources_of(path, tmp_path), tmp_path, tokenizer=none, template="on")


def test_the_templates_date_and_arguments_are_the_runs(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%Y') }} {{ mood }} " + tiny.CHATML
    options = TokenOptions(date="1999-05-05", template_arguments={"mood": "w4"})
    path = mine(tmp_path)
    run(
        sources_of(path, tmp_path),
        tmp_path,
        tokenizer=words.tokenizer(chat_template=dated),
        options=options,
    )
    sample = json.loads((tmp_path / "samples" / "mine.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("1999 w4 <|im_start|> user")


def test_the_harness_itself_gives_the_same_on_the_written_task(tmp_path: Path) -> None:
    """What a reader repeats with lm_eval alone: the model's files and the folder of tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    draw = random.Random(3)
    rows = [
        {"question": f"w{i * 7 % 30}", "context": f"w{i}", "final_decision": draw.choice(["yes", "no", "maybe"])}
        for i in range(12)
    ]  # fmt: skip
    file = write(tmp_path / "p.jsonl", rows)
    sources = write_tasks([TaskRequest("pubmedqa", file)], {}, tmp_path / "tasks", max_tokens=4)
    found = run(sources, tmp_path, num_fewshot=2)["pubmedqa"]["metrics"][0]
    tiny.causal_lm(seed=1).save_pretrained(tmp_path / "model")
    words.tokenizer().save_pretrained(tmp_path / "model")
    own = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"}, tasks=["pubmedqa"],
        num_fewshot=2, device="cpu", apply_chat_template=True, bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )["results"]["pubmedqa"]  # fmt: skip
    assert (own["acc,none"], own["acc_stderr,none"]) == (found["value"], found["stderr"])


def test_lm_eval_that_is_missing_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftmix.evaluation import task_sources

    monkeypatch.setattr(task_sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"evaluate.tasks: expected lm-eval, got none; pip install 'sftmix\[eval\]'"
    ):
        task_sources.check_installed()
