"""Faults of losses that users of others reported, as edits of the package; mutations.py puts them in."""

from __future__ import annotations

from typing import NamedTuple

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


REPORTED = (
    fault(
        "Liger 512", "a 16-bit running sum over chunks",
        COMPLAINTS + "test_liger_512_dweight_sums_do_not_stall[chunked-bfloat16]",
        (
            "chunked/gradients.py",
            "elif self.product_scale is None:\n                self.dweight[columns] += product\n",
            "elif self.product_scale is None:\n"
            "                self.dweight[columns] = self.dweight[columns].to(product.dtype) + product\n",
        ),
    ),
    fault(
        "Liger 1329", "p rounded to 16 bits before 1 is subtracted, in `chunked`",
        COMPLAINTS + "test_liger_1329_target_gradient_at_high_confidence[9.0-chunked-bfloat16]",
        (
            "chunked/rows.py", "residual = torch.expm1(logprob) * weight\n",
            "residual = (logprob.exp().bfloat16().float() - 1) * weight\n",
        ),
    ),
    fault(
        "Liger 1329", "and in `fused`",
        COMPLAINTS + "test_liger_1329_target_gradient_at_high_confidence[9.0-fused-float16]",
        (
            "fused/row_terms.py", "p, own = torch.exp(-nll), torch.expm1(-nll)\n",
            "p, own = torch.exp(-nll), torch.exp(-nll).half().float() - 1\n",
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
        ("terms.py", "torch.where(coef.column >= 0, term.", "torch.where(coef.column >= 0, term[0]."),
    ),
    fault(
        "Liger 968", "and in `fused`",
        COMPLAINTS + "test_liger_968_reduction_none_takes_any_upstream[fused-float32]",
        ("terms.py", "torch.where(coef.column >= 0, term.", "torch.where(coef.column >= 0, term[0]."),
    ),
    fault(
        "Liger 1338", "a mean over all rows of the traced shape",
        COMPLAINTS + "test_liger_1338_compile_with_an_ignored_row[ignored0-chunked]",
        (
            "terms.py", "share = valid.sum(dtype=torch.float64).clamp_(min=1).reciprocal_()",
            "share = 1.0 / valid.numel()",
        ),
    ),
    fault(
        "apple 59", "only -100 taken for a sentinel, in `chunked`",
        COMPLAINTS + "test_apple_59_a_sentinel_never_matches_a_padded_column[33-chunked]",
        ("terms.py", "valid = call.target != call.wanted.ignore_index", "valid = call.target != -100"),
    ),
    fault(
        "apple 59", "and in `fused`",
        COMPLAINTS + "test_apple_59_a_sentinel_never_matches_a_padded_column[63-fused]",
        ("terms.py", "valid = call.target != call.wanted.ignore_index", "valid = call.target != -100"),
    ),
    fault(
        "apple 59", "a target of a later shard taken for this one's last column",
        "tests/kernels/test_vocab_parallel.py::test_apple_59_a_sentinel_matches_no_column_of_another_shard",
        (
            "vocab_parallel/statistics.py", "(column >= 0) & (own >= 0) & (own < num_columns), own, -1)",
            "(column >= 0) & (own >= 0), own.clamp(max=num_columns - 1), -1)",
        ),
    ),
    fault(
        "apple 53", "the bias added twice, in `chunked`",
        COMPLAINTS + "test_apple_53_bias_added_once[chunked]",
        ("chunked/rows.py", "torch.addmm(head.bias, first,", "torch.addmm(2 * head.bias, first,"),
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
            "chunked/gradients.py", "    state.products(group, chunk, hidden, low, stored)\n",
            "    stored.mul_(group.of(state.work.column, chunk)[0, 0] >= 0)\n"
            "    state.products(group, chunk, hidden, low, stored)\n",
        ),
    ),
    fault(
        "unsloth 5230", "no gradients at all when the first row is ignored, in `fused`",
        COMPLAINTS + "test_unsloth_5230_last_turn_masks[fused]",
        (
            "fused/row_terms.py", "    upstream, scale = _scaled_upstream(call, upstream)\n",
            "    upstream, scale = _scaled_upstream(call, upstream)\n"
            "    upstream = upstream._replace(row=upstream.row * (column[0] >= 0))\n",
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
        ("functional.py", "HeadOptions(softcap, logit_scale), rows", "HeadOptions(softcap), rows"),
    ),
    fault(
        "quack 209", "saved gradients scaled in place",
        COMPLAINTS + "test_quack_209_retained_graph[mean-chunked]",
        ("chunked/gradients.py", "return gradient * factor\n", "return gradient.data.mul_(factor).clone()\n"),
    ),
    fault(
        "transformers 34191", "a mean per micro-batch whatever the denominator given",
        COMPLAINTS + "test_transformers_34191_tokens_not_steps[chunked]",
        ("terms.py", "    if denominator is None:\n        share", "    if True:\n        share"),
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
        ("fused/stored_kernel.py", "c = logits + tl.program_id(0).to(tl.int64) *", "c = logits + tl.program_id(0) *"),
    ),
    fault(
        "apple 37", "and for partners",
        "tests/kernels/test_offsets.py::test_apple_37_dlogits_offsets_past_2_31[stored-pairs]",
        (
            "fused/stored_kernel.py", "u = logits + (chunk_rows + tl.program_id(0).to(tl.int64)) *",
            "u = logits + (chunk_rows + tl.program_id(0)) *",
        ),
    ),
    fault(
        "Liger 177", "a division by zero rows",
        COMPLAINTS + "test_liger_177_all_labels_ignored[mean-chunked-float32]",
        ("terms.py", ".clamp_(min=1).reciprocal_()", ".reciprocal_()"),
        ("terms.py", "return torch.where(valid, share, 0.0)", "return valid * share"),
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
)  # fmt: skip
