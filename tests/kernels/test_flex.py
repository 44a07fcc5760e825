"""The compiled flex backend: right, and compiled once for all lengths and lists."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from dit_accel.kernels import block_sparse_attention


# Importing torch's own compiler warns about torch's own use of torch.jit.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("poisoned")
def test_one_graph_serves_all_lengths_and_densities(problem):
    torch._dynamo.reset()
    counters.clear()
    cases = [
        problem(torch.float32, masked=True, dead_rows=True),
        problem(torch.float32, seq_q=517, seq_k=333, index_batch=2, density=0.7),
        problem(torch.float32, seq_q=128, seq_k=1100, density=0.1),
    ]
    for case in cases:
        case.check(block_sparse_attention(*case.arguments, backend="flex", key_mask=case.key_mask))
    assert counters["stats"]["unique_graphs"] == 1
