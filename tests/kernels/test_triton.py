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
    ("sm_90", BF16_64, "HGMMA"),
    ("sm_90", BF16_128, "HGMMA"),
    ("sm_90", Configuration(128, 128, 128, **EVERYTHING), "HGMMA"),
    ("sm_90", Configuration(72, 64, 64, dtype="fp16"), "HGMMA"),
    ("sm_90", Configuration(256, 64, 64), "HGMMA"),
    ("sm_90", Configuration(64, 64, 64, precision="int8", **EVERYTHING), "IGMMA"),
    ("sm_90", Configuration(128, 128, 64, precision="int8"), "IGMMA"),
    ("sm_90", Configuration(128, 128, 128, precision="int8_fp8", **EVERYTHING), "QGMMA"),
    ("sm_90", Configuration(64, 64, 64, precision="fp8"), "QGMMA"),
    ("sm_90", Configuration(128, 128, 64, precision="fp8", **EVERYTHING), "QGMMA"),
    ("sm_90", Configuration(128, 128, 64, varying=True), "HGMMA"),
    ("sm_90", Configuration(128, 128, 64, precision="int8_fp8", varying=True, **EVERYTHING), "QGMMA"),
    ("sm_80", Configuration(128, 128, 64, precision="int8", varying=True), "IMMA"),
    ("sm_80", BF16_128, "HMMA"),
    ("sm_86", Configuration(128, 128, 64, precision="int8"), "IMMA"),
    ("sm_89", Configuration(128, 128, 64, precision="int8_fp8"), "QMMA"),
    ("sm_100", BF16_128, "UTCHMMA"),
    ("sm_100", Configuration(128, 128, 64, precision="fp8"), "UTCQMMA"),
    ("sm_120", Configuration(128, 128, 64, precision="int8_fp8"), "IMMA"),
    ("gfx942", BF16_128, "v_mfma"),
    ("gfx942", Configuration(64, 64, 64, precision="int8"), "v_mfma"),
]


@pytest.mark.parametrize(
    ("architecture", "configuration", "instruction"),
    [
        pytest.param(
            arch, c, instruction,
            id=f"{arch}-D{c.dim}-{c.block_q}x{c.block_k}-{c.dtype}-{c.precision}"
            f"{'-all' * c.remainder}{'-varying' * c.varying}",
        )
        for arch, c, instruction in GATE
    ],
)  # fmt: skip
def test_compiles(architecture, configuration, instruction, tmp_path, monkeypatch):
    """The intended matrix instruction, nothing spilled, within the chip's shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_attention(configuration, architecture)
    assert any(found.startswith(instruction) for found in compiled.matrix_instructions), compiled
    assert not compiled.stack, compiled
    assert not compiled.local, compiled
    assert compiled.shared <= SHARED_LIMITS[architecture], compiled


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*, got 'sm_75'"):
        compile_attention(BF16_64, "sm_75")
