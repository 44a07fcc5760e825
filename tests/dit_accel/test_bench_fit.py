"""The cost model: it finds coefficients that are there, says where it is wrong, and the command prints both."""

import json
import math

import pytest
import torch

from dit_accel.bench import fit
from dit_accel.bench.fit import CostModel, features, fitted, mixed_index
from dit_accel.bench.problem import Shape, index_of
from dit_accel.cli import main
from dit_accel.kernels import BlockIndex
from dit_accel.kernels.balance import simulate

CPU = torch.device("cpu")
TRUE = (0.2, 3e-5, 1e-6, 2e-8, 4e-10, 1e-8, 3e-10)
SIZES = ((300, 700, 1_500), 4, (450, 1_111))


def clock(law):
    """Stands for `fit._measure`: the milliseconds that a law of index and head dim gives; SDPA takes 5."""

    def measure(shape, index, precisions, device, dtype):
        return {name: law(index, shape.dim) for name in precisions} | {"sdpa": 5.0}

    return measure


def by_model(index, dim, slots=None):
    return sum(c * term for c, term in zip(TRUE, features(index, dim, slots), strict=True))


def test_coefficients_that_are_there_are_found(monkeypatch):
    monkeypatch.setattr(fit, "_measure", clock(by_model))
    report = fit.run("cpu", sizes=SIZES, progress=False)
    assert report["model"]["native"] == pytest.approx(TRUE, rel=1e-6)
    assert [check["ok"] for check in report["checks"]] == [True] * 4
    assert max(row["error"] for row in [*report["rows"], *report["checks"]]) < 1e-9
    assert {(check["tokens"], check["dim"]) for check in report["checks"]} == {
        (tokens, dim) for tokens in SIZES[2] for dim in fit.DIMS
    }
    assert all(0.3 < check["density"] < 0.45 for check in report["checks"])


def test_a_law_that_it_cannot_hold_is_reported(monkeypatch):
    """A layer that takes as long as its densest head: even lists do not tell, mixed ones do."""
    law = clock(lambda index, dim: 0.1 + 1e-3 * float(index.counts.sum(-1).max()))
    monkeypatch.setattr(fit, "_measure", law)
    report = fit.run("cpu", sizes=SIZES, progress=False)
    assert max(row["error"] for row in report["rows"]) < 0.15
    assert not any(check["ok"] for check in report["checks"])
    assert "(above 15%)" in fit.as_text(report)


def test_coefficients_are_never_negative():
    """A time that falls with the tokens: the best fit leaves tokens out."""
    rows = [(1.0, tokens, pairs) for tokens in (1.0, 2.0, 5.0) for pairs in (1.0, 3.0)]
    found = fitted(rows, [10.0 - 0.5 * tokens + 2.0 * pairs for _, tokens, pairs in rows])
    assert found[1] == 0.0
    assert min(found) >= 0
    assert found[2] == pytest.approx(2.0, rel=0.2)


def test_lists_that_load_a_gpu_unevenly_cost_more():
    index = mixed_index(Shape(1_500, 4, 64), CPU)
    efficiency = simulate(index, slots=96).efficiency
    assert efficiency < 0.95
    even, uneven = features(index, 64, None), features(index, 64, 96)
    assert uneven[:3] == even[:3]
    assert uneven[3:] == pytest.approx([part / efficiency for part in even[3:]])
    assert even[5] == 64 * 64 * 24 * 24  # the head that keeps everything
    model = CostModel({"native": TRUE}, 96)
    assert model.predict(index, 64) > CostModel({"native": TRUE}).predict(index, 64)


@pytest.mark.parametrize("dense_share", [0.2, 0.55, 0.9])
def test_lists_pay_below_the_density_at_which_they_take_as_long(dense_share):
    shape, model = Shape(6_400, 4, 64), CostModel({"native": TRUE})
    index = index_of(shape, 64, 64, 1.0, CPU)
    pairs = 6_400**2 * 4
    none = by_model(index, 64) - (TRUE[5] + 64 * TRUE[6]) * pairs
    listed = none + (TRUE[3] + 64 * TRUE[4]) * pairs
    dense_ms = none + dense_share * (listed - none)
    assert model.pays_below(shape, dense_ms) == pytest.approx(dense_share)
    assert model.pays_below(shape, 0.5 * none) == 0.0
    assert CostModel({"native": (9.0, 0, 0, 0, 0, 0, 0)}).pays_below(shape, 5.0) == 0.0
    assert CostModel({"native": TRUE}, 96).pays_below(shape, dense_ms) < dense_share
    assert model.pays_below(shape, 2 * listed) == 1.0


def test_an_unmeasured_precision_is_refused():
    model = CostModel({"native": TRUE})
    with pytest.raises(ValueError, match=r"precision: expected one that was measured \(native\), got 'fp8'"):
        model.predict(mixed_index(Shape(100, 1, 64), CPU), 64, "fp8")
    starts = torch.tensor([[[0, 30, 100]]], dtype=torch.int32)
    varied = BlockIndex.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64, 100, 100, starts, starts)
    with pytest.raises(ValueError, match="index: expected blocks of one length, got starts"):
        model.predict(varied, 64)


def test_the_command_measures_this_device(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fit, "CPU_SIZES", ((130, 333), 2, (200,)))
    file = tmp_path / "fit.json"
    code = main(["bench", "--fit", "--output", str(file)])
    (text, errors), report = capsys.readouterr(), json.loads(file.read_text())
    # Whether it predicts well here is no matter of this test, but that it tells is.
    missed = [check for check in report["checks"] if not check["ok"]]
    assert len(report["failures"]) == len(missed)
    assert code == bool(missed)
    assert ("predicted wrong" in errors) == bool(missed)
    assert text.startswith(f"fitted on {2 * 2 * 4} measurements, largest error ")
    assert text.count("check: ") == len(report["checks"]) == 2
    assert text.count("pays: ") == len(report["pays"]) == 4
    assert report["machine"]["dtype"] == "bfloat16"
    assert all(row["ms"] > 0 and math.isfinite(row["predicted_ms"]) for row in report["rows"])
    assert {row["below_density"] for row in report["pays"]} <= {
        CostModel({"native": tuple(report["model"]["native"])}).pays_below(
            Shape(tokens, 2, dim), sdpa, "native"
        )
        for tokens, dim, sdpa in [(row["tokens"], row["dim"], row["sdpa_ms"]) for row in report["pays"]]
    }
