"""Swapped processors are the model's own in all but the function they call."""

import inspect

import pytest
import torch
from diffusers.hooks import PyramidAttentionBroadcastConfig
from diffusers.models.attention_processor import FusedCogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.pipelines import family_of
from dit_accel.plan import AccelPlan
from dit_accel.processor import LayerCursor, swapped_class, swapped_processor
from dit_accel.state import AccelState
from dit_accel.switch import disable, enable, states, stats

DENSE = AccelPlan.preset("dense")
WINDOW = AccelPlan.preset("window", density=0.5, block=16)


def swapped_modules(model):
    return family_of(model.transformer).attention_modules(model.transformer)


def test_swapped_class_is_the_original_but_for_one_global(any_tiny):
    originals = {name: module.processor for name, module in swapped_modules(any_tiny).items()}
    enable(any_tiny.transformer, DENSE)
    for name, module in swapped_modules(any_tiny).items():
        original, processor = originals[name], module.processor
        assert isinstance(processor, type(original))
        assert type(processor) is not type(original)
        assert type(processor).__name__ == type(original).__name__
        assert type(processor).__call__.__code__ is type(original).__call__.__code__
        assert inspect.signature(processor.__call__) == inspect.signature(original.__call__)
        assert hasattr(processor, "_attention_backend") == hasattr(original, "_attention_backend")
        assert processor.__dict__ is original.__dict__
    assert len({type(module.processor) for module in swapped_modules(any_tiny).values()}) == 1


def test_only_the_listed_modules_are_swapped(any_tiny):
    before = any_tiny.transformer.attn_processors
    enable(any_tiny.transformer, DENSE)
    after = any_tiny.transformer.attn_processors
    swapped = {f"{name}.processor" for name in swapped_modules(any_tiny)}
    assert {name for name in before if before[name] is not after[name]} == swapped


def test_a_processor_without_the_function_is_refused(tiny):
    class Other(WanAttnProcessor):
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    model = tiny("wan")
    model.transformer.blocks[1].attn1.set_processor(Other())
    with pytest.raises(ValueError, match="expected one that calls dispatch_attention_fn, got Other"):
        enable(model.transformer, DENSE)
    assert type(model.transformer.blocks[0].attn1.processor) is WanAttnProcessor


def test_attributes_of_a_user_are_shared_both_ways(tiny):
    model = tiny("wan")
    state = AccelState(DENSE, family_of(model.transformer))
    original = WanAttnProcessor()
    cls = swapped_class(WanAttnProcessor, "dispatch_attention_fn", state, LayerCursor())
    twin = swapped_processor(original, cls)
    twin._attention_backend = "flex"
    assert original._attention_backend == "flex"
    assert WanAttnProcessor._attention_backend is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_users_backend_runs_the_dense_rows(tiny, when):
    model = tiny("wan")

    def choose(backend="_native_math"):
        for block in model.transformer.blocks:
            block.attn1.set_attention_backend(backend)

    choose("native")
    default = model.run()
    choose()
    expected = model.run()
    assert not torch.equal(expected, default)
    for block in model.transformer.blocks:
        block.attn1.processor._attention_backend = None
    if when == "before":
        choose()
    enable(model.transformer, DENSE)
    if when == "after":
        choose()
    assert torch.equal(model.run(), expected)
    disable(model.transformer)
    assert torch.equal(model.run(), expected)


def test_parallel_config_and_sparse_rows_are_refused(tiny):
    model = tiny("wan")
    enable(model.transformer, WINDOW)
    model.transformer._parallel_config = object()
    with pytest.raises(
        RuntimeError, match="WanTransformer3DModel has a parallel config, and a plan that has sparse heads"
    ):
        model.run()


def test_parallel_config_and_a_cache_of_steps_are_refused(wan_pipeline):
    pipe = wan_pipeline()
    enable(pipe, AccelPlan.preset("cg-taylor", threshold=0.1))
    pipe.transformer._parallel_config = object()
    with pytest.raises(
        RuntimeError, match="WanTransformer3DModel has a parallel config, and a plan that skips steps"
    ):
        pipe.latents(steps=3)


def test_parallel_config_reaches_the_original_function(tiny):
    model = tiny("wan")
    enable(model.transformer, DENSE)
    for block in model.transformer.blocks:
        block.attn1.processor._parallel_config = object()
    with pytest.raises(AttributeError, match="context_parallel_config"):
        model.run()


@pytest.mark.parametrize("name", ["hunyuan_video", "cogvideox", "flux"])
def test_text_and_video_stand_where_the_grid_says(tiny, name):
    """New video changes only the video part of the first layer's keys, new text only the text part."""
    model = tiny(name)
    enable(model.transformer, WINDOW)
    (state,) = states(model.transformer)
    keys = []

    def capture(layer, query, key, value, key_mask):
        if layer == 0:
            keys.append(key[0])

    state.capture = capture
    inputs = model.inputs()
    model.run(inputs)
    for changed in ("hidden_states", "encoder_hidden_states"):
        model.run(inputs | {changed: inputs[changed].flip(0) + 1})
    grid = state.grid
    for key, part, other in zip(
        keys[1:], (grid.video_slice, grid.text_slice), (grid.text_slice, grid.video_slice), strict=True
    ):
        assert torch.equal(key[other], keys[0][other])
        assert (key[part] != keys[0][part]).any(-1).any(-1).all()


def test_hunyuan_padding_becomes_a_key_mask(tiny):
    model = tiny("hunyuan_video")
    enable(model.transformer, WINDOW)
    (state,) = states(model.transformer)
    masks = []
    state.capture = lambda layer, query, key, value, key_mask: masks.append(key_mask)
    inputs = model.inputs()
    output = model.run(inputs)
    assert len(masks) == 2
    for mask in masks:
        assert mask.dtype == torch.bool
        assert (~mask).nonzero().tolist() == [[1, 107], [1, 108], [1, 109]]
    inputs["encoder_hidden_states"][1, 2:] = 1e3
    assert torch.equal(model.run(inputs), output)


def test_capture_sees_what_the_attention_reads(any_tiny):
    """The attention of what the first layer's capture saw is what its output projection gets."""
    enable(any_tiny.transformer, DENSE)
    (state,) = states(any_tiny.transformer)
    calls, outputs = [], []
    state.capture = lambda *call: calls.append(call)
    module = next(iter(swapped_modules(any_tiny).values()))
    module.to_out[0].register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    any_tiny.run()
    assert [layer for layer, *_ in calls] == [0, 1]
    _, *tensors, mask = calls[0]
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, None if mask is None else mask[:, None, None]
    )
    attended = attended.transpose(1, 2).flatten(2)
    video = attended[:, state.grid.video_slice]
    torch.testing.assert_close(outputs[0], attended if any_tiny.name == "cogvideox" else video)


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 1, 1, 35), torch.ones(2, 1, 35, 35, dtype=torch.bool)], ids=["float", "pairs"]
)
def test_other_masks_are_refused_on_sparse_rows(tiny, mask):
    model = tiny("wan")
    attention = model.transformer.blocks[0].attn1
    for plan in (DENSE, WINDOW):
        enable(model.transformer, plan)
        (state,) = states(model.transformer)
        state.begin(TokenGrid(1, 5, 7), 0.5)
        if plan is DENSE:
            assert attention(torch.randn(2, 35, 32), None, mask).shape == (2, 35, 32)
        else:
            with pytest.raises(ValueError, match=r"expected a key-padding mask, bool \[2, 1, 1, 35\], got"):
                attention(torch.randn(2, 35, 32), None, mask)
        disable(model.transformer)


def test_a_sequence_that_is_not_the_grid_is_refused(tiny):
    model = tiny("wan")
    enable(model.transformer, WINDOW)
    (state,) = states(model.transformer)
    state.begin(TokenGrid(1, 5, 7), 0.5)
    with pytest.raises(
        ValueError, match=r"layer 1: expected the tokens of TokenGrid\(frames=1.* sequence of 34"
    ):
        model.transformer.blocks[1].attn1(torch.randn(2, 34, 32))


def test_a_processor_outside_its_transformer_is_refused(tiny):
    model = tiny("wan")
    enable(model.transformer, DENSE)
    with pytest.raises(RuntimeError, match="ran outside a forward of the transformer"):
        model.transformer.blocks[0].attn1(torch.randn(1, 35, 32))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_each_layer_runs_its_own_row(tiny, name, layer):
    """`skip` in one layer is a model whose values are zero there."""
    model = tiny(name)
    choice = torch.zeros(1, 2, 2, dtype=torch.int16)
    choice[0, layer] = 1
    plan = AccelPlan(
        (Candidate("dense", 1.0), Candidate("skip", 0.0)), choice, layers=tuple(swapped_modules(model))
    )
    enable(model.transformer, plan)
    output = model.run()
    assert stats(model.transformer) == {"density_mean": 0.5, "sparse_calls": 1, "dense_calls": 1}
    disable(model.transformer)
    assert not torch.allclose(model.run(), output)
    module = list(swapped_modules(model).values())[layer]
    module.to_v.weight.zero_()
    module.to_v.bias.zero_()
    assert torch.equal(model.run(), output)


def test_layers_keep_their_numbers_when_a_cache_skips_some(tiny):
    model = tiny("wan", layers=3)
    enable(model.transformer, DENSE)
    (state,) = states(model.transformer)
    layers = []
    state.capture = lambda layer, *_: layers.append(layer)
    model.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("blocks.1",),
            current_timestep_callback=lambda: 500,
        )
    )
    for timestep in (600.0, 500.0, 400.0, 300.0):
        model.run(timestep=timestep)
        layers.append("-")
    model.transformer.disable_cache()
    forwards = "".join(map(str, layers)).split("-")[:-1]
    assert set(forwards) == {"012", "02"}


def test_the_cross_attention_of_an_ip_adapter_stays(tiny):
    model = tiny("flux")
    processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=8, num_tokens=(4,))
    attention = model.transformer.transformer_blocks[0].attn
    attention.set_processor(processor.requires_grad_(False))
    inputs = model.inputs() | {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 4, 8)]}}
    expected = model.run(inputs)
    enable(model.transformer, DENSE)
    assert torch.equal(model.run(inputs), expected)
    assert stats(model.transformer)["dense_calls"] == 2
    assert {"transformer_blocks.0.attn.processor.to_k_ip.0.weight"} <= model.transformer.state_dict().keys()
    disable(model.transformer)
    assert attention.processor is processor


def test_fused_projections(tiny):
    model = tiny("cogvideox")
    model.transformer.fuse_qkv_projections()
    expected = model.run()
    enable(model.transformer, DENSE)
    assert isinstance(model.transformer.transformer_blocks[0].attn1.processor, FusedCogVideoXAttnProcessor2_0)
    assert torch.equal(model.run(), expected)
