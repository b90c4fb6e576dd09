"""Faults that the tests named in README.md must notice, put into a copy of the package one at a time.

    python -m tests.kernels.mutations [WORD ...]       those whose complaint or text has a WORD; minutes for all

Each named test passes on the unchanged copy and must fail on the changed one; a fault that is not noticed is printed
as SURVIVED and makes the exit status 1. test_mutations.py holds that this list fits the code and the README.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("sftmix_kernels", "tests", "pyproject.toml")
KERNELS = "sftmix_kernels/"
COMPLAINTS = "tests/kernels/test_complaints.py::"


class Edit(NamedTuple):
    """``old`` occurs exactly once in ``file`` of the package."""

    file: str
    old: str
    new: str


class Mutation(NamedTuple):
    """A fault: whose complaint it is, in words, as edits, and the test that must fail."""

    complaint: str  # how the row of README.md's table begins
    what: str  # the row's last column says this
    test: str
    edits: tuple[Edit, ...]


def fault(complaint: str, what: str, test: str, *edits: tuple[str, str, str]) -> Mutation:
    return Mutation(complaint, what, test, tuple(Edit(KERNELS + edit[0], *edit[1:]) for edit in edits))


MUTATIONS = (
    fault(
        "Liger 512", "a 16-bit running sum over chunks",
        COMPLAINTS + "test_liger_512_dweight_sums_do_not_stall[chunked-bfloat16]",
        (
            "chunked.py", "elif self.product_scale is None:\n                self.dweight[columns] += product\n",
            "elif self.product_scale is None:\n"
            "                self.dweight[columns] = self.dweight[columns].to(product.dtype) + product\n",
        ),
    ),
    fault(
        "Liger 1329", "p rounded to 16 bits before 1 is subtracted, in `chunked`",
        COMPLAINTS + "test_liger_1329_target_gradient_at_high_confidence[9.0-chunked-bfloat16]",
        ("rows.py", "residual = torch.expm1(logprob)\n", "residual = logprob.exp().bfloat16().float() - 1\n"),
    ),
    fault(
        "Liger 1329", "and in `fused`",
        COMPLAINTS + "test_liger_1329_target_gradient_at_high_confidence[9.0-fused-float16]",
        (
            "fused/recompute.py", "row_coef * torch.exp(-low), torch.expm1(-nll)\n",
            "row_coef * torch.exp(-low), torch.exp(-nll).half().float() - 1\n",
        ),
    ),
    fault(
        "TRL", "dhidden rounded to 16 bits after every slice",
        COMPLAINTS + "test_trl_dhidden_is_not_rounded_at_every_slice_of_the_vocabulary[fused-float16]",
        (
            "fused/recompute.py", "add_product(dhidden, dlogits, part_problem.weight)\n",
            "add_product(dhidden, dlogits, part_problem.weight)\n"
            "            dhidden.copy_(dhidden.to(dlogits.dtype))\n",
        ),
    ),
    fault(
        "Liger 968", "the first row's upstream for all rows, in `chunked`",
        COMPLAINTS + "test_liger_968_reduction_none_takes_any_upstream[chunked-float32]",
        (
            "row_ops.py", "coef = torch.where(target >= 0, grad_rows, torch.zeros_like(grad_rows))",
            "coef = torch.where(target >= 0, grad_rows[0], torch.zeros_like(grad_rows))",
        ),
    ),
    fault(
        "Liger 968", "and in `fused`",
        COMPLAINTS + "test_liger_968_reduction_none_takes_any_upstream[fused-float32]",
        (
            "fused_ops.py", "    a = (row_coef * grad_loss).float()\n",
            "    a = (row_coef * grad_loss.flatten()[0]).float()\n",
        ),
    ),
    fault(
        "Liger 1338", "a mean over all rows of the traced shape",
        COMPLAINTS + "test_liger_1338_compile_with_an_ignored_row[ignored0-chunked]",
        ("arguments.py", "count = valid.sum().clamp(min=1) if", "count = valid.numel() if"),
    ),
    fault(
        "apple 59", "only -100 taken for a sentinel, in `chunked`",
        COMPLAINTS + "test_apple_59_a_sentinel_never_matches_a_padded_column[33-chunked]",
        ("functional.py", "        valid = target != ignore_index\n", "        valid = target != -100\n"),
    ),
    fault(
        "apple 59", "and in `fused`",
        COMPLAINTS + "test_apple_59_a_sentinel_never_matches_a_padded_column[63-fused]",
        ("functional.py", "        valid = target != ignore_index\n", "        valid = target != -100\n"),
    ),
    fault(
        "apple 59", "a target of a later shard taken for this one's last column",
        "tests/kernels/test_vocab_parallel.py::test_apple_59_a_sentinel_matches_no_column_of_another_shard",
        (
            "vocab_stats.py", "(column >= 0) & (column < num_columns), column, -1)",
            "(column >= 0), column.clamp(max=num_columns - 1), -1)",
        ),
    ),
    fault(
        "apple 53", "the bias added twice, in `chunked`",
        COMPLAINTS + "test_apple_53_bias_added_once[chunked]",
        ("rows.py", "torch.addmm(head.bias, first,", "torch.addmm(2 * head.bias, first,"),
    ),
    fault(
        "apple 53", "and in `fused`",
        COMPLAINTS + "test_apple_53_bias_added_once[fused]",
        ("fused/tiles.py", "other=0.0).to(tl.float32)[None, :]", "other=0.0).to(tl.float32)[None, :] * 2.0"),
    ),
    fault(
        "unsloth 5230", "a chunk without gradients when its first row is ignored",
        COMPLAINTS + "test_unsloth_5230_last_turn_masks[chunked]",
        (
            "chunked.py", "    state.products(group, chunk, hidden, low, stored)\n",
            "    stored.mul_(group.of(state.target, chunk)[0, 0] >= 0)\n"
            "    state.products(group, chunk, hidden, low, stored)\n",
        ),
    ),
    fault(
        "unsloth 5230", "no gradients at all when the first row is ignored, in `fused`",
        COMPLAINTS + "test_unsloth_5230_last_turn_masks[fused]",
        (
            "fused_ops.py", "    a = (row_coef * grad_loss).float()\n",
            "    a = (row_coef * grad_loss * (target[0] >= 0)).float()\n",
        ),
    ),
    fault(
        "trl 6629", "a head that drops its softcap",
        COMPLAINTS + "test_trl_6629_softcap_and_logit_scale[{'softcap': 3.0}-chunked]",
        ("head.py", '"softcap": self.softcap, "logit', '"softcap": None, "logit'),
    ),
    fault(
        "trl 6629", "`token_stats` that drops the scale",
        COMPLAINTS + "test_trl_6629_softcap_and_logit_scale[{'logit_scale': 0.25}-fused]",
        ("fused_ops.py", "logit_scale=options[1]", "logit_scale=1.0"),
    ),
    fault(
        "quack 209", "saved gradients scaled in place",
        COMPLAINTS + "test_quack_209_retained_graph[mean-chunked]",
        (
            "ops.py", "        torch.mul(gradient, factor, out=output)\n        return\n",
            "        output.copy_(gradient.detach().data.mul_(factor))\n        return\n",
        ),
    ),
    fault(
        "transformers 34191", "a mean per micro-batch whatever the denominator given",
        COMPLAINTS + "test_transformers_34191_tokens_not_steps[chunked]",
        (
            "arguments.py", "valid.sum().clamp(min=1) if denominator is None else denominator",
            "valid.sum().clamp(min=1)",
        ),
    ),
    fault(
        "apple 37", "32-bit offsets into weight",
        "tests/kernels/test_shapes_edge.py::test_apple_37_weight_offsets_past_2_31[2^30-fused]",
        ("fused/tiles.py", "BLOCK_V), vocab_size - 1).to(tl.int64)", "BLOCK_V), vocab_size - 1)"),
    ),
    fault(
        "apple 37", "into hidden",
        "tests/kernels/test_shapes_edge.py::test_apple_37_hidden_offsets_past_2_31[2^30-fused]",
        (
            "fused/tiles.py", "BLOCK_N), num_rows - 1)\n",
            "BLOCK_N), num_rows - 1).to(tl.int32)\n",
        ),
    ),
    fault(
        "apple 37", "into the slice of dlogits",
        "tests/kernels/test_offsets.py::test_apple_37_dlogits_offsets_past_2_31[recompute-rows]",
        (
            "fused/recompute.py", "offs_n = first_n + tl.arange(0, value.shape[0])",
            "offs_n = (first_n + tl.arange(0, value.shape[0])).to(tl.int32)",
        ),
    ),
    fault(
        "apple 37", "into the stored chunk, for rows",
        "tests/kernels/test_offsets.py::test_apple_37_dlogits_offsets_past_2_31[stored-rows]",
        ("fused/stored.py", "c = logits + tl.program_id(0).to(tl.int64) *", "c = logits + tl.program_id(0) *"),
    ),
    fault(
        "apple 37", "and for partners",
        "tests/kernels/test_offsets.py::test_apple_37_dlogits_offsets_past_2_31[stored-pairs]",
        (
            "fused/stored.py", "u = logits + (chunk_rows + tl.program_id(0).to(tl.int64)) *",
            "u = logits + (chunk_rows + tl.program_id(0)) *",
        ),
    ),
    fault(
        "Liger 177", "a division by zero rows",
        COMPLAINTS + "test_liger_177_all_labels_ignored[mean-chunked-float32]",
        ("arguments.py", "valid.sum().clamp(min=1) if", "valid.sum() if"),
        ("arguments.py", "return torch.where(valid, coef, torch.zeros_like(coef))", "return valid * coef"),
    ),
    fault(
        "Liger 501", "any floating weight accepted beside any hidden",
        COMPLAINTS + "test_liger_501_a_dtype_mismatch_outside_autocast_is_named[chunked]",
        ("checks.py", '"D": hidden.shape[1]}, (hidden.dtype,))', '"D": hidden.shape[1]}, FLOAT_DTYPES)'),
    ),
    fault(
        "Liger 501", "autocast that casts hidden alone",
        "tests/kernels/test_autocast.py::test_it_is_the_call_with_everything_cast",
        ("autocast.py", "for value in args[:2]]", "for value in args[:1]] + list(args[1:2])"),
    ),
    fault(
        "Liger 1316", "asking for it from capability 7.0 on",
        COMPLAINTS + "test_liger_1316_no_out_dtype_where_the_library_has_none",
        ("fused/products.py", "get_device_capability(tensor.device) >= (8, 0)",
         "get_device_capability(tensor.device) >= (7, 0)"),
    ),
    fault(
        "Liger 1294", "rows in a grid's second dimension",
        COMPLAINTS + "test_liger_1294_no_grid_limit_at_65536_rows[0-65536]",
        ("fused/stats.py", "[(triton.cdiv(size, block),)]", "[(1, size)]"),
    ),
    fault(
        "Liger 1294", "or blocks of rows in it",
        "tests/kernels/test_fused_kernels.py::test_the_grid_of_millions_of_rows_stays_within_limits",
        ("fused/forward.py", "[(num_blocks_n * splits,)]", "[(splits, num_blocks_n)]"),
    ),
    fault(
        "apple 31", "a DTensor taken for a plain tensor",
        "tests/kernels/test_checks.py::test_a_dtensor_weight_is_refused_and_the_head_named",
        (
            "checks.py", 'if type(value).__name__ == "DTensor":\n            _fail(name, "a local',
            'if False:\n            _fail(name, "a local',
        ),
    ),
    fault(
        "trl 6859", "no check of V and D",
        COMPLAINTS + "test_trl_6859_an_empty_weight_is_named[chunked]",
        ("checks.py", "if weight.shape[0] < 1 or weight.shape[1] < 1:", "if False:"),
    ),
    fault(
        "Digits lost at a smoothed label", "p - 1 + e, in `chunked`",
        "tests/kernels/test_properties.py::test_strong_smoothing_leaves_the_label_its_digits[chunked]",
        (
            "rows.py", "residual = (1 - e) * residual + (e * logprob.exp() - uniform_share(head))",
            "residual = residual + (e - uniform_share(head))",
        ),
    ),
    fault(
        "Digits lost at a smoothed label", "and in `fused`",
        "tests/kernels/test_properties.py::test_strong_smoothing_leaves_the_label_its_digits[recompute]",
        (
            "fused/recompute.py", "own = (1 - mass) * own + (mass * torch.exp(-nll) - uniform)",
            "own = own + (mass - uniform)",
        ),
    ),
    fault(
        "Digits lost at a smoothed label", "and in `stored`",
        "tests/kernels/test_properties.py::test_strong_smoothing_leaves_the_label_its_digits[stored]",
        (
            "fused/stored.py", "(1.0 - smoothing) * _expm1(log_p) + (smoothing * p - smoothing / vocab_size)",
            "_expm1(log_p) + (smoothing - smoothing / vocab_size)",
        ),
    ),
    fault(
        "Small terms lost in a float32 sum", "no compensation over tiles",
        "tests/kernels/test_fused_kernels.py::test_float32_sums_keep_what_many_small_tiles_add[0-1]",
        ("fused/stats.py", "rest = fade * rest + lost", "rest = fade * rest"),
    ),
    fault(
        "Small terms lost in a float32 sum", "over a row's blocks",
        "tests/kernels/test_stored.py::test_float32_sums_keep_what_many_small_blocks_add[0]",
        ("fused/stats.py", "rest = fade * rest + lost", "rest = fade * rest"),
    ),
    fault(
        "Small terms lost in a float32 sum", "over splits",
        "tests/kernels/test_fused_kernels.py::test_float32_sums_keep_what_many_small_tiles_add[0-64]",
        ("fused/stats.py", "rest = fade_old * rest + lost", "rest = fade_old * rest"),
    ),
    fault(
        "Accesses past a tensor's end", "a bias read without its mask",
        "tests/kernels/test_bounds.py::test_every_kernel_stays_inside_at_ragged_sizes[pointers]",
        ("fused/tiles.py", "tl.load(bias + offs_v, mask=offs_v < vocab_size, other=0.0)", "tl.load(bias + offs_v)"),
    ),
    fault(
        "Accesses past a tensor's end", "rows past the last one read",
        "tests/kernels/test_bounds.py::test_every_kernel_stays_inside_at_ragged_sizes[pointers]",
        (
            "fused/tiles.py", "tl.minimum(first_n + tl.arange(0, BLOCK_N), num_rows - 1)",
            "first_n + tl.arange(0, BLOCK_N)",
        ),
    ),
    fault(
        "Accesses past a tensor's end", "dlogits of columns past the last one stored",
        "tests/kernels/test_bounds.py::test_every_kernel_stays_inside_at_ragged_sizes[pointers]",
        (
            "fused/recompute.py", "mask = (offs_n < num_rows)[:, None] & (offs_v < vocab_size)[None, :]",
            "mask = (offs_n < num_rows)[:, None] & (offs_v >= 0)[None, :]",
        ),
    ),
    fault(
        "Accesses past a tensor's end", "statistics stored without their mask",
        "tests/kernels/test_bounds.py::test_every_kernel_stays_inside_at_ragged_sizes[pointers]",
        ("fused/stats.py", "tl.store(lse + offs, log_sum_exp, mask=is_row)", "tl.store(lse + offs, log_sum_exp)"),
    ),
)  # fmt: skip


def run(folder: Path, test: str) -> int:
    """pytest's exit status for ``test`` in the copy: 0 passed, 1 failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


def outcome(folder: Path, mutation: Mutation) -> str:
    """``killed``, ``SURVIVED``, or why neither can be said."""
    if run(folder, mutation.test) != 0:
        return "FAILS UNCHANGED"
    texts = {edit.file: (folder / edit.file).read_text(encoding="utf-8") for edit in mutation.edits}
    changed = dict(texts)
    for edit in mutation.edits:
        changed[edit.file] = changed[edit.file].replace(edit.old, edit.new)
    try:
        for name, text in changed.items():
            (folder / name).write_text(text, encoding="utf-8")
        status = run(folder, mutation.test)
    finally:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return {0: "SURVIVED", 1: "killed"}.get(status, f"DID NOT RUN (pytest's status {status})")


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.complaint} {m.what}" for word in words)]
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        for part in COPIED:
            source, target = ROOT / part, folder / part
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        for mutation in chosen:
            outcomes.append(outcome(folder, mutation))
            print(f"{outcomes[-1]:8} {mutation.complaint}: {mutation.what}  ({mutation.test})", flush=True)
    print(f"{outcomes.count('killed')} of {len(outcomes)} killed")
    return int(any(found != "killed" for found in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
