"""Measure whether the demo model's attention is worth sparsifying.

    python benchmarks/demo_card.py --prompts 2

Writes ``benchmarks/results/demo_card.json``: per (layer, head) the softmax mass that the best 25 % and 10 % of
64-token key blocks of each 64-token query block hold, averaged over steps, guidance branches and sampled rows: in the
order of the grid that suits the head best, and in the blocks that ``balanced`` finds in each call. Whether the model
follows prompts is measured by ``dit-accel evaluate``.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import dit_accel
from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.timing import machine
from dit_accel.grid import AXIS_ORDERS
from dit_accel.kernels.partition import partition
from dit_accel.pipelines import demo, load_demo
from dit_accel.plan import AccelPlan
from dit_accel.switch import states

BLOCK = 64
# The six axis orders, cubes, and tiles that are long in time, in space, or along a row.
ORDERS = (*AXIS_ORDERS, "tile:4x4x4", "tile:9x4x2", "tile:17x2x2", "tile:2x4x8", "tile:1x8x8")
BALANCED = "balanced"
SHARES = (0.25, 0.10)
SIZES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps"}


def held_mass(query: Tensor, key: Tensor, orders: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Mean softmax mass [heads, shares] of the best key blocks, over some 64-row query blocks of an order.

    query, key: [batch, seq, heads, dim]; orders: of queries and of keys, [seq] or [batch, heads, seq]; rows: numbers of
    query blocks.
    """
    tokens = (x.transpose(1, 2).float() for x in (query, key))
    q, k = (
        x.gather(2, order.expand(x.shape[:3])[..., None].expand_as(x))
        for x, order in zip(tokens, orders, strict=True)
    )
    columns = -(-k.shape[2] // BLOCK)
    held = torch.zeros(q.shape[1], len(SHARES))
    for row in rows.tolist():
        scores = q[:, :, row * BLOCK : (row + 1) * BLOCK] @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        weights = torch.nn.functional.pad(scores.softmax(-1), (0, columns * BLOCK - k.shape[2]))
        by_block = weights.unflatten(-1, (columns, BLOCK)).sum(-1).mean((0, 2))  # [heads, columns]
        ranked = by_block.sort(descending=True).values.cumsum(-1)
        held += torch.stack([ranked[:, max(1, round(share * columns)) - 1] for share in SHARES], dim=1)
    return held / len(rows)


def sparsity(pipe: object, prompts: list[str], settings: dict, seed: int) -> dict:
    """Mass held by the best blocks, per head and in the mean over heads."""
    held: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    calls: dict[int, int] = defaultdict(int)
    dit_accel.enable(pipe, AccelPlan.preset("dense"))
    (state,) = states(pipe)

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
        number = calls[layer]
        calls[layer] += 1
        if number % 8 > 1:  # both guidance branches of every fourth step
            return
        grid = state.grid
        if grid is None:
            raise RuntimeError("the token grid is unknown; set capture before generating")
        blocks = -(-grid.total_tokens // BLOCK)
        rows = (torch.arange(6) * blocks // 6 + number * 7) % blocks
        for name in ORDERS:
            held[layer, name].append(held_mass(query, key, (grid.order(name),) * 2, rows))
        held[layer, BALANCED].append(held_mass(query, key, partition(query, key, block=BLOCK), rows))

    state.capture = look
    for number, prompt in enumerate(tqdm(prompts, desc="sparsity")):
        pipe(prompt, generator=torch.Generator().manual_seed(seed + number), output_type="latent", **settings)
    dit_accel.disable(pipe)
    heads = []
    for layer in sorted(calls):
        mean = {name: torch.stack(held[layer, name]).mean(0) for name in (*ORDERS, BALANCED)}
        for head in range(mean[BALANCED].shape[0]):
            best = max(ORDERS, key=lambda name: float(mean[name][head, 0]))
            of_head: dict[str, object] = {"layer": layer, "head": head, "order": best}
            for ending, name in (("", best), ("_balanced", BALANCED)):
                quarter, tenth = mean[name][head].tolist()
                of_head |= {f"mass_25{ending}": quarter, f"mass_10{ending}": tenth}
            heads.append(of_head)
    names = [f"mass_{share}{ending}" for ending in ("", "_balanced") for share in (25, 10)]
    means = {f"{name}_mean": sum(head[name] for head in heads) / len(heads) for name in names}
    return {"block": BLOCK, "prompts": len(prompts), **means, "heads": heads}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    for option, name in SIZES.items():
        parser.add_argument(f"--{option}", type=int, default=demo.DEFAULTS[name])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo_card.json"))
    args = parser.parse_args()
    settings = {**demo.DEFAULTS, **{name: getattr(args, option) for option, name in SIZES.items()}}
    pipe = load_demo(torch.bfloat16, args.device)
    pipe.set_progress_bar_config(disable=True)
    card = {
        "machine": machine(pipe.device, torch.bfloat16),
        "settings": settings,
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        **sparsity(pipe, demo.PROMPTS["held_out"][: args.prompts], settings, args.seed),
    }
    write_json(args.output, card)
    print("\n".join(f"{name} {value:.3f}" for name, value in card.items() if name.startswith("mass")))


if __name__ == "__main__":
    main()
