"""A whole training step, SFTMix beside next-token training on the same tokens: ``python -m bench.train``.

Llama decoders with random weights (the sizes of SmolLM2-135M and Llama-3.2-1B, head tied to the embedding), bfloat16,
AdamW: decoder, loss, backward, optimizer. Both steps are timed in interleaved rounds on one model. Needs transformers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, report
from bench.figures import OUT_OF_TIME, Figure, write_figures
from bench.measure import Case, interleave, measure_peak
from bench.problem import MIXUP_WEIGHT, TOLERANCE
from sftmix_kernels import LossHead, sftmix_loss

TASKS = ("step_ntp", "step_sftmix")
_CHECKED_ROWS = 512


@dataclass(frozen=True)
class Model:
    """A Llama decoder's sizes and its batch: ``num_sequences`` of ``length`` tokens, all of them supervised."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    num_sequences: int
    length: int

    @property
    def num_rows(self) -> int:
        return self.num_sequences * self.length


MODELS = {
    "smollm2-135m": Model(49152, 576, 1536, 30, 9, 3, 16, 512),
    "llama-1b": Model(128256, 2048, 8192, 16, 32, 8, 16, 512),
    "toy": Model(96, 32, 64, 2, 4, 2, 4, 8),
}


class Training:
    """One model, its batch and optimizer; a step of either loss."""

    def __init__(self, sizes: Model, dtype: str, device: str) -> None:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, num_hidden_layers=sizes.num_layers,
            intermediate_size=sizes.intermediate_size, num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_key_value_heads, max_position_embeddings=sizes.length, use_cache=False,
        )  # fmt: skip
        # Parameters are cast, not buffers: rounded rotary frequencies would be another model.
        with torch.device(device):
            self.decoder = LlamaModel(config).train()
        for parameter in self.decoder.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
        self.head = LossHead(sizes.hidden_size, sizes.vocab_size, device="meta")
        self.head.weight = self.decoder.get_parameter("embed_tokens.weight")
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=1e-5, fused=device == "cuda")
        shape = (sizes.num_sequences, sizes.length + 1)
        ids = torch.randint(sizes.vocab_size, shape, device=device)
        self.input_ids, self.target = ids[:, :-1], ids[:, 1:].reshape(-1)
        self.lam = torch.rand(sizes.num_rows // 2, device=device)

    def hidden(self) -> Tensor:
        return self.decoder(input_ids=self.input_ids).last_hidden_state.flatten(0, 1)

    def loss(self, task: str) -> Tensor:
        if task == "step_sftmix":
            return self.head(self.hidden(), self.target, self.lam, mixup_weight=MIXUP_WEIGHT).loss
        return self.head(self.hidden(), self.target).loss

    def step(self, task: str) -> Tensor:
        loss = self.loss(task)
        loss.backward()
        self.optimizer.step()
        return loss

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, dtype: str) -> None:
        """Raise ``ArithmeticError`` unless the loss of the first rows is that of the specification."""
        rows, pairs = min(_CHECKED_ROWS, len(self.target)), min(_CHECKED_ROWS, len(self.target)) // 2
        with torch.no_grad():
            args = (self.hidden()[:rows], self.target[:rows], self.lam[:pairs])
            ours = float(self.head(*args, mixup_weight=MIXUP_WEIGHT).loss)
            weight, hidden = self.head.weight.float(), args[0].float()
            truth = float(
                sftmix_loss(hidden, weight, *args[1:], mixup_weight=MIXUP_WEIGHT, impl="reference").loss
            )
        if not abs(ours - truth) <= TOLERANCE[dtype][0] * abs(truth):
            raise ArithmeticError(f"loss {ours:.7g} where {truth:.7g} is right")


def _figure(sizes: Model, task: str, case: Case, facts: dict[str, Any]) -> Figure:
    good = case.error is None and bool(case.times_ms)
    return Figure(
        **facts, task=task, direction="fwd_bwd", provider="ours", schedule="default", lam="row", N=sizes.num_rows,
        V=sizes.vocab_size, D=sizes.hidden_size, M=sizes.num_rows // 2 if task == "step_sftmix" else 0,
        rounds=len(case.times_ms), ms_median=round(statistics.median(case.times_ms), 4) if good else None,
        ms_min=round(min(case.times_ms), 4) if good else None, extra_peak_bytes=None,
        peak_bytes=case.peak_bytes if good else None, error=None if good else case.error or OUT_OF_TIME,
    )  # fmt: skip


def measure(sizes: Model, args: argparse.Namespace, facts: dict[str, Any]) -> list[Figure]:
    """Both steps of one model."""
    training = Training(sizes, args.dtype, args.backend)
    training.check(args.dtype)

    def call(task: str) -> Callable[[], Tensor]:
        return lambda: training.step(task)

    cases = [Case(task, call(task), training.clear) for task in TASKS]
    for case in cases:
        measure_peak(case, args.backend)
    for _ in interleave(cases, rounds=args.rounds, warmup=1, device=args.backend, deadline=args.deadline):
        pass
    return [_figure(sizes, case.name, case, facts) for case in cases]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 without transformers."""
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", default="smollm2-135m,llama-1b", help="comma list of " + ", ".join(MODELS)
    )
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(TOLERANCE))
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON lines")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--device", dest="backend", choices=("cpu", "cuda"))
    parser.add_argument("--provisional", action="store_true", help="mark figures of a busy machine")
    options = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(options)
    if unknown := set(args.models.split(",")) - set(MODELS):
        parser.error(f"models: expected {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    if find_spec("transformers") is None:
        print("bench.train: transformers is not installed", file=sys.stderr)
        return 2
    args.backend = args.backend or ("cuda" if torch.cuda.is_available() else "cpu")
    args.deadline = time.monotonic() + args.budget_seconds
    facts: dict[str, Any] = {
        "run_id": machine.new_run_id(), "commit": machine.commit(), "device": machine.device_name(args.backend),
        "versions": machine.versions(), "command": machine.command_line("bench.train", options),
        "dtype": args.dtype, "threads": torch.get_num_threads(), "provisional": args.provisional,
    }  # fmt: skip
    figures: list[Figure] = []
    path = args.out / f"{facts['run_id']}.jsonl"
    for name in args.models.split(","):
        figures += measure(MODELS[name], args, facts)
        write_figures(path, figures)
        ntp, mixed = (figure.ms_median or float("nan") for figure in figures[-2:])
        print(f"{name}: NTP {ntp:.4g} ms, SFTMix {mixed:.4g} ms, ratio {mixed / ntp:.3f}")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
