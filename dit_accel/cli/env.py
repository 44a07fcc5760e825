"""`dit-accel env`: versions, device, and what attention would run on."""

import argparse
from typing import Any

from dit_accel.cli.options import add_device, add_output

PACKAGES = ("dit-accel", "torch", "triton", "diffusers", "transformers", "safetensors", "torchmetrics")


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("env", help="versions, device, and what attention would run on")
    add_device(parser)
    add_output(parser, None)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Collect the facts a bug report needs."""
    import torch

    from dit_accel.evaluation.files import write_json
    from dit_accel.evaluation.models import DTYPES, resolve_device
    from dit_accel.evaluation.timing import machine, package_version
    from dit_accel.kernels import available_precisions, resolve_backend

    capabilities = torch.cpu.get_capabilities()
    device, dtype = resolve_device(args.device), DTYPES[args.dtype]
    facts: dict[str, Any] = machine(device, dtype)
    data: dict[str, Any] = {
        "versions": {name: package_version(name) for name in PACKAGES} | {"python": facts["python"]},
        "machine": {
            key: facts[key] for key in ("cpu", "cores", "threads", "gpu", "device", "dtype", "platform")
        },
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(capabilities.get("amx_tile")),
        "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "attention_backend": resolve_backend(device, dtype),
        "attention_precisions": list(available_precisions(device, dtype)),
    }
    if args.output is not None:
        write_json(args.output / "env.json", data)
    lines = [
        *(f"{name:<18} {version or 'not installed'}" for name, version in data["versions"].items()),
        "",
        f"{'cpu':<18} {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads",
        f"{'cpu instructions':<18} {data['cpu_capability']}, AMX {_yes(data['amx'])}, "
        f"AVX512-bf16 {_yes(data['avx512_bf16'])}",
        f"{'gpu':<18} {facts['gpu'] or 'none in use'}",
        f"{'device, dtype':<18} {facts['device']}, {facts['dtype']}",
        f"{'sparse attention':<18} {data['attention_backend']}, {', '.join(data['attention_precisions'])}",
    ]
    return data, "\n".join(lines)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
