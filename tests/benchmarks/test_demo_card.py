"""The card of the demo model is measured, not written down."""

import json
import subprocess
import sys
from pathlib import Path

import demo_card
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "demo_card.py"


def test_mass_of_the_best_blocks_on_known_attention() -> None:
    """Queries that look at one block only hold all mass there; without structure mass spreads evenly."""
    tokens = 40 * demo_card.BLOCK
    key = torch.zeros(1, tokens, 2, 64)
    key[:, : demo_card.BLOCK, 0, 0] = 1.0  # head 0: the first block stands out, head 1: nothing does
    query = torch.zeros(1, tokens, 2, 64)
    query[..., 0] = 400.0
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    plain = torch.arange(tokens)
    in_order = demo_card.held_mass(query, key, (plain, plain), torch.tensor([0, 17]))
    torch.testing.assert_close(in_order, torch.tensor([[1.0, 1.0], [0.25, 0.10]]))
    shuffled = demo_card.held_mass(query, key, (order, order), torch.tensor([0, 17]))
    assert float(shuffled[0, 1]) < 0.5
    # Blocks that are found gather what stands out wherever it is.
    mixed = key.gather(1, order[None, :, None, None].expand_as(key))
    found = demo_card.held_mass(
        query, mixed, demo_card.partition(query, mixed, block=64), torch.tensor([0, 17])
    )
    torch.testing.assert_close(found[0], torch.tensor([1.0, 1.0]))


def test_card_of_a_short_generation(tmp_path: Path) -> None:
    sizes = ["--height", "96", "--width", "112", "--frames", "9", "--steps", "2"]
    command = [
        sys.executable,
        SCRIPT,
        *sizes,
        "--prompts",
        "1",
        "--device",
        "cpu",
        "--output",
        tmp_path / "card.json",
    ]
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "card.json").read_text())
    assert len(card["heads"]) == 24
    assert all(0 < head["mass_10"] < head["mass_25"] < 1 for head in card["heads"])
    for name in ("mass_25", "mass_10", "mass_25_balanced", "mass_10_balanced"):
        assert card[f"{name}_mean"] == pytest.approx(sum(head[name] for head in card["heads"]) / 24)
    assert card["prompts"] == 1
    assert "torch" in card["machine"]
