"""Gradients of the prediction by attention outputs against plain autograd, and what they foretell against forwards."""

from contextlib import contextmanager

import pytest
import torch

import dit_accel
from dit_accel import AccelPlan
from dit_accel.calibration import downstream
from dit_accel.calibration.downstream import Downstream
from dit_accel.switch import states

LAYERS = 3


@contextmanager
def enabled(transformer):
    dit_accel.enable(transformer, AccelPlan.preset("dense"))
    try:
        (state,) = states(transformer)
        state.capture = lambda *_: None
        yield state
    finally:
        dit_accel.disable(transformer)


def probed(tiny, seed=0, inputs=None, wanted=lambda _: True):
    """(prediction, gradients by layer as they came) of one probed forward."""
    found = []

    def receive(state, layer, query, key, value, key_mask, gradient):
        assert query.shape == gradient.shape
        found.append((layer, gradient.clone(), key_mask))

    with enabled(tiny.transformer) as state:
        probe = Downstream(state, LAYERS, wanted, receive, seed)
        with probe.watching(tiny.transformer):
            prediction = tiny.run(inputs)
    return prediction, found


def by_autograd(tiny, direction, monkeypatch):
    """The same gradients from a graph through the model's own attention, and the prediction."""
    from diffusers.models.transformers import transformer_wan

    outputs = []
    attention = transformer_wan.dispatch_attention_fn

    def recorded(query, key, value, **options):
        output = attention(query, key, value, **options)
        if query.shape[1] == key.shape[1]:
            output = output + torch.zeros_like(output).requires_grad_()
            outputs.append(output)
        return output

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", recorded)
    prediction = tiny.transformer(**tiny.inputs(), return_dict=False)[0]
    along = (prediction * direction).sum() / prediction.detach().norm()
    return prediction.detach(), torch.autograd.grad(along, outputs)


def test_gradients_are_those_of_plain_autograd(tiny, monkeypatch):
    model = tiny("wan", layers=LAYERS)
    prediction, found = probed(model, seed=7)
    direction = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(7))
    expected_prediction, expected = by_autograd(model, direction, monkeypatch)
    torch.testing.assert_close(prediction, expected_prediction)
    assert [layer for layer, *_ in found] == [2, 1, 0]
    for layer, gradient, key_mask in found:
        assert key_mask is None
        torch.testing.assert_close(
            gradient, expected[layer], rtol=1e-3, atol=1e-5 * expected[layer].abs().max()
        )


def test_squared_products_foretell_the_change_of_the_prediction(tiny):
    """An error at one token of one head: the mean over directions of (g·δ)² is |Δv|² / |v|²."""
    model = tiny("wan", layers=LAYERS)
    prediction = model.run()
    error = 1e-2 * torch.randn(16, generator=torch.Generator().manual_seed(3))

    def perturbed(layer, batch, token, head):
        def add(module, args):
            changed = args[0].clone()
            changed[batch, token, 16 * head : 16 * head + 16] += error
            return (changed, *args[1:])

        handle = model.transformer.blocks[layer].attn1.to_out[0].register_forward_pre_hook(add)
        try:
            return model.run()
        finally:
            handle.remove()

    places = [(0, 0, 17, 1), (1, 1, 60, 0), (2, 0, 104, 1)]
    actual = [
        ((perturbed(*place) - prediction).norm() / prediction.norm()).square().item() for place in places
    ]
    products = torch.zeros(len(places), 80)
    for seed in range(80):
        _, found = probed(model, seed)
        gradients = {layer: gradient for layer, gradient, _ in found}
        for number, (layer, batch, token, head) in enumerate(places):
            products[number, seed] = gradients[layer][batch, token, head] @ error
    # Of 80 squared normal numbers the mean has a relative standard deviation of sqrt(2 / 80) = .16.
    for estimate, truth in zip(products.square().mean(1).tolist(), actual, strict=True):
        assert estimate == pytest.approx(truth, rel=0.4)


def test_the_pipeline_gets_the_prediction_of_its_own_forward(any_tiny):
    plain = any_tiny.run()
    layers = []

    def receive(state, layer, query, key, value, key_mask, gradient):
        assert key.shape[1] == query.shape[1] == gradient.shape[1]
        assert gradient.isfinite().all()
        layers.append((layer, gradient.abs().max().item()))

    with enabled(any_tiny.transformer) as state:
        probe = Downstream(state, LAYERS, lambda _: True, receive, 0)
        with probe.watching(any_tiny.transformer):
            prediction = any_tiny.run()
    torch.testing.assert_close(prediction, plain)
    assert not prediction.requires_grad
    assert [layer for layer, _ in layers] == sorted((layer for layer, _ in layers), reverse=True)
    assert layers[-1][0] == 0
    assert all(largest > 0 for _, largest in layers)
    assert probe.seconds > 0


def test_forwards_that_are_not_wanted_are_left_alone(tiny):
    model = tiny("wan", layers=LAYERS)
    prediction, found = probed(model, wanted=lambda _: False)
    assert found == []
    assert torch.equal(prediction, model.run())


def test_directions_follow_the_seed(tiny):
    model = tiny("wan", layers=LAYERS)
    first, again, other = (probed(model, seed)[1][0][1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_recomputed_blocks_give_the_same_gradients(tiny, monkeypatch):
    model = tiny("wan", layers=LAYERS)
    _, kept = probed(model)
    monkeypatch.setattr(downstream, "_KEPT_BYTES", 0)
    _, recomputed = probed(model)
    assert not model.transformer.is_gradient_checkpointing
    assert [layer for layer, *_ in recomputed] == [layer for layer, *_ in kept]
    for (_, gradient, _), (_, expected, _) in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_modes_and_parameters_are_left_as_they_were(tiny):
    model = tiny("wan", layers=LAYERS)
    parameters = dict(model.transformer.named_parameters())
    parameters["blocks.0.attn1.to_q.weight"].requires_grad_(True)
    probed(model)
    assert [name for name, p in parameters.items() if p.requires_grad] == ["blocks.0.attn1.to_q.weight"]
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in parameters.values())
    assert not model.transformer._forward_hooks


def test_a_forward_that_fails_leaves_no_gradients_on(tiny):
    model = tiny("wan", layers=LAYERS)
    with enabled(model.transformer) as state:
        probe = Downstream(state, LAYERS, lambda _: True, lambda *_: None, 0)
        with torch.no_grad(), probe.watching(model.transformer):
            with pytest.raises(RuntimeError):
                model.transformer(**model.inputs() | {"encoder_hidden_states": torch.zeros(2, 3, 1)})
            assert not torch.is_grad_enabled()


def test_a_model_without_gradients_is_refused_with_the_remedy(tiny):
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("no derivative of this kernel")

    model = tiny("wan", layers=LAYERS)
    handle = model.transformer.blocks[1].register_forward_hook(
        lambda module, args, output: Opaque.apply(output)
    )
    with pytest.raises(ValueError, match="no derivative of this kernel; use downstream=False"):
        probed(model)
    handle.remove()


def test_inference_mode_is_refused(tiny):
    model = tiny("wan", layers=LAYERS)
    with (
        pytest.raises(ValueError, match="downstream: expected gradients to be allowed"),
        torch.inference_mode(),
    ):
        probed(model)


def test_attention_by_a_plan_has_no_gradients_otherwise(tiny):
    model = tiny("wan", layers=LAYERS)
    inputs = model.inputs()
    inputs["hidden_states"].requires_grad_()
    with enabled(model.transformer):
        output = model.transformer(**inputs, return_dict=False)[0]
        with pytest.raises(RuntimeError, match="has no gradients; disable"):
            output.sum().backward()
