"""Faults that this loss had, or could have, as edits of the package; mutations.py puts them in."""

from __future__ import annotations

from tests.kernels.faults import fault

OWN = (
    fault(
        "Digits lost at a smoothed label", "p - 1 + e, in `chunked`",
        "tests/kernels/test_properties.py::test_strong_smoothing_leaves_the_label_its_digits[chunked]",
        (
            "chunked/rows.py",
            "residual = (1 - e) * residual + (head.spread * logprob.exp() - head.uniform_at(target))",
            "residual = residual + (e - head.uniform_at(target))",
        ),
    ),
    fault(
        "Digits lost at a smoothed label", "and in `fused`",
        "tests/kernels/test_properties.py::test_strong_smoothing_leaves_the_label_its_digits[recompute]",
        (
            "fused/row_terms.py", "own = (1 - e) * own + (e * p - uniform)", "own = own + (e - uniform)",
        ),
    ),
    fault(
        "Digits lost at a smoothed label", "and in `stored`",
        "tests/kernels/test_properties.py::test_strong_smoothing_leaves_the_label_its_digits[stored]",
        (
            "fused/stored_kernel.py", "(1.0 - smoothing) * _expm1(log_p) + (smoothing * p - uniform)",
            "_expm1(log_p) + (smoothing - uniform)",
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
        (
            "fused/stats.py", "tl.store(row_carry + offs, log_sum_exp, mask=is_row)",
            "tl.store(row_carry + offs, log_sum_exp)",
        ),
    ),
    fault(
        "Memory that a retained graph keeps", "saved gradients handed out while the graph is kept",
        "tests/kernels/test_retained_graph.py::"
        "test_what_a_user_makes_of_a_gradient_does_not_reach_the_next[float32-1-chunked]",
        ("operators.py", "dtype == weight_dtype and not keeps() and", "dtype == weight_dtype and"),
    ),
    fault(
        "Memory that a retained graph keeps", "statistics that are views of what is kept",
        "tests/kernels/test_retained_graph.py::test_statistics_share_no_memory_with_the_graph[recompute]",
        ("terms.py", "logprob, nll.clone(),", "logprob, nll.view_as(nll),"),
        ("terms.py", "found.lse.clone(), ", "found.lse, "),
    ),
    fault(
        "0 times infinity", "lerp in place of a selected member of a pair",
        "tests/kernels/test_infinite_logits.py::test_contract[last-chunked-float32]",
        ("chunked/rows.py", "    if not has_infinities:\n", "    if True:\n"),
    ),
    fault(
        "0 times infinity", "a share of 0 times a masked label's loss",
        "tests/kernels/test_infinite_logits.py::test_a_share_of_0_takes_nothing_of_a_masked_label[recompute]",
        (
            "terms.py", "cross = times(torch.stack([share, 1 - share]), nll).sum(dim=0)",
            "cross = (torch.stack([share, 1 - share]) * nll).sum(dim=0)",
        ),
    ),
    fault(
        "0 times infinity", "a coefficient of 0 times the gradient at a masked label",
        "tests/kernels/test_infinite_logits.py::test_weights_of_0_leave_infinite_terms_out[recompute]",
        ("terms.py", "return torch.where(factor != 0, factor * value, 0.0)", "return factor * value"),
    ),
    fault(
        "Garbage in ignored rows", "0 times its hidden state, in `chunked`",
        "tests/kernels/test_ignored_garbage.py::test_loss_statistics_and_gradients[NaN-smoothed-chunked]",
        ("chunked/gradients.py", "        if not self.has_dead:\n", "        if True:\n"),
    ),
    fault(
        "Garbage in ignored rows", "and in `fused`",
        "tests/kernels/test_ignored_garbage.py::test_loss_statistics_and_gradients[NaN-smoothed-recompute]",
        (
            "fused/rows.py", "return row_terms.living(call, dead), GradientTerms", "return call, GradientTerms",
        ),
    ),
    fault(
        "Garbage in ignored rows", "0 times its term",
        "tests/kernels/test_ignored_garbage.py::test_rows_of_their_own_upstream[NaN-chunked]",
        ("terms.py", "term = torch.where(valid, term, 0.0)\n", "term = valid * term\n"),
    ),
    fault(
        "Numbers that a module boundary rounds", "a 16-bit denominator taken",
        "tests/kernels/test_side_inputs.py::"
        "test_16_bits_are_refused_by_name_with_the_remedy[ntp_denominator-bfloat16-chunked]",
        (
            "checks.py", "if value.dtype in (torch.float16, torch.bfloat16):\n        _fail(name, \"a number,",
            "if False:\n        _fail(name, \"a number,",
        ),
    ),
    fault(
        "Numbers that a module boundary rounds", "16-bit weights taken",
        "tests/kernels/test_side_inputs.py::"
        "test_16_bits_are_refused_by_name_with_the_remedy[row_weight-bfloat16-chunked]",
        ("checks.py", "SIDE_DTYPES = (torch.float32, torch.float64,", "SIDE_DTYPES = (*FLOAT_DTYPES,"),
        (
            "checks.py", "if value.dtype in (torch.float16, torch.bfloat16):\n        _fail(name, expected + ROUNDED",
            "if False:\n        _fail(name, expected + ROUNDED",
        ),
    ),
    fault(
        "0 over 0", "NaN without a supervised row",
        "tests/kernels/test_side_inputs.py::test_nothing_over_nothing_is_nothing[float32-chunked]",
        (
            "terms.py", "share = torch.where(denominator != 0, 1.0 / denominator.double(), 0.0)",
            "share = 1.0 / denominator.double()",
        ),
        ("terms.py", "return torch.where(valid, share, 0.0)", "return valid * share"),
    ),
    fault(
        "0 over 0", "and with classes of no weight",
        "tests/kernels/test_side_inputs.py::test_all_targets_of_class_weight_0[chunked]",
        (
            "terms.py", "share = torch.where(denominator != 0, 1.0 / denominator.double(), 0.0)",
            "share = 1.0 / denominator.double()",
        ),
        ("terms.py", "return torch.where(factor != 0, factor * value, 0.0)", "return factor * value"),
    ),
    fault(
        "Class weights", "left out of the denominator",
        "tests/kernels/test_row_options.py::test_it_is_torchs_weighted_cross_entropy[0.0-chunked]",
        ("terms.py", "mass = at_target(call, column) if denominator is None else None", "mass = None"),
    ),
    fault(
        "Class weights", "and of smoothing's share",
        "tests/kernels/test_row_options.py::test_it_is_torchs_weighted_cross_entropy[0.3-chunked]",
        ("terms.py", "mean = 1.0 if weight is None else weight.double().mean().to(nll.dtype)", "mean = 1.0"),
    ),
    fault(
        "Class weights", "of its gradient, in `chunked`",
        "tests/kernels/test_row_options.py::test_contract[(33, 131, 50, 13)-class weights, smoothing-chunked-float32]",
        (
            "chunked/rows.py",
            "mean = 1.0 if call.class_weight is None else call.class_weight.double().mean().to(call.dtype)",
            "mean = 1.0",
        ),
    ),
    fault(
        "Class weights", "and in `fused`",
        "tests/kernels/test_row_options.py::"
        "test_contract[(33, 131, 50, 13)-class weights, smoothing-recompute-float32]",
        ("fused/row_terms.py", "(e * call.class_weight.double().mean()).float()", "torch.full_like(lse[:1], e)"),
    ),
    fault(
        "Class weights", "and in `stored`",
        "tests/kernels/test_row_options.py::test_contract[(33, 131, 50, 13)-class weights, smoothing-stored-float32]",
        ("fused/stored_kernel.py", "smoothing * tl.load(class_mean)\n", "smoothing\n"),
    ),
    fault(
        "Token scaling", "its factor differentiated, in `chunked`",
        "tests/kernels/test_row_options.py::test_token_scaling_weighs_by_the_probability[chunked]",
        (
            "chunked/gradients.py", "coef = times(coef, torch.exp(sums.logprob(own_logit)))",
            "coef = times(coef, torch.exp(sums.logprob(own_logit)) * (1 + sums.logprob(own_logit)))",
        ),
    ),
    fault(
        "Token scaling", "where gradients are made again",
        "tests/kernels/test_row_options.py::test_token_scaling_weighs_by_the_probability[recompute]",
        (
            "terms.py", "row = times(torch.exp(-nll).double(), row)",
            "row = times((torch.exp(-nll) * (1 - nll)).double(), row)",
        ),
    ),
    fault(
        "Token scaling", "in `stored`",
        "tests/kernels/test_row_options.py::test_token_scaling_weighs_by_the_probability[stored]",
        (
            "fused/stored_kernel.py", "coef = tl.where(coef != 0.0, coef * p, 0.0)",
            "coef = tl.where(coef != 0.0, coef * p * (1.0 + log_p), 0.0)",
        ),
    ),
    fault(
        "Token scaling", "and in the reference",
        "tests/kernels/test_reference.py::test_token_scaling_is_a_constant_weight",
        ("reference.py", "prob = torch.exp(-nll).detach()", "prob = torch.exp(-nll)"),
    ),
    fault(
        "Targets of a later row", "shifted to the wrong side",
        "tests/kernels/test_row_options.py::test_shift_scores_a_row_against_a_later_target[(3,)-1-chunked]",
        (
            "functional.py", "F.pad(target[..., shift:], (0, shift), value",
            "F.pad(target[..., :-shift], (shift, 0), value",
        ),
    ),
    fault(
        "The predicted token", "the last of equals, in `chunked`",
        "tests/kernels/test_row_options.py::test_the_first_of_equal_logits_is_predicted[chunked]",
        (
            "chunked/statistics.py", "top, column = logits.max(dim=-1)\n",
            "top, column = logits.flip(-1).max(dim=-1)\n        column = logits.shape[-1] - 1 - column\n",
        ),
    ),
    fault(
        "The predicted token", "and in `fused`",
        "tests/kernels/test_row_options.py::test_the_first_of_equal_logits_is_predicted[recompute]",
        (
            "fused/stats.py", "tl.min(tl.where(z == largest[:, None], across(offs_v), 2147483647), axis=1)",
            "tl.max(tl.where(z == largest[:, None], across(offs_v), -1), axis=1)",
        ),
    ),
    fault(
        "The predicted token", "and over lanes in `stored`",
        "tests/kernels/test_row_options.py::test_predicted_beside_pairs_and_gradients[stored]",
        (
            "fused/stored_kernel.py", "tl.min(tl.where(tops == top, best, 2147483647), axis=0)",
            "tl.min(best, axis=0)",
        ),
    ),
)  # fmt: skip
