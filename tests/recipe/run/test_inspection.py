"""``sftmix data``: account and examples in a pipe and as JSON, exit codes, and the cases that went wrong before."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sftmix import cli
from sftmix.config import ModelConfig
from sftmix.data.forms import forms_table
from sftmix.model.tokenizer import generation_stops, longest, positions
from sftmix.run.inputs import settle_date
from tests.recipe import tiny

QWEN_LIKE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think> ' + (m.reasoning_content or '') + ' </think> ' }}{% endif %}{{ m['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
DOLLY = {"instruction": "w1", "context": "w2", "response": "w3", "category": "c"}
EXAMPLE_KEYS = {"id", "source", "text", "tokens"}
ACCOUNT_KEYS = {
    "rows_read", "rows_used", "dropped", "ignored", "cut", "duplicates", "supervised_tokens", "tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.causal_lm("gpt2").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sftmix", "data", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    out, err = capsys.readouterr()
    return int(code or 0), out, err


def objects(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, list[dict[str, Any]]]:
    code, out, _ = data(capsys, *arguments, "--json")
    return code, [json.loads(line) for line in out.splitlines()]


def test_json_lines(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", DOLLY, DOLLY, {**DOLLY, "response": "w4 w5"})
    code, (account, *examples) = objects(capsys, file, "--model", model, "--limit", 2)
    assert code == 0 and set(account) >= ACCOUNT_KEYS
    assert (account["rows_read"], account["rows_used"], account["duplicates"]) == (3, 3, 1)
    assert account["ignored"] == {"category": 3} and account["dropped"] == {} and account["cut"] == 0
    assert len(examples) == 2 and all(set(example) == EXAMPLE_KEYS for example in examples)
    first, copy = examples
    assert copy["id"] == first["id"] + "-2" and copy["source"] == f"{file}, line 2"
    assert "".join(text for text, _ in first["tokens"]) == first["text"]
    trained = [text.strip() for text, weight in first["tokens"] if weight]
    assert trained == ["w3", "<|im_end|>"]
    asked = first["text"].split()
    assert asked.index("w1") < asked.index("w2") < asked.index("w3")  # case 01: the context is in the prompt
    assert account["supervised_tokens"] == 2 + 2 + 3
    code, lines = objects(capsys, file, "--model", model, "--limit", 0)
    assert code == 0 and len(lines) == 1


def test_refused_data_end_with_2_after_the_account(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", DOLLY, {"instruction": "w1", "response": ""})
    code, (account, *examples) = objects(capsys, file, "--model", model)
    assert code == 2 and account["dropped"] == {"empty answer": 1} and len(examples) == 1
    assert account["faults"][0]["place"] == f"{file}, line 2"
    code, out, err = data(capsys, file, "--model", model)
    assert code == 2 and f"{file}, line 2: " in out and "data.bad_rows=drop" in err
    assert data(capsys, file, "--model", model, "--data.bad_rows", "drop")[0] == 0


def test_in_a_pipe(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", DOLLY, {**DOLLY, "response": "w4 w5"})
    code, out, _ = data(capsys, file, "--model", model, "--limit", 1)
    assert code == 0 and "\x1b" not in out
    for line in (
        "rows: 2 of 2 used (2 dolly)",
        "ignored fields: 2 category",
        "cut to the longest length: 0 examples",
    ):
        assert line in out.splitlines()
    assert "at most 64 tokens" in out  # the model's positions
    assert "⟦ w3 <|im_end|>" in out and "w4" not in out


def test_weights_of_turns_are_shown(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """Case 04, and a fraction."""
    turns = [("user", "w1", None), ("assistant", "w2", 0), ("user", "w3", None), ("assistant", "w4", 0.5)]
    messages = [
        {"role": role, "content": text, **({} if weight is None else {"weight": weight})}
        for role, text, weight in turns
    ]
    _, (_, example) = objects(capsys, write(tmp_path / "a.jsonl", {"messages": messages}), "--model", model)
    told = {text.strip(): weight for text, weight in example["tokens"] if text.strip().startswith("w")}
    assert told == {"w1": 0, "w2": 0, "w3": 0, "w4": 0.5}


def test_reasoning_reaches_the_template_or_is_refused(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    """Case 06: by either name, and never an empty thought in its place."""
    for key in ("reasoning_content", "thinking"):
        row = {
            "messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", key: "w9"}]
        }
        file = write(tmp_path / "a.jsonl", row)
        template = tmp_path / "t.jinja"
        template.write_text(QWEN_LIKE)
        code, (_, example) = objects(capsys, file, "--model", model, "--data.chat_template", template)
        assert code == 0 and ["w9", 1.0] in [[text.strip(), weight] for text, weight in example["tokens"]]
        code, (account,) = objects(capsys, file, "--model", model)
        assert code == 2 and account["dropped"] == {"text that the chat template leaves out": 1}
        code, (account, _) = objects(capsys, file, "--model", model, "--data.template_drops", "allow")
        assert code == 0 and account["notes"]["text that the chat template leaves out"] == 1


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"prompt": "w1", "question": "w2", "answer": "w3"}, "ambiguous columns"),  # case 03
        ({"messages": [{"role": "narrator", "content": "w1"}, {"role": "assistant", "content": "w2"}]}, "unknown role"),
        (  # case 13
            {"messages": [
                {"role": "user", "content": "w1"},
                {"role": "assistant", "content": "", "function_call": {"name": "w5", "arguments": "{}"}},
                {"role": "function", "name": "w5", "content": "w6"},
                {"role": "assistant", "content": "w2"},
            ]},
            "text that the chat template leaves out",
        ),
        ({"prompt": "w1", "completion": "w2 \ud800"}, "lone surrogate"),  # case 26
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_line(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, row: Any, kind: str
) -> None:
    file = write(tmp_path / "a.jsonl", DOLLY, row)
    code, (account, *_) = objects(capsys, file, "--model", model)
    assert (
        code == 2 and account["dropped"] == {kind: 1} and account["faults"][0]["place"] == f"{file}, line 2"
    )


def test_roles_by_other_names(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """Case 11: no turn vanishes from the text or from the loss."""
    turns = [
        ("human", "w1"),
        ("gpt", "w2"),
        ("User", "w3"),
        ("Assistant", "w4"),
        ("user", "w5"),
        ("model", "w6"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in [("developer", "w9"), *turns]]}
    code, (_, example) = objects(capsys, write(tmp_path / "a.jsonl", row), "--model", model)
    told = {text.strip(): weight for text, weight in example["tokens"] if text.strip().startswith("w")}
    assert code == 0 and told == {"w9": 0, "w1": 0, "w2": 1, "w3": 0, "w4": 1, "w5": 0, "w6": 1}


def test_the_forms_are_listed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = data(capsys, "--forms")
    assert code == 0 and "…" not in out
    for name in (
        "messages",
        "alpaca",
        "dolly",
        "question",
        "prompt_completion",
        "preference",
        "tokens",
        "text",
    ):
        assert name in out
    for _, columns, _ in forms_table():
        assert all(name in out for name in re.findall(r"\w+", columns))


def test_the_longest_length_is_the_models_positions_at_most_2048(model: Path, tmp_path: Path) -> None:
    """GPT-2's 1,024 positions ended in an IndexError at step 3."""
    here = ModelConfig(name=str(model))
    assert positions(here) == 64 and longest(here, None) == 64 and longest(here, 64) == 64
    with pytest.raises(
        ValueError, match=r"data\.max_length: expected at most the 64 positions of .*, got 65"
    ):
        longest(here, 65)
    tiny.causal_lm("llama", max_position_embeddings=8192).save_pretrained(tmp_path / "long")
    long = ModelConfig(name=str(tmp_path / "long"))
    assert longest(long, None) == 2048 and longest(long, 8192) == 8192
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    alone = ModelConfig(name=str(tmp_path / "tokenizer"))
    assert positions(alone) is None and longest(alone, None) == 2048 and generation_stops(alone) == ()


def test_where_generation_stops(tmp_path: Path) -> None:
    model = tiny.causal_lm("llama", eos_token_id=5)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path / "m")
    assert generation_stops(ModelConfig(name=str(tmp_path / "m"))) == (7, 9)
    (tmp_path / "m" / "generation_config.json").unlink()
    assert generation_stops(ModelConfig(name=str(tmp_path / "m"))) == (5,)


def test_a_limit_below_0_is_refused(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    code, _, err = data(capsys, "x.jsonl", "--model", model, "--limit", -1)
    assert code == 2 and "limit: expected at least 0, got -1" in err


def test_the_date_of_a_run_is_fixed_when_it_begins() -> None:
    """A run that goes on tomorrow renders what it rendered today."""
    fresh = tiny.config()
    begun = settle_date(fresh)
    assert begun.data.date == datetime.date.today().isoformat()
    earlier = settle_date(tiny.config("data.date=2025-12-31"))
    assert earlier.data.date == "2025-12-31"
    assert settle_date(fresh, earlier).data.date == "2025-12-31"
    assert settle_date(tiny.config("data.date=2026-01-01"), earlier).data.date == "2026-01-01"
