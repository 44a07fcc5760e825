"""The Triton kernel without a GPU: executed by the interpreter, and compiled ahead of time for Hopper."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
POINTERS = {"lse": "*fp32", "counts": "*i32", "offsets": "*i64", "indices": "*i32", "key_mask": "*i1"}
# Strides that the launcher lets Triton specialise; those of a model are multiples of 16.
ALIGNED = re.compile(r"stride_[qkvo][bsh]")


def test_interpreted():
    """The interpreter is chosen when Triton is first imported, so it needs a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^13 passed", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.parametrize(
    ("dim", "block_q", "block_k", "dtype", "masked"),
    [
        pytest.param(64, 64, 64, "bf16", False, id="D64-64x64-bf16"),
        pytest.param(128, 128, 64, "bf16", False, id="D128-128x64-bf16"),
        pytest.param(128, 128, 128, "bf16", True, id="D128-128x128-bf16-masked"),
        pytest.param(72, 64, 64, "fp16", False, id="D72-64x64-fp16"),
        pytest.param(256, 64, 64, "bf16", False, id="D256-64x64-bf16"),
    ],
)
def test_compiles_for_hopper(dim, block_q, block_k, dtype, masked, tmp_path, monkeypatch):
    """Tensor-core instructions of sm_90, nothing spilled, within its shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cubin, shared_bytes = compile_kernel(dim, block_q, block_k, dtype, masked)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    assert "HGMMA" in tool("nvdisasm", "-c", str(path))
    usage = tool("cuobjdump", "-res-usage", str(path))
    assert re.search(r"STACK:(\d+)", usage).group(1) == "0", usage
    assert re.search(r"LOCAL:(\d+)", usage).group(1) == "0", usage
    assert shared_bytes <= 227 * 1024


def compile_kernel(dim: int, block_q: int, block_k: int, dtype: str, masked: bool) -> tuple[bytes, int]:
    """Compile as the launcher would for contiguous inputs on sm_90; (cubin, shared memory in bytes)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dit_accel.kernels.block_sparse import triton_kernel

    tiles = triton_kernel.launch_options(dim, block_q, block_k, itemsize=2)
    options = {"enable_fp_fusion": True, **{name: tiles.pop(name) for name in ("num_warps", "num_stages")}}
    kernel = triton_kernel.block_sparse_forward
    constants = {"DIM": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k, "HAS_KEY_MASK": masked, **tiles}
    constants |= {f"stride_{x}d": 1 for x in "qkvo"}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS or name in ("q", "k", "v", "out"):
            signature[name] = POINTERS.get(name, f"*{dtype}")
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
        if signature[name].startswith("*") or ALIGNED.fullmatch(name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def tool(name: str, *arguments: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([binary, *arguments], capture_output=True, text=True, check=True).stdout
