"""Every architecture goes the whole road of a run; plain transformers then finds in its files what was trained.

One case each of a dense model, adapters on experts and transposed weights runs always, the matrix where slow tests run.
Where ``SFTMIX_ARCHITECTURES`` names a folder, what came out is written there for ``architectures_page``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sftmix.config import Config, load_config
from sftmix.data.tokenized import TokenizedExample
from sftmix.evaluation.figures import evaluate_model
from sftmix.run import stages
from sftmix.run.session import Session
from tests.recipe import tiny
from tests.recipe.model.architectures import CASES, REFUSED, ROWS, build, causal_lm, class_of
from tests.recipe.model.architectures_page import PAGE, RESULTS, TUNINGS, results

SMALL = [("llama", "full"), ("mixtral", "lora"), ("gpt2", "full"), ("ernie4_5_moe", "bfloat16")]
FLAGS = [
    "model.dtype=float32", "train.batch_size=4", "train.micro_batch_size=4", "train.epochs=1", "train.max_steps=3",
    "reference.epochs=1", "optim.lr=0.01", "lora.rank=2", "evaluate.num_samples=1", "evaluate.max_new_tokens=4",
]  # fmt: skip


def conversations(path: Path, count: int, *, seed: int) -> Path:
    """A file of ``count`` prompts and answers in the tokenizer's words, of differing length."""
    draw = torch.Generator().manual_seed(seed)

    def words(number: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(0, tiny.VOCAB - 7, (number,), generator=draw))

    rows = [{"prompt": words(1 + n % 3), "completion": words(2 + n % 5)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def configuration(folder: Path, base: Path, tuning: str) -> Config:
    train, heldout = (
        conversations(folder / f"{n}.jsonl", count, seed=count) for n, count in (("t", 12), ("h", 5))
    )
    given = [
        f"run_dir={folder / 'run'}",
        f"model.name={base}",
        f"data.train={train}",
        f"data.heldout={heldout}",
    ]
    kind = "model.dtype=bfloat16" if tuning == "bfloat16" else f"train.tuning={tuning}"
    return load_config(None, [*given, *FLAGS, kind])


@torch.no_grad()
def nll(model: Any, examples: Sequence[TokenizedExample]) -> float:
    """Mean negative log-likelihood of the supervised tokens, one sequence at a time, from the model's own logits."""
    found = []
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0].double()  # [T, V]
        log_p = logits.log_softmax(-1)
        found += [
            -float(log_p[t - 1, example.input_ids[t]]) for t, is_on in enumerate(example.supervised) if is_on
        ]
    return math.fsum(found) / len(found)


def loaded(folder: Path, **options: Any) -> Any:
    """The model as plain transformers loads it, with nothing missing from the files and nothing left over."""
    both: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, told = both
    assert not any(told.values()), told
    return model.eval()


def shapes(folder: Path) -> dict[str, list[int]]:
    """The tensors in a folder's files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_slice(name).get_shape() for name in file.keys()})
    return found


def moved_share(model: Any, base: Any) -> float:
    """Of the parameters in the decoder's blocks, the share that stands in tensors that training changed."""
    before = dict(base.named_parameters())
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if any(part.isdigit() for part in name.split(".")):
            sizes[not torch.equal(parameter, before[name])] += parameter.numel()
    return sizes[True] / sum(sizes.values())


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a test of the matrix finds, written as a line for the page; a test that fails finds nothing."""
    outcome: dict[str, Any] = {}
    yield outcome
    folder = os.environ.get(RESULTS)
    if folder:
        case = {key: request.getfixturevalue(key) for key in ("name", "tuning")}
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**case, "transformers": transformers.__version__, **outcome}) + "\n")


def goes_the_road(name: str, tuning: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """A whole run: what stood in memory after training, in the exported files, and in evaluation.json is one.

    Gives the share of the parameters that training reached.
    """
    base = build(name, folder / "base")
    session = Session(configuration(folder, base, tuning))
    export, trained = stages.merge_and_export, []

    def watched(model: Any, *arguments: Any, **options: Any) -> Any:
        trained.append(evaluate_model(model, session.heldout, pad_id=session.pad_id)["nll"])
        return export(model, *arguments, **options)

    monkeypatch.setattr(stages, "merge_and_export", watched)
    # Pictures know no architecture, and take more than half of the time.
    monkeypatch.setattr(stages, "plot", lambda session: [])
    stages.run(session, methods=("sftmix",))

    exported = folder / "run" / "train-sftmix" / "model"
    told = json.loads((folder / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert shapes(exported) == shapes(base)
    dtype = torch.bfloat16 if tuning == "bfloat16" else torch.float32
    before, after = loaded(base, dtype=dtype), loaded(exported)
    assert {n: p.dtype for n, p in after.named_parameters()} == {
        n: p.dtype for n, p in before.named_parameters()
    }
    near = partial(pytest.approx, rel=1e-4 if tuning != "bfloat16" else 2e-2)  # its own logits are rounded
    assert nll(before, session.heldout) == near(told["base"]["nll"])
    assert nll(after, session.heldout) == near(told["sftmix"]["nll"])
    assert trained == [pytest.approx(told["sftmix"]["nll"], rel=1e-4)]
    assert abs(told["sftmix"]["nll"] - told["base"]["nll"]) > 1e-3
    share = moved_share(after, before)
    assert share > 0
    return share


def refusal(name: str, tuning: str, folder: Path) -> str:
    """The sentence that a run ends with, before anything is trained."""
    session = Session(configuration(folder, build(name, folder / "base"), tuning))
    with pytest.raises(ValueError, match=REFUSED[name, tuning]) as error:
        stages.run(session, methods=("sftmix",))
    assert not list((folder / "run").glob("*/metrics.jsonl"))
    return str(error.value)


@pytest.mark.parametrize(("name", "tuning"), SMALL)
def test_what_is_exported_is_what_was_trained(
    name: str, tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_the_road(name, tuning, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tuning"), CASES)
def test_every_architecture_is_exported_as_it_was_trained_or_refused(
    name: str, tuning: str, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, tuning) in REFUSED:
        found["refused"] = refusal(name, tuning, tmp_path)
    else:
        found["share"] = goes_the_road(name, tuning, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_causal_model_whose_padding_is_masked(name: str, tmp_path: Path) -> None:
    """What the matrix takes for granted: files, loss, causality and padding of the plain model."""
    made, model = causal_lm(name), loaded(build(name, tmp_path))
    ids = torch.randint(7, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    changed, padded = ids.clone(), torch.nn.functional.pad(ids, (0, 3))
    changed[:, -1] = 7 + (ids[:, -1] - 6) % (tiny.VOCAB - 7)
    with torch.no_grad():
        whole = model(ids, labels=ids)
        last = model(changed).logits
        masked = model(padded, attention_mask=(torch.arange(15) < 12).expand(2, 15).long()).logits[:, :12]
        again = made(ids).logits
    assert torch.isfinite(whole.loss)
    near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    near(again, whole.logits)
    near(last[:, :-1], whole.logits[:, :-1])
    assert not torch.allclose(last[:, -1], whole.logits[:, -1], rtol=0, atol=1e-5)
    near(masked, whole.logits)


def test_the_page_names_the_architectures_and_the_refusals() -> None:
    rows = [
        line.strip("| ").split(" | ")
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line[:2] == "| "
    ]
    cells = {row[0]: row for row in rows[1:]}
    assert sorted(cells) == sorted(ROWS) and len(rows) == len(ROWS) + 1
    assert {name: row[1] for name, row in cells.items()} == {name: class_of(name) for name in ROWS}
    for name, row in cells.items():
        for tuning, cell in zip(TUNINGS, row[2:], strict=True):
            if (name, tuning) in REFUSED:
                assert re.search(REFUSED[name, tuning], cell), name
            elif (name, tuning) in CASES:  # no ✗: every test of the matrix passed
                assert re.fullmatch(r"✓ \d+ %" if tuning == "lora" else "✓", cell), name
            else:
                assert cell == "—", name


@pytest.mark.parametrize("page", ["README.md", "sftmix/README.md", "CHANGELOG.md"])
def test_the_number_of_architectures_is_the_tables(page: str) -> None:
    text = " ".join((PAGE.parents[2] / page).read_text(encoding="utf-8").split())
    assert re.search(rf"\b{len(ROWS)} (architectures of transformers are taken|that are taken)", text)


def test_the_page_takes_one_line_of_one_version_for_every_case(tmp_path: Path) -> None:
    lines = [json.dumps({"name": name, "tuning": tuning, "transformers": "5"}) for name, tuning in CASES]
    (tmp_path / "1.jsonl").write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"none for {CASES[0][0]} full$"):
        results(tmp_path)
    (tmp_path / "2.jsonl").write_text(lines[0], encoding="utf-8")
    assert set(results(tmp_path)) == set(CASES)
    (tmp_path / "2.jsonl").write_text(lines[0].replace('"5"', '"6"'), encoding="utf-8")
    with pytest.raises(ValueError, match="one version of transformers, got 5, 6"):
        results(tmp_path)
    (tmp_path / "3.jsonl").write_text(lines[1], encoding="utf-8")
    with pytest.raises(ValueError, match=f"one line for {CASES[1][0]} full, got two"):
        results(tmp_path)
