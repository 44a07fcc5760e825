"""How long the swapped attention alone takes, in a short pass of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.evaluation.generate import generate
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.timing import now
from dit_accel.evaluation.variants import Variant, plan_variant
from dit_accel.pipelines import transformers_of
from dit_accel.plan import AccelPlan

# Every swapped attention call runs inside this one op, dense or sparse, selection and reordering included.
ATTENTION_OP = "dit_accel::attention"


class _OpClock(TorchDispatchMode):
    """Adds up the seconds of one op; what the op itself calls runs undisturbed."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        self.name, self.device = name, device
        self.seconds, self.calls = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() != self.name:
            return func(*args, **(kwargs or {}))
        start = now(self.device)
        output = func(*args, **(kwargs or {}))
        self.seconds += now(self.device) - start
        self.calls += 1
        return output


def attention_seconds(
    pipe: Any,
    variant: Variant,
    prompt: str,
    settings: GenerationSettings,
    *,
    seed: int,
    on_step: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """Seconds spent in the swapped attention and in all of the transformers during one generation.

    `variant` is dense or has a plan. Dense attention goes through the same op as a plan's, which calls the
    model's own function. Watching each op costs a little time: use the two as a share and a ratio only.
    """
    measured = variant if variant.plan is not None else plan_variant(AccelPlan.preset("dense"), "dense")
    device = pipe._execution_device
    starts: list[float] = []
    spans: list[float] = []

    def entered(_module: torch.nn.Module, _args: Any) -> None:
        starts.append(now(device))

    def left(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        spans.append(now(device) - starts.pop())

    hooks = [
        hook
        for transformer in transformers_of(pipe)
        for hook in (transformer.register_forward_pre_hook(entered), transformer.register_forward_hook(left))
    ]
    try:
        with measured.apply(pipe), _OpClock(ATTENTION_OP, device) as clock:
            generate(pipe, prompt, settings, seed=seed, on_step=on_step)
    finally:
        for hook in hooks:
            hook.remove()
    if not clock.calls:
        raise RuntimeError(f"variant {variant.name!r}: no call of {ATTENTION_OP} was seen")
    return clock.seconds, sum(spans)
