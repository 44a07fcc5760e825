"""The Triton kernel without a GPU: executed by the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.kernels.ahead import SHARED_LIMITS, Configuration, compile_attention

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
    assert re.search(r"^94 passed", result.stdout, re.MULTILINE), result.stdout


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


def test_precisions_that_a_chip_does_not_multiply_are_refused():
    for architecture in ("sm_80", "sm_86", "gfx942"):
        with pytest.raises(ValueError, match=f"precision: {architecture} multiplies no E4M3, got 'fp8'"):
            compile_attention(Configuration(64, 64, 64, precision="fp8"), architecture)


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*, got 'sm_75'"):
        compile_attention(BF16_64, "sm_75")
