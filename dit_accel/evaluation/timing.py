"""Clocks, the machine's description and the name of the attention that dense runs use."""

import hashlib
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, read after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_name() -> str:
    """The CPU's marketing name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Installed version of a package, None where it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str | int | None]:
    """What a timing depends on: processor, cores, library versions and dtype."""
    # Containers often own fewer cores than the host has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "platform": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "diffusers": package_version("diffusers"),
        "dit_accel": package_version("dit-accel"),
    }


def pipeline_digest(pipe: Any) -> str:
    """Tells a pipeline with a retrained, adapted or exchanged model, another scheduler or numbers of its own (of
    Wan 2.2 where the second expert begins) from the one before."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            digest.update(f"{name} {_weights_digest(part)}".encode())
            if getattr(part, "use_tiling", False):  # of a VAE, whose seams show in the frames
                tiles = {key: value for key, value in vars(part).items() if key.startswith("tile_")}
                digest.update(json.dumps(tiles, sort_keys=True, default=str).encode())
        elif hasattr(part, "set_timesteps"):
            config = {key: value for key, value in part.config.items() if not key.startswith("_")}
            text = json.dumps(config, sort_keys=True, default=str)
            digest.update(f"{name} {type(part).__name__} {text}".encode())
    numbers = {key: value for key, value in dict(pipe.config).items() if isinstance(value, int | float)}
    digest.update(json.dumps(numbers, sort_keys=True).encode())
    return digest.hexdigest()


def _weights_digest(model: torch.nn.Module) -> str:
    """By a few values of each parameter, and what its adapters are set to."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):  # a layer of peft
            active = getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)
            digest.update(f"{name} {sorted(scaling.items())} {active}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        # Quantised parameters are tensor subclasses, which need not support indexing.
        if type(parameter) is torch.nn.Parameter and not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:8].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def dense_backend(transformer: torch.nn.Module) -> str:
    """Name of the attention that the transformer's dense calls run on, e.g. "SDPA (CPU flash)".

    diffusers' choice (`set_attention_backend`, or its active default) comes first; its native backend is
    torch's SDPA, which picks one of its own kernels by device and dtype.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    processors = getattr(transformer, "attn_processors", {}).values()
    chosen = {getattr(processor, "_attention_backend", None) for processor in processors} or {None}
    active = _AttentionBackendRegistry.get_active_backend()[0]
    names = sorted(str(getattr(backend or active, "value", backend or active)) for backend in chosen)
    return ", ".join(_sdpa_name(transformer) if name == "native" else f"diffusers {name}" for name in names)


def _sdpa_name(transformer: torch.nn.Module) -> str:
    parameter = next(transformer.parameters())
    probe = torch.empty(1, 1, 128, 64, device=parameter.device, dtype=parameter.dtype)
    kernel = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(probe, probe, probe))
    kernel_name = kernel.name.lower().removesuffix("_attention").replace("_", " ")
    return f"SDPA ({'CPU' if parameter.device.type == 'cpu' else parameter.device.type} {kernel_name})"
