"""A plan goes on real diffusers models and comes off again without a trace."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import nn

import dit_accel
from dit_accel import processor
from dit_accel.attention import attend
from dit_accel.candidate import Candidate
from dit_accel.pipelines import family_of
from dit_accel.plan import AccelPlan, PlanError, config_hash_of
from dit_accel.state import hook_of
from dit_accel.switch import attn_processors, disable, enable, states, stats

DENSE = AccelPlan.preset("dense")
WINDOW = AccelPlan.preset("window", density=0.5, block=16)
FULL = AccelPlan.preset("window", density=1.0, block=16)


def ranged_plan(model):
    """Mixed heads and other heads in each layer and range, one layer dense in the second range."""
    names = tuple(family_of(model.transformer).attention_modules(model.transformer))
    candidates = (
        Candidate("dense", 1.0),
        Candidate("window", 0.4),
        Candidate("pooled", 0.4),
        Candidate("skip", 0.0),
    )
    choice = torch.tensor([[[1, 2], [0, 1]], [[0, 0], [3, 2]]], dtype=torch.int16)
    return AccelPlan(
        candidates,
        choice,
        (0.0, 0.5),
        layers=names,
        model_class=type(model.transformer).__name__,
        config_hash=config_hash_of(model.transformer),
        block=16,
    )


def compile_blocks(model, **options):
    if model.name == "cogvideox":  # has no compile_repeated_blocks
        for block in model.transformer.transformer_blocks:
            block.compile(fullgraph=True, **options)
    else:
        model.transformer.compile_repeated_blocks(fullgraph=True, **options)


def graphs_of(model, timesteps):
    """Outputs at the timesteps, and how many graphs were compiled for them."""
    torch._dynamo.utils.counters.clear()
    outputs = [model.run(timestep=timestep) for timestep in timesteps]
    return outputs, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_recompiles(fresh_compiler):
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def test_public_names():
    for name in ("enable", "disable", "attn_processors", "stats"):
        assert getattr(dit_accel, name) is globals()[name]


@pytest.mark.parametrize("frames", [1, 3])
def test_dense_plan_is_bit_identical(any_tiny, frames):
    expected = any_tiny.run(frames=frames)
    enable(any_tiny.transformer, DENSE)
    assert torch.equal(any_tiny.run(frames=frames), expected)
    assert stats(any_tiny.transformer) == {"density_mean": 1.0, "sparse_calls": 0, "dense_calls": 2}


def test_full_density_through_the_kernel_errs_like_the_plain_model(any_tiny):
    plain = any_tiny.run()
    double = copy.deepcopy(any_tiny.transformer).double()
    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in any_tiny.inputs().items()
    }
    with torch.no_grad():
        exact = double(**inputs, return_dict=False)[0]
    enable(any_tiny.transformer, FULL)
    output = any_tiny.run()
    assert stats(any_tiny.transformer) == {"density_mean": 1.0, "sparse_calls": 2, "dense_calls": 0}
    # Both are float32 roundings of the same sums in another order; a band of ulps of the largest value on
    # top.
    band = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (output - exact).abs().max() <= 2 * (plain - exact).abs().max() + band


def test_heads_of_one_layer_run_in_different_precisions(any_tiny):
    native = AccelPlan.preset("window", density=0.6, block=16)
    candidate = native.candidates[0]
    lower = replace(candidate, precision="int8")
    layers = list(family_of(any_tiny.transformer).attention_modules(any_tiny.transformer))
    plain = any_tiny.run()
    outputs = {}
    for name, choice in {"native": [0, 0], "one": [1, 0], "both": [1, 1]}.items():
        plan = replace(
            native,
            candidates=(candidate, lower),
            choice=torch.tensor([choice] * len(layers), dtype=torch.int16)[None],
            layers=tuple(layers),
        )
        enable(any_tiny.transformer, plan, backend="reference", guard=False)
        outputs[name] = any_tiny.run()
        assert stats(any_tiny.transformer)["sparse_calls"] == len(layers)
        disable(any_tiny.transformer)
    moved = (outputs["native"] - plain).norm()
    one, both = ((outputs[name] - outputs["native"]).norm() for name in ("one", "both"))
    assert 0 < one < 0.2 * moved  # INT8 is far from as coarse as leaving 40 % of the pairs out
    assert 0 < both < 0.2 * moved
    assert not torch.equal(outputs["one"], outputs["both"])


@pytest.mark.parametrize(("frames", "height", "width", "batch"), [(3, 5, 7, 2), (1, 9, 11, 2), (2, 13, 3, 1)])
def test_sparse_plan_runs_on_odd_sizes(any_tiny, frames, height, width, batch):
    sizes = {"frames": frames, "height": height, "width": width, "batch": batch}
    plain = any_tiny.run(**sizes)
    enable(any_tiny.transformer, WINDOW)
    output = any_tiny.run(**sizes)
    assert output.shape == plain.shape
    assert output.isfinite().all()
    assert not torch.allclose(output, plain, rtol=1e-3, atol=1e-3)
    report = stats(any_tiny.transformer)
    assert report["sparse_calls"] == 2
    assert 0.4 < report["density_mean"] < 0.9


def test_batch_entries_do_not_mix(any_tiny):
    enable(any_tiny.transformer, ranged_plan(any_tiny))
    inputs = any_tiny.inputs(batch=2)
    both = any_tiny.run(inputs)
    shared = {"num_frames", "height", "width", "image_rotary_emb", "img_ids", "txt_ids"}
    single = {name: value if name in shared else value[1:] for name, value in inputs.items()}
    torch.testing.assert_close(any_tiny.run(single), both[1:])


def test_disable_restores_the_very_objects(any_tiny):
    transformer = any_tiny.transformer
    expected = any_tiny.run()
    before = transformer.attn_processors
    attributes = {name: set(vars(module)) for name, module in transformer.named_modules() if name}
    assert enable(transformer, WINDOW) is transformer
    any_tiny.run()
    assert disable(transformer) is transformer
    after = transformer.attn_processors
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert hook_of(transformer) is None
    assert {name: set(vars(m)) for name, m in transformer.named_modules() if name} == attributes
    assert not any(module._forward_pre_hooks for module in transformer.modules())
    assert torch.equal(any_tiny.run(), expected)
    enable(transformer, DENSE)
    assert torch.equal(any_tiny.run(), expected)


def test_disable_leaves_processors_set_since(tiny):
    model = tiny("wan")
    enable(model.transformer, WINDOW)
    own = type(model.transformer.blocks[0].attn2.processor)()
    model.transformer.blocks[0].attn1.set_processor(own)
    disable(model.transformer)
    assert model.transformer.blocks[0].attn1.processor is own


@pytest.mark.parametrize("ran", [False, True])
def test_processors_replaced_since_are_refused(tiny, ran):
    """The plan would be off without a word; CogVideoX exchanges its processors when it fuses its projections."""
    model = tiny("cogvideox")
    enable(model.transformer, WINDOW)
    if ran:
        model.run()
    model.transformer.fuse_qkv_projections()
    with pytest.raises(
        RuntimeError, match="2 of 2 attention processors were replaced since the plan was enabled .*"
    ):
        model.run()
    disable(model.transformer)
    model.run()


def test_a_part_of_the_processors_is_refused(tiny):
    model = tiny("wan")
    originals = dict(model.transformer.attn_processors)
    model.transformer.set_attn_processor(attn_processors(model.transformer, WINDOW))
    module = model.transformer.blocks[1].attn1
    module.set_processor(originals["blocks.1.attn1.processor"])
    with pytest.raises(
        RuntimeError, match=r"1 of 2 attention processors .*, blocks\.1\.attn1 first; call disable"
    ):
        model.run()


def test_a_sparse_plan_runs_under_autocast(tiny):
    """Norms of queries and keys leave them in float32 there, values are in 16 bits."""
    model = tiny("cogvideox")
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.run()
        enable(model.transformer, FULL)
        found = model.run()
    assert (found - plain).norm() / plain.norm() < 0.02


def test_what_chooses_and_attends_is_not_under_autocast(tiny, monkeypatch):
    model, seen = tiny("cogvideox"), []

    def watched(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(processor, "attend", watched)
    enable(model.transformer, AccelPlan.preset("scatterbrain", density=0.3, block=16))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.run().isfinite().all()
    assert seen == [False, False]


@pytest.mark.parametrize("plan", [FULL, DENSE], ids=["sparse", "dense"])
def test_compiled_blocks_run_under_autocast(tiny, fresh_compiler, plan):
    """A compiled graph has its casts written down and runs with autocast off."""
    model = tiny("cogvideox")
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.run()
        enable(model.transformer, plan)
        compile_blocks(model, backend="aot_eager")
        found = model.run()
    assert (found - plain).norm() / plain.norm() < 0.02


def test_a_hook_of_diffusers_that_came_later_stays(tiny):
    """One with a forward of its own, as that of FasterCache is."""

    class Doubled(DiffusersHook):
        def new_forward(self, module, *args, **kwargs):
            return tuple(2 * x for x in self.fn_ref.original_forward(*args, **kwargs))

    model = tiny("wan")
    plain = model.run()
    enable(model.transformer, FULL)
    HookRegistry.check_if_exists_or_initialize(model.transformer).register_hook(Doubled(), "doubled")
    disable(model.transformer)
    assert torch.equal(model.run(), 2 * plain)
    model.transformer._diffusers_hook.remove_hook("doubled", recurse=False)
    assert torch.equal(model.run(), plain)


def test_an_enabled_model_is_not_copied(wan_pipeline):
    pipe = wan_pipeline()
    enable(pipe, WINDOW)
    for part in (pipe.transformer, pipe.components):
        with pytest.raises(ValueError, match=r"disable\(pipe\) before copying it"):
            copy.deepcopy(part)
    disable(pipe)
    assert copy.deepcopy(pipe.transformer) is not pipe.transformer


def test_attn_processors_work_without_enable(any_tiny):
    transformer = any_tiny.transformer
    expected = any_tiny.run()
    enable(transformer, WINDOW)
    sparse = any_tiny.run()
    disable(transformer)
    before = transformer.attn_processors
    processors = attn_processors(transformer, WINDOW)
    assert processors.keys() == before.keys()
    assert torch.equal(any_tiny.run(), expected)
    transformer.set_attn_processor(processors)
    assert processors == {}
    assert torch.equal(any_tiny.run(), sparse)
    disable(transformer)
    assert all(before[name] is processor for name, processor in transformer.attn_processors.items())


@pytest.mark.parametrize("offloaded_first", [True, False])
def test_offloading_hooks_come_and_go(tiny, offloaded_first):
    """CPU offloading wraps `forward` when switched on and unwraps it after every generation."""
    model = tiny("wan")
    expected = model.run()
    offloads = []

    class Offload(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            offloads.append(module)
            return args, kwargs

    if offloaded_first:
        add_hook_to_module(model.transformer, Offload())
    enable(model.transformer, WINDOW)
    sparse = model.run()
    for _ in range(2):
        remove_hook_from_module(model.transformer)
        add_hook_to_module(model.transformer, Offload())
        assert torch.equal(model.run(), sparse)
    disable(model.transformer)
    offloads.clear()
    assert torch.equal(model.run(), expected)
    assert offloads == [model.transformer]
    remove_hook_from_module(model.transformer)
    assert torch.equal(model.run(), expected)
    assert not torch.equal(sparse, expected)


def test_backend_is_the_kernels(tiny):
    model = tiny("wan")
    outputs = {}
    for backend in ("reference", "torch"):
        enable(model.transformer, WINDOW, backend=backend)
        outputs[backend] = model.run()
        disable(model.transformer)
    torch.testing.assert_close(outputs["torch"], outputs["reference"], rtol=1e-4, atol=1e-4)


def test_pipeline_with_two_experts(wan_pipeline):
    pipe = wan_pipeline(experts=2)
    plain = pipe.latents(steps=4)
    enable(pipe, DENSE)
    assert torch.equal(pipe.latents(steps=4), plain)
    disable(pipe)
    enable(pipe, WINDOW)
    assert not torch.allclose(pipe.latents(steps=4), plain)
    calls = [state.stats.sparse_calls for state in states(pipe)]
    assert all(calls)
    assert stats(pipe)["sparse_calls"] == sum(calls) == 4 * 2 * 2
    disable(pipe)
    assert hook_of(pipe.transformer) is hook_of(pipe.transformer_2) is None
    assert torch.equal(pipe.latents(steps=4), plain)


def test_stats_are_those_of_the_last_generation(wan_pipeline):
    pipe = enable(wan_pipeline(), WINDOW)
    for steps in (3, 2):
        pipe.latents(steps=steps)
        assert stats(pipe)["sparse_calls"] == steps * 2 * 2
    pipe.latents(steps=2, guidance_scale=1.0)
    assert stats(pipe)["sparse_calls"] == 2 * 2
    assert 0.4 < stats(pipe)["density_mean"] < 0.6


def test_generations_repeat_exactly(wan_pipeline):
    pipe = enable(wan_pipeline(), WINDOW)
    assert torch.equal(pipe.latents(), pipe.latents())


class TestRefusals:
    def test_double_enable(self, wan_pipeline):
        pipe = enable(wan_pipeline(), DENSE)
        for again in (pipe, pipe.transformer):
            with pytest.raises(ValueError, match=r"enabled here already; call dit_accel.disable\(pipe\)"):
                enable(again, WINDOW)
        with pytest.raises(ValueError, match="enabled here already"):
            attn_processors(pipe.transformer, WINDOW)

    def test_compiled_blocks(self, tiny):
        model = tiny("wan")
        compile_blocks(model, backend="eager")
        with pytest.raises(ValueError, match=r"compiled already; call enable\(\) first and compile after it"):
            enable(model.transformer, DENSE)

    def test_compiled_transformer(self, tiny):
        model = tiny("wan")
        with pytest.raises(ValueError, match="compiled already"):
            enable(torch.compile(model.transformer, backend="eager"), DENSE)

    def test_several_devices(self, tiny):
        transformer = tiny("wan").transformer
        transformer.hf_device_map = {"blocks.0": 0, "blocks.1": 1, "proj_out": "cpu"}
        with pytest.raises(
            ValueError, match="expected it on one device, got its layers on 0, 1; load it without"
        ):
            enable(transformer, WINDOW)
        assert hook_of(transformer) is None
        transformer.hf_device_map = {"": 0}
        enable(transformer, WINDOW)

    def test_unsupported_class(self):
        with pytest.raises(ValueError, match="expected one of the supported classes .* got Linear"):
            enable(torch.nn.Linear(2, 2), DENSE)

    def test_no_transformer(self):
        with pytest.raises(ValueError, match="expected a diffusers transformer or a pipeline .* got str"):
            enable("Wan-AI/Wan2.1", DENSE)

    def test_not_a_plan(self, tiny):
        with pytest.raises(TypeError, match="plan: expected an AccelPlan, got str"):
            enable(tiny("wan").transformer, "outputs/plan")

    def test_unknown_backend(self, tiny):
        with pytest.raises(ValueError, match="backend: expected one of auto, .*, got 'cuda'"):
            enable(tiny("wan").transformer, DENSE, backend="cuda")

    def test_plan_of_another_class(self, tiny):
        with pytest.raises(
            PlanError, match=r"model_class.*WanTransformer3DModel.*LTXVideoTransformer3DModel"
        ):
            enable(tiny("ltx").transformer, ranged_plan(tiny("wan")))

    def test_plan_of_another_config(self, tiny):
        with pytest.raises(PlanError, match="config_hash"):
            enable(tiny("wan", layers=3).transformer, ranged_plan(tiny("wan")))

    @pytest.mark.parametrize("obstacle", ["config", "processor"])
    def test_second_expert_that_does_not_fit_leaves_the_first_alone(self, wan_pipeline, tiny, obstacle):
        pipe = wan_pipeline(experts=2)
        if obstacle == "config":
            pipe.transformer_2 = tiny("wan", layers=3).transformer
        else:
            pipe.transformer_2.blocks[1].attn1.set_processor(nn.Identity())
        before = pipe.transformer.attn_processors
        with pytest.raises(ValueError, match="config_hash|calls dispatch_attention_fn, got Identity"):
            enable(pipe, ranged_plan(tiny("wan")))
        assert hook_of(pipe.transformer) is None
        assert all(before[name] is processor for name, processor in pipe.transformer.attn_processors.items())

    @pytest.mark.parametrize("function", [disable, stats, states])
    def test_nothing_enabled(self, tiny, function):
        with pytest.raises(ValueError, match="not enabled here; call dit_accel.enable"):
            function(tiny("wan").transformer)

    def test_stats_before_a_generation(self, tiny):
        transformer = enable(tiny("wan").transformer, DENSE)
        with pytest.raises(ValueError, match=r"expected a generation since enable\(\), got none"):
            stats(transformer)


# Importing Inductor runs deprecated code of torch itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
class TestCompiled:
    def test_graphs_serve_every_layer_range_and_step(self, tiny, any_tiny, fresh_compiler):
        """A plan that differs by layer and range takes as many graphs as one step of the plain model."""
        plain = tiny(any_tiny.name)
        compile_blocks(plain, backend="eager")
        _, graphs = graphs_of(plain, (900.0,))
        torch._dynamo.reset()
        enable(any_tiny.transformer, ranged_plan(any_tiny))
        timesteps = (900.0, 600.0, 300.0)
        eager = [any_tiny.run(timestep=timestep) for timestep in timesteps]
        report = stats(any_tiny.transformer)
        compile_blocks(any_tiny, backend="eager")
        compiled, planned_graphs = graphs_of(any_tiny, timesteps)
        assert planned_graphs == graphs > 0
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert stats(any_tiny.transformer) == report
        assert report["sparse_calls"] == 2 * 2 + 1

    def test_dense_plan_is_bit_identical_under_inductor(self, tiny, no_recompiles):
        plain, planned = tiny("wan"), tiny("wan")
        compile_blocks(plain)
        expected = plain.run()
        torch._dynamo.reset()
        enable(planned.transformer, DENSE)
        compile_blocks(planned)
        assert torch.equal(planned.run(), expected)

    def test_sparse_plan_under_inductor(self, tiny, no_recompiles):
        model = tiny("wan")
        enable(model.transformer, ranged_plan(model))
        eager = [model.run(timestep=timestep) for timestep in (900.0, 300.0)]
        compile_blocks(model)
        for timestep, expected in zip((900.0, 300.0), eager, strict=True):
            torch.testing.assert_close(model.run(timestep=timestep), expected, rtol=1e-4, atol=1e-4)

    def test_the_whole_transformer_compiles_around_the_hook(self, tiny, fresh_compiler):
        model = tiny("wan")
        enable(model.transformer, WINDOW)
        expected = model.run()
        model.transformer.compile(backend="eager")
        torch.testing.assert_close(model.run(), expected, rtol=1e-4, atol=1e-4)

    def test_disable_after_compiling(self, tiny, fresh_compiler):
        model = tiny("wan")
        expected = model.run()
        enable(model.transformer, WINDOW)
        compile_blocks(model, backend="eager")
        sparse = model.run()
        disable(model.transformer)
        torch.testing.assert_close(model.run(), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(sparse, expected)
