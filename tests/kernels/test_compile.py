"""torch.compile: attention is one node of the graph, and neither plan, step nor density compiles anew."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel.kernels import BlockIndex, block_sparse_attention
from dit_accel.kernels.select import select_blocks


def attention(query, key, value, index, options):
    return block_sparse_attention(2 * query, key, value, index, backend="torch", return_lse=True, **options)


CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"orders": 2, "masked": True, "remainder": [True, False]}, id="all"),
    pytest.param({"cuts": (5, 7), "index_batch": 2, "remainder": True}, id="varying"),
]


@pytest.mark.parametrize("shape", CASES)
def test_operator_is_sound(problem, shape):
    """Schema, fake results, dispatch and tracing with fixed and with symbolic sizes."""
    case = problem(torch.float32, seq_q=70, seq_k=90, dim=16, block_q=16, block_k=16, **shape)
    index, rest = case.index, case.remainder
    for return_lse in (False, True):
        arguments = (
            *case.arguments[:3],
            *(
                getattr(index, name)
                for name in ("counts", "offsets", "indices", "query_starts", "key_starts")
            ),
            [16, 16, 70, 90],
            0.25,
            "native",
            "torch",
            return_lse,
            case.key_mask,
            *(None if order is None else order[None] for order in (case.query_order, case.key_order)),
            rest is not False,
            rest if isinstance(rest, torch.Tensor) else None,
        )
        torch.library.opcheck(
            torch.ops.dit_accel.block_sparse_attention.default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("shape", CASES)
def test_whole_graph_equals_eager(problem, shape):
    torch._dynamo.reset()
    case = problem(torch.float32, seq_q=70, seq_k=90, dim=16, block_q=16, block_k=16, **shape)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    expected = attention(*case.arguments, case.options)
    for got, want in zip(compiled(*case.arguments, case.options), expected, strict=True):
        assert torch.equal(got, want)


def test_lists_of_any_length_compile_once(problem):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    case = problem(torch.float32)
    for density in (0.1, 0.5, 0.9):
        index = BlockIndex.from_mask(torch.rand(1, 2, 6, 9) < density, 64, 64, 333, 517)
        compiled(*case.arguments[:3], index, {})
    assert counter.frame_count == 1


def test_selection_and_attention_compile_together(problem):
    torch._dynamo.reset()
    case = problem(torch.float32)

    def run(scores, keep):
        index = select_blocks(
            scores, block_q=64, block_k=64, seq_q=333, seq_k=517, keep=keep, backend="torch"
        )
        return block_sparse_attention(case.query, case.key, case.value, index, backend="torch")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for keep in (1, 4, 7):
        scores = torch.rand(1, 2, 6, 9)
        budget = torch.full((2, 1), keep)
        assert torch.equal(compiled(scores, budget), run(scores, budget))
    assert counter.frame_count == 1
