"""The contract on a trained model's hidden states, head and text: peaked rows, correlated rows, rare tokens.

SmolLM2-135M-Instruct (V = 49152, D = 576) reads answers of MedQuAD. Random logits have no row with p > 0.999; these do.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.parity import Case, assert_parity, assert_within_contract, run

pytestmark = pytest.mark.slow  # the model's dequantisation alone takes half a minute

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NUM_ROWS, NUM_PAIRS = 192, 80


@pytest.fixture(scope="module")
def real_case(shared_data: Path) -> Case:
    """192 rows in float32, 80 pairs and 32 unpaired rows, with the most confident predictions in four answers."""
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    from sftmix.demo.job import find_smollm2

    try:
        folder, gguf_file = find_smollm2()
    except ValueError as missing:
        pytest.skip(str(missing))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=F32)
    with lzma.open(shared_data / "medquad_heldout.jsonl.xz", "rt", encoding="utf-8") as file:
        conversations = [json.loads(next(file))["messages"] for _ in range(4)]
    hidden, target = [], []
    with torch.no_grad():
        for messages in conversations:
            ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids])
            hidden.append(model.get_decoder()(ids).last_hidden_state[0, :-1])
            target.append(ids[0, 1:])
    rows, labels = torch.cat(hidden), torch.cat(target)
    weight = model.get_output_embeddings().weight.detach()
    nll = torch.nn.functional.cross_entropy(rows @ weight.T, labels, reduction="none")
    # The most confident, then every k-th of the rest: both ends of the distribution, in the order of the text.
    best = nll.argsort()[:40]
    rest = torch.ones(len(nll), dtype=torch.bool)
    rest[best] = False
    others = rest.nonzero().squeeze(1)
    others = others[torch.linspace(0, len(others) - 1, NUM_ROWS - 40).long()]
    chosen = torch.cat([best, others]).sort().values
    labels = labels[chosen].clone()
    labels[::17] = -100
    lam = torch.distributions.Beta(0.5, 0.5).sample((NUM_PAIRS,)).clamp(0, 1)
    return Case(rows[chosen].clone(), weight, labels, lam)


def check(case: Case, *, impl: str, scratch_bytes: int) -> None:
    """The contract over all rows, and once more over the gradients of the rows with p > 0.999 alone."""
    ours = assert_parity(case, impl=impl, scratch_bytes=scratch_bytes)
    truth, same_dtype = run(case, impl="reference", dtype=torch.float64), run(case, impl="reference")
    confident = (truth["nll"] < 1e-3) & (case.target >= 0)
    assert confident.sum() >= 8, "no row with p > 0.999 among them"
    assert truth["nll"].max() > 5, "no surprising token among them"
    for name in ("nll", "dhidden"):
        assert_within_contract(
            f"{name} where p > 0.999",
            ours[name][confident],
            same_dtype[name][confident],
            truth[name][confident],
        )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_pairs", [NUM_PAIRS, 0])
def test_chunked(real_case: Case, dtype: torch.dtype, num_pairs: int) -> None:
    case = replace(
        real_case,
        hidden=real_case.hidden.to(dtype),
        weight=real_case.weight.to(dtype),
        lam=real_case.lam[:num_pairs],
    )
    check(case, impl="chunked", scratch_bytes=49152 * 4 * 30)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_fused_on_a_slice_of_rows(real_case: Case, dtype: torch.dtype) -> None:
    """64 rows, 24 pairs, the whole vocabulary."""
    nll = run(replace(real_case, lam=real_case.lam[:0]), impl="chunked")["nll"]
    order = nll.masked_fill(real_case.target < 0, 100).argsort()
    rows = torch.cat([order[:24], order[24::4][:40]])
    case = Case(
        real_case.hidden[rows].to(dtype),
        real_case.weight.to(dtype),
        real_case.target[rows],
        real_case.lam[:24],
    )
    check(case, impl="fused", scratch_bytes=64 * 4 * 8192)
