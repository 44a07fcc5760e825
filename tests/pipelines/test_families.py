"""Families read grid, position and attention names off real diffusers classes."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTokenReplaceTransformerBlock
from torch import nn

from dit_accel.caching.calls import named_arguments
from dit_accel.grid import TokenGrid
from dit_accel.pipelines import family_of

NAMES = {
    "wan": ["blocks.0.attn1", "blocks.1.attn1"],
    "hunyuan_video": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
    "cogvideox": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "ltx": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
    "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
}
GRIDS = {
    "wan": TokenGrid(3, 5, 7),
    "hunyuan_video": TokenGrid(3, 5, 7, 5),
    "cogvideox": TokenGrid(3, 5, 7, 5, text_first=True),
    "ltx": TokenGrid(3, 5, 7),
    "flux": TokenGrid(3, 5, 7, 5, text_first=True),
}


def read_grid(model, inputs):
    family = family_of(model.transformer)
    return family.read_grid(model.transformer, family.bind(model.transformer, (), inputs))


def test_attention_modules_are_the_self_attention_in_forward_order(any_tiny):
    modules = family_of(any_tiny.transformer).attention_modules(any_tiny.transformer)
    assert list(modules) == NAMES[any_tiny.name]
    called = []
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    any_tiny.run(frames=1)
    assert called == NAMES[any_tiny.name]
    assert {f"{name}.processor" for name in modules} <= any_tiny.transformer.attn_processors.keys()


def test_grid_is_read_from_the_call(any_tiny):
    assert read_grid(any_tiny, any_tiny.inputs(frames=3, height=5, width=7)) == GRIDS[any_tiny.name]


@pytest.mark.parametrize(("timestep", "progress"), [(1000.0, 0.0), (750.0, 0.25), (0.0, 1.0)])
def test_progress_goes_from_noise_to_clean(any_tiny, timestep, progress):
    family = family_of(any_tiny.transformer)
    arguments = family.bind(any_tiny.transformer, (), any_tiny.inputs(timestep=timestep))
    assert family.progress(arguments) == pytest.approx(progress)


def test_progress_counts_the_noisiest_token(tiny):
    model = tiny("wan")
    inputs = model.inputs(frames=3, height=5, width=7)
    inputs["timestep"] = torch.full((2, 105), 250.0)
    inputs["timestep"][:, :35] = 0.0
    family = family_of(model.transformer)
    assert family.progress(family.bind(model.transformer, (), inputs)) == pytest.approx(0.75)


@pytest.mark.parametrize("timestep", [400, 400.0, torch.tensor(400), torch.tensor([400.0, 400.0])])
def test_progress_takes_numbers_and_tensors(tiny, timestep):
    assert family_of(tiny("cogvideox").transformer).progress({"timestep": timestep}) == pytest.approx(0.6)


def test_positional_arguments_are_named(tiny):
    model = tiny("wan")
    inputs = model.inputs()
    family = family_of(model.transformer)
    arguments = family.bind(model.transformer, tuple(inputs.values()), {})
    assert arguments["timestep"] is inputs["timestep"]
    assert arguments["encoder_hidden_states_image"] is None


def test_cogvideox_with_temporal_patches(tiny):
    model = tiny("cogvideox")
    model.transformer.register_to_config(patch_size_t=2)
    assert read_grid(model, model.inputs(frames=6)) == TokenGrid(3, 5, 7, 5, text_first=True)


def test_flux_ids_with_an_offset_and_a_batch_axis(tiny):
    model = tiny("flux")
    inputs = model.inputs(frames=1)
    inputs["img_ids"] = inputs["img_ids"][None] + 3
    assert read_grid(model, inputs) == TokenGrid(1, 5, 7, 5, text_first=True)


def test_flux_without_a_full_grid_is_refused(tiny):
    model = tiny("flux")
    inputs = model.inputs(frames=1)
    inputs["img_ids"][:, 2] *= 2
    with pytest.raises(ValueError, match=r"Flux: expected 1 x 5 x 13 tokens .* from img_ids, got 35"):
        read_grid(model, inputs)


def test_ltx_without_sizes_is_refused(tiny):
    model = tiny("ltx")
    inputs = model.inputs() | {"num_frames": None}
    with pytest.raises(ValueError, match=r"LTX: expected num_frames, height and width .* got \(None, 5, 7\)"):
        read_grid(model, inputs)


def test_ltx_with_extra_tokens_is_refused(tiny):
    model = tiny("ltx")
    inputs = model.inputs() | {"height": 4}
    with pytest.raises(ValueError, match=r"expected 3 x 4 x 7 tokens .*, got 105"):
        read_grid(model, inputs)


def test_unsupported_class_names_the_supported_ones():
    for module in (nn.Linear(2, 2), DiTTransformer2DModel(num_layers=1, num_attention_heads=1)):
        with pytest.raises(ValueError, match=rf"WanTransformer3DModel, .*got {type(module).__name__}"):
            family_of(module)


def test_a_subclass_belongs_to_the_family_of_its_base(tiny):
    transformer = tiny("wan").transformer
    transformer.__class__ = type("FineTunedWan", (type(transformer),), {})
    assert family_of(transformer).name == "wan"


def test_the_first_frame_of_an_image_to_video_model_has_its_own_modulation(tiny):
    """HunyuanVideo's token replace: what TeaCache looks at is what the block's attention gets."""
    torch.manual_seed(0)
    block = HunyuanVideoTokenReplaceTransformerBlock(2, 16, mlp_ratio=2.0)
    hidden, encoder = torch.randn(2, 12, 32), torch.randn(2, 5, 32)
    embeddings = {"temb": torch.randn(2, 32), "token_replace_emb": torch.randn(2, 32)}
    seen = []
    block.attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    mask, rotary = torch.ones(2, 1, 1, 17, dtype=torch.bool), (torch.ones(12, 16), torch.zeros(12, 16))
    arguments = (hidden, encoder, embeddings["temb"], mask, rotary, embeddings["token_replace_emb"], 4)
    block(*arguments)
    found = family_of(tiny("hunyuan_video").transformer).modulated(
        block, named_arguments(block, arguments, {})
    )
    assert torch.equal(found, seen[0])
    plain = block.norm1(hidden, embeddings["temb"], embeddings["temb"], 4)[0]
    assert torch.equal(found[:, 4:], plain[:, 4:])
    assert not torch.allclose(found[:, :4], plain[:, :4])
