"""The Triton kernel without a GPU: executed by the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_accel.kernels import prepare_triton
from dit_accel.kernels.ahead import SHARED_LIMITS, Configuration, _tool, compile_attention
from dit_accel.kernels.block_sparse import schedule, triton_kernel

HERE = Path(__file__).parent


def test_interpreted():
    """The interpreter is chosen when Triton is first imported, so it needs a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^127 passed", result.stdout, re.MULTILINE), result.stdout


BF16_64 = Configuration(64, 64, 64)
BF16_128 = Configuration(128, 128, 64)
EVERYTHING = {"masked": True, "ordered": True, "remainder": True}
GATE = [
    ("sm_90", BF16_64),
    ("sm_90", BF16_128),
    ("sm_90", Configuration(128, 128, 128, **EVERYTHING)),
    ("sm_90", Configuration(72, 64, 64, dtype="fp16")),
    ("sm_90", Configuration(256, 64, 64)),
    ("sm_90", Configuration(64, 64, 64, precision="int8", **EVERYTHING)),
    ("sm_90", Configuration(128, 128, 64, precision="int8")),
    ("sm_90", Configuration(128, 128, 128, precision="int8_fp8", **EVERYTHING)),
    ("sm_90", Configuration(64, 64, 64, precision="fp8")),
    ("sm_90", Configuration(128, 128, 64, precision="fp8", **EVERYTHING)),
    ("sm_90", Configuration(128, 128, 64, varying=True)),
    ("sm_90", Configuration(128, 128, 64, precision="int8_fp8", varying=True, **EVERYTHING)),
    ("sm_80", Configuration(128, 128, 64, precision="int8", varying=True)),
    ("sm_80", BF16_128),
    ("sm_86", Configuration(128, 128, 64, precision="int8")),
    ("sm_89", Configuration(128, 128, 64, precision="int8_fp8")),
    # What used to spill where products take their operands from registers, or a warp has 64 lanes.
    ("sm_80", Configuration(128, 128, 64, **EVERYTHING)),
    ("sm_89", Configuration(128, 64, 64, precision="int8", **EVERYTHING)),
    ("sm_120", Configuration(128, 128, 64, precision="int8", varying=True, **EVERYTHING)),
    ("gfx942", Configuration(64, 128, 64, **EVERYTHING)),
    ("sm_100", BF16_128),
    ("sm_100", Configuration(128, 128, 64, precision="fp8")),
    ("sm_120", Configuration(128, 128, 64, precision="int8_fp8")),
    ("gfx942", BF16_128),
    ("gfx942", Configuration(64, 64, 64, precision="int8")),
]


# Of 16-bit floats, INT8 and E4M3, by generation.
INSTRUCTIONS = {
    "sm_80": ("HMMA", "IMMA"),
    "sm_86": ("HMMA", "IMMA"),
    "sm_89": ("HMMA", "IMMA", "QMMA"),
    "sm_90": ("HGMMA", "IGMMA", "QGMMA"),
    "sm_100": ("UTCHMMA", "UTCIMMA", "UTCQMMA"),
    "sm_120": ("HMMA", "IMMA", "QMMA"),
    "gfx942": ("v_mfma_f32_32x32x8_bf16", "v_mfma_i32_32x32x16_i8"),
}
PRODUCTS = {"native": [0], "int8": [0, 1], "int8_fp8": [1, 2], "fp8": [2]}


@pytest.mark.parametrize(
    ("architecture", "configuration"),
    [
        pytest.param(
            arch, c,
            id=f"{arch}-D{c.dim}-{c.block_q}x{c.block_k}-{c.dtype}-{c.precision}"
            f"{'-all' * c.remainder}{'-varying' * c.varying}",
        )
        for arch, c in GATE
    ],
)  # fmt: skip
def test_compiles(architecture, configuration, tmp_path, monkeypatch):
    """The intended matrix instructions and no others, nothing spilled, within the chip's shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_attention(configuration, architecture)
    expected = {INSTRUCTIONS[architecture][product] for product in PRODUCTS[configuration.precision]}
    assert set(compiled.matrix_instructions) == expected, compiled
    assert not compiled.missing, compiled
    assert compiled.registers > 0, compiled
    assert not compiled.stack, compiled
    assert not compiled.local, compiled
    assert compiled.shared <= SHARED_LIMITS[architecture], compiled
    if architecture == "sm_90" and configuration.dim <= 128:
        # Keys and values of a tile beyond the one that is multiplied are on their way, in every loop.
        assert compiled.in_flight >= 2, compiled


ORDER = {"order": "*i64", "mask": "*i1", "mean": "*fp32", "scales": "*fp32"}
SIZES = {"DIM": 128, "TILE_D": 128, "TILE": 64, "ORDERED": True}
RANGE = {"INT8": True, "LARGEST": 127.0, "SMALLEST": 1e-20}
TOKENS = {"k": "*bf16", "v": "*bf16", "q": "*bf16"}
AROUND = [
    pytest.param(
        "_order_and_pool",
        {
            "starts": "*i32",
            **dict.fromkeys(("ordered_k", "ordered_v"), "*bf16"),
            **dict.fromkeys(("mean_k", "mean_v"), "*bf16" if copied else "*fp32"),
            **dict.fromkeys(("largest_v", "counts", "bias", "weight"), "*fp32"),
        },
        {
            **{"BLOCK": 64, "TILE": 16, "MASKED": True, "VARYING": varying, "WEIGHED": True, "POOL": True},
            **{"COPY_K": copied, "COPY_V": copied, "LARGEST": not copied},
        },
        id=f"order-and-pool{'-varying' * varying}{'-copied' * copied}",
    )
    for varying in (False, True)
    for copied in (False, True)
] + [
    pytest.param(
        "_summarise",
        {
            **dict.fromkeys(("mean_k", "mean_v", "counts", "largest_v", "v_scale", "key_scale"), "*fp32"),
            **{"key": "*i8", "value": "*fp8e4nv" if eight else "*bf16"},
        },
        {"TILE": 32, "FP8_V": eight, "REMAINDER": True, "LARGEST_V": 448.0, **RANGE},
        id=f"summarise{'-fp8' * eight}",
    )
    for eight in (False, True)
] + [
    pytest.param(
        "_quantise_keys",
        {"out": eight},
        {"GROUP": 64, "MASKED": True, "PER_TOKEN": each, **RANGE, "INT8": eight == "*i8"},
        id=f"keys-{eight[1:]}{'-each' * each}",
    )
    for eight, each in (("*i8", False), ("*i8", True), ("*fp8e4nv", False))
] + [
    pytest.param(
        "_quantise_queries",
        {"out": eight, "shift": "*fp32", "scale": "fp32"},
        {"LOG2E_": 1.4426950408889634, **RANGE, "INT8": eight == "*i8"},
        id=f"queries-{eight[1:]}",
    )
    for eight in ("*i8", "*fp8e4nv")
] + [
    pytest.param("_quantise_values", {"out": "*fp8e4nv"}, {"MASKED": True}, id="values"),
    pytest.param(
        "_cut",
        {"offsets": "*i64", **dict.fromkeys(
            ("counts", "indices", "starts", "full_counts", "full", "part_counts", "parts"), "*i32"
        )},
        {"TILE": 64, "ALIGN": 16, "CHUNK": 64},
        id="cut",
    ),
    pytest.param(
        "_place_rows",
        dict.fromkeys(("work", "starts", "places"), "*i32"),
        {"TILE": 64, "CHUNK": 64, "VARYING": True},
        id="place-rows",
    ),
    pytest.param(
        "_kept_pairs",
        {"offsets": "*i64", "pairs": "*i64", **dict.fromkeys(("counts", "indices", "starts"), "*i32")},
        {"CHUNK": 64, "VARYING": True},
        id="kept-pairs",
    ),
    pytest.param("_order_heads", {"totals": "*i64", "order": "*i32"}, {"CHUNK": 64}, id="order-heads"),
    pytest.param(
        "_mark_read",
        {"offsets": "*i64", **dict.fromkeys(("read", "counts", "indices"), "*i32")},
        {"TILE": 64},
        id="mark-read",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "dim"), [("sm_90", 256), ("sm_100", 128)])
@pytest.mark.parametrize(("name", "pointers", "constants"), AROUND)
def test_what_runs_around_attention_compiles(
    name, pointers, constants, architecture, dim, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = next(getattr(m, name) for m in (prepare_triton, schedule, triton_kernel) if hasattr(m, name))
    types = ORDER | TOKENS | pointers
    sizes = SIZES | {"DIM": dim, "TILE_D": dim, "PITCH": dim}
    if name == "_quantise_values" and dim > 128:
        sizes["TILE"] = 32  # as the launcher has it
    constants = {key: value for key, value in (sizes | constants).items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else types.get(argument, "i32")
        if signature[argument].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", int(architecture[3:]), 32)
    source = ASTSource(kernel, signature, constants, attributes)
    warps = prepare_triton._WARPS if hasattr(prepare_triton, name) else 4
    options = {"enable_fp_fusion": True, "num_warps": warps}
    compiled = triton.compile(source, target=target, options=options)
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", str(file))
    for resource in ("STACK", "LOCAL"):
        assert re.search(rf"{resource}:(\d+)", usage)[1] == "0", usage


def test_precisions_that_a_chip_does_not_multiply_are_refused():
    for architecture in ("sm_80", "sm_86", "gfx942"):
        with pytest.raises(ValueError, match=f"precision: {architecture} multiplies no E4M3, got 'fp8'"):
            compile_attention(Configuration(64, 64, 64, precision="fp8"), architecture)


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*, got 'sm_75'"):
        compile_attention(BF16_64, "sm_75")
