"""What the compiler makes of the kernels, for any architecture and without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_accel.kernels.block_sparse import triton_kernel
from dit_accel.kernels.prepare import key_group

# Shared memory that one block of threads may use, bytes (CUDA C programming guide, compute capabilities; CDNA3 ISA).
SHARED_LIMITS = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
# What multiplies 16-bit floats, INT8 and E4M3; the last is None where E4M3 as NVIDIA defines it is not multiplied.
_MULTIPLIES = {
    "sm_80": ("HMMA", "IMMA", None),
    "sm_86": ("HMMA", "IMMA", None),
    "sm_89": ("HMMA", "IMMA", "QMMA"),
    "sm_90": ("HGMMA", "IGMMA", "QGMMA"),
    "sm_100": ("UTCHMMA", "UTCIMMA", "UTCQMMA"),
    "sm_120": ("HMMA", "IMMA", "QMMA"),
    "gfx942": ("v_mfma_f32", "v_mfma_i32", None),
}
# Matrix instructions by generation; the digits behind are shapes and types.
_MATRIX = re.compile(r"\b(HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|OMMA|UTC[A-Z]*MMA|v_mfma_[a-z0-9_]+)\b")

# The first wait inside a loop; those behind it, for all that is left, come after.
_WAIT = re.compile(r"scf\.for (?:(?!scf\.for ).)*?async_wait [^\n]*?num = (\d+)", re.DOTALL)


@dataclass(frozen=True)
class Configuration:
    """One specialisation of the attention kernel; dtype is Triton's name, "bf16", "fp16" or "fp32"."""

    dim: int
    block_q: int
    block_k: int
    dtype: str = "bf16"
    precision: str = "native"
    masked: bool = False
    ordered: bool = False
    remainder: bool = False
    varying: bool = False


@dataclass(frozen=True)
class Compiled:
    """What came out: registers per thread, bytes of stack and local memory per thread, shared bytes per program.

    missing: matrix instructions that the precision is meant to run on and that are not among those found.
    in_flight: copies to shared memory that the loops over keys and means leave under way while they compute, in the
        loop that leaves fewest; None where nothing is copied in the background.
    """

    registers: int
    stack: int
    local: int
    shared: int
    matrix_instructions: tuple[str, ...]
    missing: tuple[str, ...]
    in_flight: int | None


def multiplies_e4m3(architecture: str) -> bool:
    """Whether a chip of SHARED_LIMITS has instructions for E4M3."""
    return _MULTIPLIES[architecture][2] is not None


def chip_named(architecture: str) -> triton_kernel.Chip:
    """What tile sizes depend on, for a chip of SHARED_LIMITS."""
    floats = _MULTIPLIES[architecture][0]
    lanes = 32 if architecture.startswith("sm_") else 64
    return triton_kernel.Chip(SHARED_LIMITS[architecture], lanes, floats in ("HGMMA", "UTCHMMA"))


def intended(architecture: str, precision: str) -> tuple[str, ...]:
    """Beginnings of the names of the matrix instructions that attention in a precision is meant to use.

    Raises:
        ValueError: a precision that the chip does not multiply.
    """
    floats, integers, eights = _MULTIPLIES[architecture]
    wanted = {
        "native": (floats,),
        "int8": (integers, floats),
        "int8_fp8": (integers, eights),
        "fp8": (eights,),
    }
    names = tuple(name for name in wanted[precision] if name is not None)
    if len(names) < len(wanted[precision]):
        raise ValueError(f"precision: {architecture} multiplies no E4M3, got {precision!r}")
    return names


def compile_attention(configuration: Configuration, architecture: str) -> Compiled:
    """Compile the attention kernel as the launcher would for contiguous inputs.

    Raises:
        ValueError: an architecture that is not in SHARED_LIMITS, or one that does not multiply the precision.
    """
    if architecture not in SHARED_LIMITS:
        raise ValueError(f"architecture must be one of {', '.join(SHARED_LIMITS)}, got {architecture!r}")
    c = configuration
    wanted = intended(architecture, c.precision)
    eight_k = {"native": c.dtype, "int8": "i8", "int8_fp8": "i8", "fp8": "fp8e4nv"}[c.precision]
    eight_v = "fp8e4nv" if c.precision in ("int8_fp8", "fp8") else c.dtype
    quantised = c.precision != "native"
    sizes = {"fp32": 4, "i8": 1, "fp8e4nv": 1}
    options = triton_kernel.launch_options(
        c.dim,
        c.block_q,
        c.block_k,
        sizes.get(eight_k, 2),
        sizes.get(eight_v, 2),
        chip_named(architecture),
        varying=c.varying,
        remainder=c.remainder,
        masked=c.masked,
    )
    build = {"enable_fp_fusion": True, **{name: options.pop(name) for name in ("num_warps", "num_stages")}}
    constants = {
        "DIM": c.dim,
        "BLOCK_K": c.block_k,
        "GROUP": key_group(c.block_k),
        "HAS_VALID": c.masked,
        "QUANTISED": quantised,
        "INT8": eight_k == "i8",
        "FP8_V": eight_v == "fp8e4nv",
        "SHIFTED": quantised,
        "ORDERED": c.ordered,
        "REMAINDER": c.remainder,
        "VARYING": c.varying,
        **options,
        **dict.fromkeys(("stride_qd", "stride_kd", "stride_od"), 1),
        **dict.fromkeys(
            ("stride_vs", "stride_means") if eight_v == "fp8e4nv" else ("stride_vd", "stride_meand"), 1
        ),
    }
    floats = ("lse", "q_scale", "k_scale", "v_scale", "lse_shift", "mean_scale", "mean_bias")
    pointers = {
        **dict.fromkeys(("q", "k", "mean_k"), f"*{eight_k}"),
        **dict.fromkeys(("v", "mean_v"), f"*{eight_v}"),
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(
            ("read", "head_order", "programs", "counts", "indices", "full", "part_counts", "parts"), "*i32"
        ),
        **dict.fromkeys(("query_order", "offsets"), "*i64"),
        "out": f"*{c.dtype}",
        "valid": "*i1",
    }
    kernel = triton_kernel.block_sparse_forward
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name, "fp32" if name == "scale_log2" else "i32")
        # Strides that the launcher lets Triton specialise; those of a model are multiples of 16.
        if name in pointers or re.fullmatch(r"stride_(mean)?[qkvo]?[bshd]", name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    nvidia = architecture.startswith("sm_")
    target = GPUTarget("cuda", int(architecture[3:]), 32) if nvidia else GPUTarget("hip", architecture, 64)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=build
    )
    if nvidia:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            code, told = _tool("nvdisasm", "-c", file.name), _tool("cuobjdump", "-res-usage", file.name)
        registers, stack, local = (_number(rf"{name}:(\d+)", told) for name in ("REG", "STACK", "LOCAL"))
    else:
        code = compiled.asm["amdgcn"]
        registers, stack, spilled = (
            _number(rf"\.{name}:\s+(\d+)", code)
            for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        local = 4 * spilled
    found = tuple(sorted(set(_MATRIX.findall(code))))
    missing = tuple(name for name in wanted if not any(one.startswith(name) for one in found))
    waits = [int(wait) for wait in _WAIT.findall(compiled.asm["ttgir"])]
    return Compiled(
        registers, stack, local, compiled.metadata.shared, found, missing, min(waits, default=None)
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output says nothing of {pattern}")
    return int(match[1])


def _tool(name: str, *arguments: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([binary, *arguments], capture_output=True, text=True, check=True).stdout
