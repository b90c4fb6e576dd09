"""Answers for judges: greedy by hand, the second turn after the first, the formats, and what is counted and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.data.tokens import TokenOptions
from sftmix.evaluation.answers import Writer, read_questions, write_answers
from sftmix.evaluation.decoding import answer_batch, batches, greedy
from sftmix.model.causal_lm import install_head
from tests.recipe import tiny
from tests.recipe.evaluation import words


def question_file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MT = [
    {"question_id": 81 + i, "category": "writing", "turns": [f"w{i} " * (1 + 3 * i) + "w2", f"w{i + 9}"]}
    for i in range(5)
]  # fmt: skip


def writer(**changes: Any) -> Writer:
    given: dict[str, Any] = {
        "model": install_head(words.counting_model()), "tokenizer": words.tokenizer(), "ends": [words.END],
        "pad_id": 0, "max_new_tokens": 12, "batch_size": 2,
    }  # fmt: skip
    return Writer(**{**given, **changes})


@torch.no_grad()
def by_hand(turns: list[str], tokens: int) -> tuple[list[str], int]:
    """The answer to each turn, all earlier turns before it, from whole forwards; and how many have no end."""
    model, tokenizer = words.counting_model(), words.tokenizer()
    text, answers, unfinished = "", [], 0
    for turn in turns:
        text += f"<|im_start|> user {turn} <|im_end|> <|im_start|> assistant "
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        made: list[int] = []
        while len(made) < tokens and words.END not in made:
            made.append(int(model(torch.tensor([[*ids, *made]])).logits[0, -1].argmax()))
        unfinished += words.END not in made
        answers.append(
            tokenizer.decode([t for t in made if t != words.END], skip_special_tokens=True).strip()
        )
        text += f"{answers[-1]} <|im_end|> "
    return answers, unfinished


@pytest.mark.parametrize("batch_size", [1, 3])
def test_mt_bench_answers_are_greedy_turn_after_turn_and_read_as_fastchat_reads_them(
    tmp_path: Path, batch_size: int
) -> None:
    found = read_questions("mt-bench", question_file(tmp_path / "question.jsonl", MT))
    path = tmp_path / "answers" / "mt_bench.jsonl"
    told = write_answers("mt-bench", found.asked, writer(batch_size=batch_size), path, name="mine-sftmix")
    expected = [by_hand(row["turns"], 12) for row in MT]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {line["question_id"]: line for line in lines}  # what load_model_answers makes of a file
    assert list(by_id) == [81, 82, 83, 84, 85]
    for row, (turns, _) in zip(MT, expected, strict=True):
        line = by_id[row["question_id"]]
        assert line["choices"] == [{"index": 0, "turns": turns}]
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "mine-sftmix" and isinstance(line["tstamp"], float)
    assert len({line["answer_id"] for line in lines}) == 5
    assert told["unfinished"] == sum(unfinished for _, unfinished in expected)
    assert 0 < told["unfinished"] < 10 and (told["num_questions"], told["num_answers"]) == (5, 10)
    assert told["empty"] == sum(not turn for turns, _ in expected for turn in turns)
    assert told["generation"] == {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [words.END]}
    assert len({turn for turns, _ in expected for turn in turns}) > 3  # or nothing is shown


def test_alpaca_eval_outputs_are_one_list_by_instruction(tmp_path: Path) -> None:
    rows = [
        {"dataset": "helpful_base", "instruction": " w1 w5 ", "output": "reference", "generator": "davinci"},
        {"instruction": "w7", "system": "w3"},
    ]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows))
    found = read_questions("alpaca-eval", tmp_path / "alpaca_eval.json")
    assert dict(found.ignored) == {"system": 1}
    write_answers("alpaca-eval", found.asked, writer(), tmp_path / "out.json", name="mine")
    outputs = [by_hand([row["instruction"]], 12)[0][0] for row in rows]
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"dataset": "helpful_base", "instruction": " w1 w5 ", "output": outputs[0], "generator": "mine"},
        {"instruction": "w7", "output": outputs[1], "generator": "mine"},
    ]


def test_empty_answers_and_those_without_an_end_are_counted(tmp_path: Path) -> None:
    model = install_head(words.counting_model())
    head = model.base.get_output_embeddings().weight
    with torch.no_grad():
        head.zero_()  # every token is as likely: the first, padding, is said for ever
    asked = read_questions("mt-bench", question_file(tmp_path / "q.jsonl", MT)).asked
    told = write_answers("mt-bench", asked, writer(model=model), tmp_path / "a.jsonl", name="m")
    assert (told["empty"], told["unfinished"]) == (10, 10)
    told = write_answers("mt-bench", asked, writer(model=model, ends=[0]), tmp_path / "a.jsonl", name="m")
    assert (told["empty"], told["unfinished"]) == (10, 0)


def test_the_models_own_settings_change_nothing_and_the_template_is_the_runs(tmp_path: Path) -> None:
    asked = read_questions("mt-bench", question_file(tmp_path / "q.jsonl", MT[:2])).asked
    plain = writer()
    write_answers("mt-bench", asked, plain, tmp_path / "a.jsonl", name="m")
    settings = plain.model.base.generation_config
    settings.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=3)
    write_answers("mt-bench", asked, plain, tmp_path / "b.jsonl", name="m")
    one, two = (
        [json.loads(line)["choices"] for line in (tmp_path / n).open()] for n in ("a.jsonl", "b.jsonl")
    )
    assert one == two and plain.model.base.generation_config is settings
    dated = words.tokenizer(chat_template="{{ strftime_now('%Y') }} {{ mood }} " + tiny.CHATML)
    options = TokenOptions(date="1999-05-05", template_arguments={"mood": "w4"})
    seen: list[list[int]] = []
    model = install_head(words.counting_model())
    inner = model.base.generate

    def generate(ids: Any, **given: Any) -> Any:
        seen.append(ids[0].tolist())
        return inner(ids, **given)

    model.base.generate = generate
    write_answers("mt-bench", asked[:1], writer(model=model, tokenizer=dated, options=options), tmp_path / "c.jsonl", name="m")  # fmt: skip  # noqa: E501
    assert dated.decode(seen[0]).split()[:5] == ["<unk>", "w4", "<|im_start|>", "user", "w0"]


def test_prompts_that_leave_no_room_are_alone_and_without_any_are_refused(tmp_path: Path) -> None:
    assert batches([3, 9, 5, 9, 1], 2, alone_above=8) == [[1], [3], [2, 0], [4]]
    assert batches([3, 9, 5], 2, alone_above=None) == [[1, 2], [0]]
    rows = [{"question_id": i, "turns": ["w1 " * n]} for i, n in enumerate((2, 20, 3))]
    asked = read_questions("mt-bench", question_file(tmp_path / "q.jsonl", rows)).asked
    short = writer(positions=30, batch_size=3)  # 25 tokens of the long one leave 5
    told = write_answers("mt-bench", asked, short, tmp_path / "a.jsonl", name="m")
    alone = [by_hand([row["turns"][0]], 5 if row["question_id"] == 1 else 12) for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert [line["choices"][0]["turns"] for line in lines] == [answers for answers, _ in alone]
    assert told["unfinished"] == sum(unfinished for _, unfinished in alone)
    with pytest.raises(
        ValueError, match=r"evaluate.answers: expected prompts shorter than the model's 20 positions"
    ):
        write_answers("mt-bench", asked, writer(positions=20), tmp_path / "b.jsonl", name="m")
    assert not (tmp_path / "b.jsonl").exists()


def test_left_padding_changes_no_answer() -> None:
    model = install_head(words.counting_model())
    prompts = [[9, 10, 11], [9], list(range(9, 30))]
    options: dict[str, Any] = {"ends": [words.END], "pad_id": 0, "max_new_tokens": 12}
    with greedy(model.base, [words.END]):
        together = answer_batch(model, prompts, **options)
        assert together == [answer_batch(model, [prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize(
    "form, row, message",
    [
        ("mt-bench", {"turns": ["a"]}, "question_id: expected a number or a text, got None"),
        ("mt-bench", {"question_id": 82, "turns": "a"}, "turns: expected a list of texts, got 'a'"),
        ("mt-bench", {"question_id": 82, "turns": ["a", " "]}, "turns: expected a list of texts"),
        ("mt-bench", {"question_id": 81, "turns": ["a"]}, "expected each question once, got '81' again"),
        ("alpaca-eval", {"instruction": ""}, "instruction: expected a text, got ''"),
        ("alpaca-eval", {"instruction": "a", "input": "b"}, "input: expected none"),
        ("alpaca-eval", {"instruction": "once"}, "expected each question once, got 'once' again"),
        ("alpaca-eval", [1], "expected an object, got"),
    ],
)
def test_a_row_that_is_no_question_is_refused_by_its_place(
    tmp_path: Path, form: str, row: Any, message: str
) -> None:
    good = {"mt-bench": {"question_id": 81, "turns": ["a"]}, "alpaca-eval": {"instruction": "once"}}
    path = question_file(tmp_path / "q.jsonl", [good[form], row])
    with pytest.raises(ValueError, match=message) as caught:
        read_questions(form, path)
    assert str(caught.value).startswith("evaluate.answers: ") and "q.jsonl, line 2: " in str(caught.value)
