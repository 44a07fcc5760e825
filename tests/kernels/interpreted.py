"""The Triton kernel under Triton's interpreter; test_triton.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels import BlockIndex, block_sparse_attention

# bfloat16 is left out: tl.dot computes it wrongly in the interpreter (Triton 3.9).
CASES = [
    pytest.param(torch.float16, {"dim": 32, "index_batch": 2}, id="B2-Q333-K517-H2-D32-fp16"),
    pytest.param(torch.float16, {"dead_rows": True, "masked": True}, id="B2-Q333-K517-H2-D64-masked-fp16"),
    pytest.param(torch.float32, {"dim": 72, "heads": 1, "strided": True, "density": 0.1}, id="H1-D72-fp32"),
    pytest.param(torch.float16, {"dim": 80, "seq_q": 65, "seq_k": 127}, id="B2-Q65-K127-H2-D80-fp16"),
    pytest.param(torch.float32, {"dim": 96, "seq_q": 50, "block_q": 24, "block_k": 40}, id="D96-24x40-fp32"),
    pytest.param(torch.float16, {"dim": 112, "block_q": 128, "masked": True}, id="D112-128x64-masked-fp16"),
    pytest.param(torch.float16, {"dim": 128, "block_q": 128, "block_k": 128}, id="B2-Q333-K517-H2-D128-fp16"),
    pytest.param(torch.float16, {"dim": 256, "seq_q": 70, "block_k": 256, "heads": 1}, id="D256-64x256-fp16"),
    pytest.param(torch.float32, {"seq_q": 3, "seq_k": 5, "batch": 1, "density": 1.0}, id="B1-Q3-K5-fp32"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape"), CASES)
def test_agrees_with_masked_sdpa(problem, dtype, shape):
    case = problem(dtype, **shape)
    output, lse = block_sparse_attention(
        *case.arguments, backend="triton", return_lse=True, key_mask=case.key_mask
    )
    case.check(output)
    case.check_lse(lse)


@pytest.mark.usefixtures("poisoned")
def test_no_keys_at_all(problem):
    case = problem(torch.float16, density=-1.0)
    output, lse = block_sparse_attention(*case.arguments, backend="triton", return_lse=True)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


def test_full_lists_are_dense_attention(problem):
    case = problem(torch.float16, density=2.0, seq_q=130)
    case.index = BlockIndex.dense(1, 2, 64, 64, 130, 517)
    case.check(block_sparse_attention(*case.arguments, backend="triton"))


def test_values_of_one_give_one(problem):
    case = problem(torch.float16, seq_q=130)
    case.value = torch.ones_like(case.value)
    output = block_sparse_attention(*case.arguments, backend="triton")
    alive = case.mask.any(-1).transpose(1, 2)
    assert (output[alive] - 1).abs().max() <= torch.finfo(torch.float16).eps


def test_head_dims_over_256_are_refused(problem):
    with pytest.raises(ValueError, match="serves head dims up to 256, got 320; use 'torch'"):
        block_sparse_attention(*problem(dim=320).arguments, backend="triton")
