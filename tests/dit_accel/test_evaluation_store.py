"""Generations on disk and in memory."""

import json

import pytest
import torch

from dit_accel.evaluation.files import slug, write_json
from dit_accel.evaluation.generate import Generation
from dit_accel.evaluation.store import GenerationStore


@pytest.fixture
def made() -> Generation:
    generator = torch.Generator().manual_seed(0)
    return Generation(
        torch.rand(2, 5, 7, 3, generator=generator), torch.rand(1, 4, 2, 3, generator=generator), 12.5
    )


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
@pytest.mark.parametrize("density", [None, 0.0, 0.25])
@pytest.mark.parametrize(
    "skipped", [(None, None, None, None), (0.0, 0, 0, 0.0), (0.75, 3 * 2**40 + 1, 7, 4.25)]
)
def test_what_was_put_comes_back(on_disk, density, skipped, made, tmp_path):
    made = Generation(made.frames, made.latents, made.seconds, density, *skipped)
    store = GenerationStore(tmp_path / "deep" if on_disk else None)
    assert not store.has(3, "preset:window@0.3")
    store.put(3, "preset:window@0.3", made)
    assert store.has(3, "preset:window@0.3")
    found = store.get(3, "preset:window@0.3")
    assert torch.equal(found.frames, made.frames)
    assert torch.equal(found.latents, made.latents)
    assert (found.seconds, found.density) == (12.5, density)
    rest = (found.skipped_share, found.cache_bytes, found.guarded_heads, found.attention_seconds)
    assert rest == skipped


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_drop_takes_one_prompt_and_clear_all(on_disk, made, tmp_path):
    store = GenerationStore(tmp_path if on_disk else None)
    for prompt in (0, 1):
        for name in ("dense", "preset:skip"):
            store.put(prompt, name, made)
    store.drop(0)
    assert [store.has(prompt, "preset:skip") for prompt in (0, 1)] == [False, True]
    with pytest.raises(ValueError, match="prompt 0, variant 'dense': its frames were dropped, or never made"):
        store.get(0, "dense")
    store.clear()
    assert not store.has(1, "dense")


def test_a_broken_file_is_named(made, tmp_path):
    store = GenerationStore(tmp_path)
    store.put(0, "dense", made)
    path = tmp_path / "000-dense.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"000-dense.safetensors: expected a generation, got a broken file; delete"
    ):
        store.get(0, "dense")


def test_json_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "data.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1}


def test_slugs_are_safe_and_distinct():
    names = ["dense", "preset:window@0.3", "preset/window@0.3", "plan:" + "a" * 100, "plan:" + "a" * 99]
    slugs = [slug(name) for name in names]
    assert slugs[0] == "dense"
    assert len(set(slugs)) == len(names)
    assert not any(set(text) & set("/: ") or len(text) > 70 for text in slugs)
