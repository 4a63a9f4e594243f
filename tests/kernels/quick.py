"""What `make test` runs of what takes long. `make test-kernels` runs all.

A test's name, then its cases, without the back end; a test without cases has no other parameters.
"""

# Of the tests that take long on any back end, on "reference" and "cpu". They run all cases of the others.
LONG_TESTS = {
    "thought_attention": {
        "error_rule_on_longer_texts": ["0"],
        "gradcheck": ["documents-{}", "ragged-{'window': 2}", "full-{'softcap': 1.5}"]
        + ["left padding-{'window': 3, 'softcap': 2.0, 'query_rows': 'thoughts', 'scale': 0.7}"],
    },
    "sample_token": {"chi_square": ["{}-200", "{'scale': 0.5, 'softcap': 3.0, 'temperature': 2.0, 'banned': (0, 5)}-333"]},
    "branches": {"long_branches": ["causal-{'window': 70}", "full-{'window': 7, 'softcap': 2.0}"]},
}

# Of all tests, on Triton interpreted, CUDA emulated, and the CPU's without its library.
CASES = {
    "thought_attention": {
        "error_rule_on_random_layouts": ["any_lo-1", "ragged-2", "packed-0"],
        "gradcheck": ["ragged-{'window': 2}", "full-{}"],
        "edges": ["B=0-all", "L=0-all", "one-thoughts", "empty branches-all"],
        "huge_values_where_a_row_may_not_look": ["packed_full-{'query_rows': 'thoughts'}-torch.float32"],
        "nan_in_rows_that_are_off": ["ragged-thoughts-None"],
        "nan_that_a_row_sees": ["text-{}-names1-inf", "thought-{}-names0-nan"]
        + ["thought-{'window': 9, 'softcap': 2.0}-names2--inf"],
        "a_step_is_the_row_of_attention": [""],
        "a_window_longer_than_text_and_nodes": [""],
    },
    "thought_decode": {
        "error_rule_on_random_layouts": ["2", "5"],
        "nan_that_nobody_may_read": ["left-None", "documents-2.0"],
        "huge_values_where_a_thought_may_not_look": ["any_lo-{}-torch.float16", "ragged-{'window': 3}-torch.float16"],
        "nan_reaches_the_thoughts_that_see_it": ["k_text-torch.float16", "v_own-torch.float16"],
        "edges": ["B=0-16-None", "L=0-32-None", "P=0-16-None", "one-32-2.0", "all off-16-None", "all off, L=0-32-2.0"],
    },
    "sample_token": {
        "draws_are_those_of_the_definition": ["{}-1", "{'banned': (3, 7, 11)}-129", "{'temperature': 0.7}-333"],
        "known_draws": ["5", f"{2**63 + 12345}"],
        "extreme_counters": ["-1"],
        "logprob": ["{}-0.0-torch.float32", "{'scale': 0.5, 'softcap': 3.0}-0.7-torch.float16"],
        "argmax_takes_the_lowest_of_equals": [""],
        "a_seed_on_the_device": ["-5"],
        "edges": ["(0, 3, 20)-1.0", "(1, 1, 1)-0.0"],
        "logits_that_are_not_finite": ["NaN weight, last id-0.7", "a block of -inf-0.7", "all -inf-0.0", "one far above-0.0"],
        "an_infinite_logit_stays_so_under_a_soft_cap": ["1.0-10"],
        "options_that_overflow": ["{'scale': 1e+20, 'temperature': 1e-20}"],
        "products_that_overflow": ["{'scale': -1e+38}"],
        "the_largest_temperature": ["{'scale': 1e+30}"],
        "strided": ["odd start"],
        "opcheck": ["{}"],
    },
    "linear_logprob": {
        "error_rule": ["{}-kept-(1, 1, 20)-torch.float32", "{'softcap': 4.0}-again-(67, 17, 129)-torch.float16"],
        "large_and_equal_logits": ["kept--30.0-torch.float32", "again-0.0-torch.float16"],
        "many_chunks": ["kept-{}-torch.float32"],
        "what_does_not_count": ["{'banned': (3, 7, 11)}"],
        "a_banned_target": [""],
        "gradients_are_optional": ["kept"],
        "edges": ["kept-(0, 3, 20)", "again-(1, 1, 1)"],
        "strided": ["kept"],
        "expanded_gradients": [""],
        "logits_that_are_not_finite": ["infinite weight", "NaN bias, banned id", "a bias of -inf"],
        "products": ["True"],
        "what_is_kept": [""],
        "backward_twice": [""],
        "rows_that_a_compiler_does_not_know": ["122880"],
    },
    "rms_norm": {
        "norm": ["delta-(3, 5, 96)-torch.float32", "no delta-(0, 64)-torch.float16", "delta-(2, 9000)-torch.float32"],
        "norm_of_several_dtypes": ["x0-delta0-weight0-out0"],
        "gated": ["(3, 5, 100)-silu-torch.float32", "(1, 1500)-gelu_tanh-torch.float16"],
        "rotary": ["4 of 12-merged-qk-torch.float32", "4 of 12-separate--torch.float16", "3 of 16-merged-k-torch.float16"],
        "decode_writes_one_row": ["merged", "separate"],
        "strides_and_expanded_gradients": [""],
        "nan_stays_in_its_row": [""],
    },
}
