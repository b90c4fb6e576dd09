"""Held-out examples are not trained on: sources given twice, copies by id and by text, near copies of a part."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from sftmix.config import DataConfig
from sftmix.data.heldout import Overlap, check_sources, overlap, split_heldout
from sftmix.data.rows import Example


def example(name: str, question: str, answer: str, **more: Any) -> Example:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(id=name, messages=messages, **more)


def test_overlap_tells_copies_from_shared_prompts_and_answers() -> None:
    train = [
        example("a", "What is 1 + 1?", "Two, of course."), example("b", "Name a colour", "Green"),
        example("b-2", "Name a colour", "Green"), example("c", "Which sea?", "The Baltic"),
    ]  # fmt: skip
    heldout = [
        example("a", "What is 1 + 1?", "Two, of course.", place="h.jsonl, line 1"),
        example("x", "  name A\tcolour ", "GREEN\n", place="h.jsonl, line 2"),  # the same words
        example("y", "Which sea?", "The North Sea"), example("z", "Which lake?", "The Baltic"),
        example("w", "Who?", "Nobody"), example("w-2", "Who?", "Nobody"),
    ]  # fmt: skip
    found = overlap(iter(train), iter(heldout))
    first = ("h.jsonl, line 1", "h.jsonl, line 2")
    assert found == Overlap(6, 2, 1, 1, 1, 1, first=first)
    assert found.lines() == [
        "held-out: 2 of 6 examples are training examples too",
        "held-out: 1 of 6 examples share their prompt with a training example, not the answer",
        "held-out: 1 of 6 examples share their answer with a training example, not the prompt",
        "duplicates: 1 training examples are equal to an earlier one",
        "duplicates: 1 held-out examples are equal to an earlier one",
    ]
    with pytest.raises(
        ValueError, match=r"got 2 of 6 that are .first: h.jsonl, line 1, h.jsonl, line 2; b against a"
    ):
        found.check(train="a", heldout="b", allowed=False)
    found.check(train="a", heldout="b", allowed=True)


def test_the_same_words_under_another_role_or_turn_are_another_conversation() -> None:
    one = Example("a", ({"role": "system", "content": "Be brief"}, *example("", "Why?", "So").messages))
    two = Example("b", ({"role": "user", "content": "Be brief"}, *example("", "Why?", "So").messages))
    three = example("c", "Be brief Why?", "So")
    for train, heldout in ((one, two), (two, three), (one, three)):
        assert (overlap([train], [heldout]).same, overlap([train], [heldout]).same_prompt) == (0, 0)
    thinking = Example(
        "d", (one.messages[0], one.messages[1], {**one.messages[2], "reasoning_content": "hm"})
    )
    assert (overlap([one], [thinking]).same, overlap([one], [thinking]).same_prompt) == (0, 1)
    tools = Example("e", one.messages, tools=({"name": "search"},))
    assert overlap([one], [tools]).same == 0


def test_texts_and_ready_tokens_overlap_too() -> None:
    texts = [Example("a", text="Once upon a time"), Example("b", input_ids=(1, 2, 3))]
    again = [
        Example("c", text="once  upon a time"),
        Example("d", input_ids=(1, 2, 3)),
        Example("e", text="other"),
    ]
    found = overlap(texts, again)
    assert (found.same, found.same_prompt, found.same_answer) == (2, 0, 0)


def test_nothing_shared_is_nothing_said() -> None:
    found = overlap([example("a", "x", "y")], [example("b", "z", "u")])
    assert found.lines() == [] and found.same == 0
    found.check(train="a", heldout="b", allowed=False)
    assert overlap([], []) == Overlap(0, 0, 0, 0, 0, 0)


def test_ids_that_contain_a_hyphen_are_not_copies() -> None:
    found = overlap([example("row-a", "1", "2"), example("row-b", "3", "4")], [example("row-c", "5", "6")])
    assert (found.same, found.duplicates_train) == (0, 0)


def test_overlap_against_a_slow_count() -> None:
    draw = random.Random(0)

    def some(count: int, side: str) -> list[Example]:
        return [
            example(f"{side}{i}", f"q{draw.randrange(12)}", f"a{draw.randrange(12)}") for i in range(count)
        ]

    for _ in range(20):
        train, heldout = some(30, "t"), some(20, "h")
        texts = [tuple(m["content"] for m in e.messages) for e in train]
        same = prompt = answer = 0
        for e in heldout:
            q, a = (m["content"] for m in e.messages)
            if (q, a) in texts:
                same += 1
            elif any(q == other for other, _ in texts):
                prompt += 1
            elif any(a == other for _, other in texts):
                answer += 1
        found = overlap(train, heldout)
        assert (found.same, found.same_prompt, found.same_answer) == (same, prompt, answer)


def test_near_copies_of_one_conversation_stay_on_one_side() -> None:
    """They differ by a space or case, so their ids differ; on two sides the held-out figures would be learned."""
    examples = []
    for i in range(40):
        examples += [example(f"a{i}", f"Question {i}", "yes"), example(f"b{i}", f"question  {i} ", "Yes")]
    training, heldout = split_heldout(examples, 0.2)
    assert len(heldout) == 16 and len(training) == 64
    assert overlap(training, heldout).same == 0
    random.Random(1).shuffle(examples)
    assert {e.id for e in split_heldout(examples, 0.2)[1]} == {e.id for e in heldout}


def data(train: Path | str, heldout: Path | str | None, **more: Any) -> DataConfig:
    return DataConfig(train=str(train), heldout=None if heldout is None else str(heldout), **more)


def test_one_file_for_both_is_refused_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (file, other):
        path.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    (tmp_path / "link.jsonl").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    spellings = [
        "a.jsonl",
        "./a.jsonl",
        str(file),
        "link.jsonl",
        "b.jsonl,a.jsonl",
        "a*.jsonl",
        "../*/a.jsonl",
    ]
    for spelling in spellings if sys.platform != "win32" else spellings[:3]:
        with pytest.raises(
            ValueError, match=r"data.heldout: expected another source than data.train, got .*jsonl, which"
        ):
            check_sources(data("a.jsonl", spelling))
        check_sources(data("a.jsonl", spelling, allow_overlap=True))
    check_sources(data("a.jsonl", "b.jsonl"))
    check_sources(data("a.jsonl", None))
    with pytest.raises(ValueError, match=r"data.heldout: expected another source"):
        check_sources(data("a.jsonl", "a.jsonl", heldout_split="test"))  # a file has no splits


def test_a_folder_serves_both_by_two_splits(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    check_sources(data(tmp_path / "saved", tmp_path / "saved", heldout_split="test"))
    for split in (None, "train"):
        with pytest.raises(ValueError, match=r"data.heldout: expected another source"):
            check_sources(data(tmp_path / "saved", tmp_path / "saved", heldout_split=split))


def test_a_datasets_id_needs_its_split() -> None:
    """Without one the train split was read again, and the held-out figures were those of training examples."""
    for train in ("org/set", "other/set"):
        with pytest.raises(
            ValueError, match=r"data.heldout_split: expected the split of org/set to hold out"
        ):
            check_sources(data(train, "org/set"))
    with pytest.raises(ValueError, match=r"got org/set with split train for both"):
        check_sources(data("org/set", "org/set", heldout_split="train"))
    check_sources(data("org/set", "org/set", heldout_split="test"))
    check_sources(
        data("org/set", "org/set", configuration="a", heldout_configuration="b", heldout_split="train")
    )
    check_sources(data("org/set", "other/set", heldout_split="train"))
