"""Train the demo model from nothing: first the VAE, then text encoder and transformer on growing canvases.

    python examples/train_demo_model.py --recipe quick --output my_demo   # two cores, three hours
    python examples/train_demo_model.py --recipe cpu --output my_demo     # two cores, ten hours
    python examples/train_demo_model.py --recipe gpu --output my_demo     # one data-centre GPU, 15 minutes

Data is drawn procedurally and never ends; ``--seed`` fixes it. A killed run continues from its last checkpoint. The
result is a directory that ``WanPipeline.from_pretrained`` loads.
"""

import argparse
import copy
import ctypes
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from dit_accel.pipelines.demo.architecture import FLOW_SHIFT, build_pipeline, encode_prompts
from dit_accel.pipelines.demo.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    parse,
    render_owned,
    sample_scene,
)


@dataclass(frozen=True)
class Phase:
    """One stretch of training on one canvas size (pixels), counted in optimizer steps.

    latent_frames: of the transformer's latent frames that a step looks at: the first and others drawn at random,
        each at its own place in time. Textures and motions of long videos are learnt that way at the price of short
        ones. 0 is all: the more frames show what stays in place, the more noise it is seen through, so a model that
        has only known a few frames makes up its mind on what to draw too late in videos of many. Small canvases
        teach that cheaply.
    repeats: noised copies of each video in a step, which share the work of the VAE.
    """

    steps: int
    batch: int
    frames: int
    height: int
    width: int
    actors: int
    learning_rate: float
    latent_frames: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class Recipe:
    vae: tuple[Phase, ...]
    transformer: tuple[Phase, ...]


RECIPES = {
    "quick": Recipe(
        vae=(Phase(600, 3, 5, 64, 64, 1, 4e-3), Phase(60, 2, 17, 64, 64, 1, 6e-4)),
        transformer=(
            Phase(600, 4, 33, 128, 128, 2, 1e-3, latent_frames=2, repeats=4),
            Phase(640, 2, 33, 160, 192, 2, 1e-3, latent_frames=4, repeats=4),
            Phase(60, 1, 33, 160, 192, 2, 6e-4, latent_frames=9, repeats=2),
            Phase(20, 1, 33, 160, 192, 2, 5e-4),
        ),
    ),
    "cpu": Recipe(
        vae=(Phase(1500, 3, 5, 64, 64, 1, 4e-3), Phase(150, 2, 17, 64, 64, 1, 6e-4)),
        transformer=(
            Phase(2500, 4, 33, 128, 128, 2, 1e-3, latent_frames=2, repeats=4),
            Phase(2500, 3, 33, 96, 96, 2, 1e-3, repeats=2),
            Phase(1000, 2, 33, 160, 192, 2, 1e-3, latent_frames=4, repeats=4),
            Phase(200, 1, 33, 160, 192, 2, 8e-4, latent_frames=9, repeats=2),
            Phase(200, 1, 33, 160, 192, 2, 8e-4),
        ),
    ),
    "gpu": Recipe(
        vae=(Phase(4000, 16, 9, 96, 96, 2, 4e-3), Phase(800, 8, 17, 128, 128, 2, 6e-4)),
        transformer=(
            Phase(4000, 64, 9, 128, 128, 1, 1.5e-3),
            Phase(3000, 48, 33, 96, 96, 2, 1.2e-3),
            Phase(2000, 16, 33, 160, 192, 2, 8e-4),
        ),
    ),
    "smoke": Recipe(
        vae=(Phase(2, 1, 5, 32, 32, 1, 1e-3),),
        transformer=(
            Phase(1, 2, 5, 32, 32, 1, 1e-3),
            Phase(1, 1, 9, 32, 32, 1, 1e-3, latent_frames=2, repeats=2),
        ),
    ),
}


class Scenes(IterableDataset):
    """Endless (prompt, video, owner) scenes; sample i is the same in every run.

    video: [3, frames, height, width] in [-1, 1]; owner: whose pixel each is, as :func:`render_owned` gives it.
    """

    def __init__(self, phase: Phase, seed: int, first: int):
        self.phase, self.seed, self.first = phase, seed, first

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number = self.first + (worker.id if worker else 0)
        while True:
            seed = self.seed * 1_000_003 + number
            scene = sample_scene(random.Random(seed), self.phase.actors)
            video, owner = render_owned(
                scene, frames=self.phase.frames, height=self.phase.height, width=self.phase.width, seed=seed
            )
            yield scene.prompt, video.permute(3, 0, 1, 2) * 2 - 1, owner
            number += worker.num_workers if worker else 1


MUON_SCALE = 3.0  # Muon's learning rate over AdamW's


class MatrixMuon(torch.optim.Muon):
    """Muon over weights of any rank: each is seen as a matrix [out, in · taps] that shares its storage."""

    def __init__(self, weights: list[nn.Parameter], learning_rate: float):
        self.weights = weights
        matrices = [nn.Parameter(w.data.flatten(1)) for w in weights]
        super().__init__(
            matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4
        )

    def step(self, closure: Callable | None = None) -> None:
        for weight, matrix in zip(self.weights, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None


def optimizers(modules: list[nn.Module], learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for convolutions and the blocks' matrices, AdamW for everything else."""
    weights, others = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            filters = parameter.ndim >= 4 and parameter[0].numel() > 1
            matrix = parameter.ndim == 2 and "block" in name and "attention_bias" not in name
            (weights if filters or matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.97), weight_decay=0.01)
    return [adam, MatrixMuon(weights, learning_rate)]


class Average:
    """Exponential moving average of weights; early steps weigh less, so it is useful from the start."""

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(0.99, (1 + self.steps) / (10 + self.steps))
        for average, current in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(current, 1 - decay)


def train(
    name: str,
    phases: tuple[Phase, ...],
    modules: list[nn.Module],
    loss_of: Callable,
    args: argparse.Namespace,
) -> list[nn.Module]:
    """Run all phases, checkpointing every two minutes; returns the averaged modules."""
    checkpoint = args.output / f"{name}.pt"
    optimizer_list = optimizers(modules, phases[0].learning_rate)
    averages = [Average(m) for m in modules]
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        if saved["phases"] != repr(phases):
            raise SystemExit(
                f"{checkpoint}: expected a checkpoint of this recipe, got one of another; delete it"
            )
        done = saved["done"]
        for part, key in (
            (modules, "modules"),
            (optimizer_list, "optimizers"),
            ([a.module for a in averages], "averages"),
        ):
            for item, state in zip(part, saved[key], strict=True):
                item.load_state_dict(state)
        for average in averages:
            average.steps = done

    def save() -> None:
        state = {
            "done": done,
            "phases": repr(phases),
            "modules": [m.state_dict() for m in modules],
            "optimizers": [o.state_dict() for o in optimizer_list],
            "averages": [a.module.state_dict() for a in averages],
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)

    total = sum(p.steps for p in phases)
    bar = tqdm(total=total, initial=done, desc=name, mininterval=5)
    start, last_save, smooth = 0, time.monotonic(), None
    for phase in phases:
        if done < start + phase.steps:
            torch._dynamo.reset()
            data = Scenes(phase, args.seed + 1 + start, first=(done - start) * phase.batch)
            batches = iter(DataLoader(data, batch_size=phase.batch, num_workers=args.workers))
            for step in range(done - start, phase.steps):
                warm_up = min(1.0, (step + 1) / min(50.0, 0.1 * phase.steps))
                ramp_down = min(1.0, (total - done) / (0.1 * total))
                for optimizer in optimizer_list:
                    scale = MUON_SCALE if isinstance(optimizer, MatrixMuon) else 1.0
                    for group in optimizer.param_groups:
                        group["lr"] = scale * phase.learning_rate * warm_up * max(0.1, ramp_down)
                prompts, video, owner = next(batches)
                torch.manual_seed(args.seed * 1_000_003 + done)
                with torch.autocast(args.device, torch.bfloat16):
                    loss = loss_of(list(prompts), video.to(args.device), owner.to(args.device), phase)
                loss.backward()
                nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 1.0)
                for optimizer in optimizer_list:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                for average, module in zip(averages, modules, strict=True):
                    average.update(module)
                done += 1
                smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
                bar.update()
                bar.set_postfix(loss=f"{smooth:.4f}", canvas=f"{phase.frames}x{phase.height}x{phase.width}")
                if time.monotonic() - last_save > 120:
                    save()
                    last_save = time.monotonic()
        start += phase.steps
    bar.close()
    save()
    return [a.module for a in averages]


def vae_loss(pipe: WanPipeline) -> Callable:
    """Squared error; noise of 2 % on the latents stands for the sampling of a variational posterior."""

    def loss_of(_: list[str], video: Tensor, __: Tensor, phase: Phase) -> Tensor:
        latents = pipe.vae.encode(video).latent_dist.mode()
        latents = latents + 0.02 * latents.detach().std() * torch.randn_like(latents)
        return F.mse_loss(pipe.vae.decode(latents).sample.float(), video)

    return loss_of


@torch.no_grad()
def measure_latents(pipe: WanPipeline, args: argparse.Namespace) -> None:
    """Write the latents' mean and deviation per channel into the VAE's config, where WanPipeline reads them."""
    phase = Phase(1, 1, 17, 128, 128, 2, 0.0)
    data = iter(Scenes(phase, args.seed, first=0))
    latents = torch.cat(
        [pipe.vae.encode(next(data)[1][None].to(args.device)).latent_dist.mode() for _ in range(16)]
    )
    channels = latents.float().transpose(0, 1).flatten(1)
    pipe.vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())


class FrameRope(nn.Module):
    """The transformer's rotary embedding for some of a video's latent frames; all of them where `kept` is None."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope
        self.kept: Tensor | None = None
        self.frames = 0

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept is None:
            return self.rope(latents)
        batch, channels, _, height, width = latents.shape
        whole = latents.new_empty(1).expand(batch, channels, self.frames, height, width)
        cos, sin = (x.unflatten(1, (self.frames, -1))[:, self.kept].flatten(1, 2) for x in self.rope(whole))
        return cos, sin


def multiscale_loss(error: Tensor) -> Tensor:
    """Mean square of `error` [batch, channels, frames, height, width] and of its means over 2 × 2 and 4 × 4 places.

    The minimum stays where it was, but errors of layout, alike over a region, weigh up to 4 times those of texture,
    which drown them otherwise (after the multiscale loss of simple diffusion, arXiv 2301.11093, section 3.4).
    """
    loss = error.square().mean()
    for scale in (2, 4):
        loss = loss + scale * F.avg_pool3d(error, (1, scale, scale)).square().mean()
    return loss


class Reader(nn.Module):
    """Reads off a block's output what each token shows: background, and its owner's shape, colour and direction.

    Its loss teaches the blocks before it where the prompt's words belong, long before the velocity's error does (after
    REPA, arXiv 2410.06940, with the drawing itself in place of another network's features). Training alone uses it.
    """

    KINDS = (len(BACKGROUNDS), 1 + len(SHAPES), 1 + len(COLOURS), 1 + len(DIRECTIONS))
    WEIGHT = 0.2

    def __init__(self, block: nn.Module, channels: int):
        super().__init__()
        self.to_kinds = nn.Linear(channels, sum(self.KINDS))
        self.hidden: Tensor | None = None
        block.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: object, hidden: Tensor) -> None:
        self.hidden = hidden

    def loss(self, labels: Tensor) -> Tensor:
        """Cross-entropy, summed over the kinds, of the last forward; labels [batch, tokens, 4] int64."""
        logits = self.to_kinds(self.hidden).float().split(self.KINDS, dim=-1)
        return sum(
            F.cross_entropy(kind.flatten(0, 1), label.flatten())
            for kind, label in zip(logits, labels.unbind(-1), strict=True)
        )


def token_labels(prompts: list[str], owner: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """What the pixel at the middle of each token shows: int64 [batch, frames, height, width, 4], see :class:`Reader`.

    stride: frames, rows and columns of pixels per token; the first frame is a token's alone, as the VAE makes it.
    """
    time, down, right = stride
    owner = owner[:, ::time, down // 2 :: down, right // 2 :: right]
    labels = owner.new_zeros(*owner.shape, 4)
    words = [list(table) for table in (SHAPES, COLOURS, DIRECTIONS)]
    for label, place, prompt in zip(labels, owner, prompts, strict=True):
        scene = parse(prompt)
        label[..., 0] = BACKGROUNDS.index(scene.background)
        for number, actor in enumerate(scene.actors, 1):
            said = (actor.shape, actor.colour, actor.direction)
            label[place == number, 1:] = owner.new_tensor(
                [1 + table.index(word) for table, word in zip(words, said, strict=True)]
            )
    return labels


def flow_loss(pipe: WanPipeline, reader: Reader, args: argparse.Namespace) -> Callable:
    """Rectified-flow velocity loss and the reader's, with one prompt in ten dropped for classifier-free guidance."""
    rope = pipe.transformer.rope
    mean = torch.tensor(pipe.vae.config.latents_mean, device=args.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std, device=args.device).view(1, -1, 1, 1, 1)

    space = pipe.vae_scale_factor_spatial
    stride = tuple(
        n * s
        for n, s in zip(
            (pipe.vae_scale_factor_temporal, space, space), pipe.transformer.config.patch_size, strict=True
        )
    )

    def loss_of(prompts: list[str], video: Tensor, owner: Tensor, phase: Phase) -> Tensor:
        with torch.no_grad():
            clean = (pipe.vae.encode(video).latent_dist.mode().float() - mean) / std
        clean = clean.repeat_interleave(phase.repeats, 0)
        labels = token_labels(prompts, owner, stride).repeat_interleave(phase.repeats, 0)
        prompts = [prompt for prompt in prompts for _ in range(phase.repeats)]
        rope.kept = None
        if 0 < phase.latent_frames < clean.shape[2]:
            others = 1 + torch.randperm(clean.shape[2] - 1)[: phase.latent_frames - 1].sort().values
            rope.kept, rope.frames = torch.cat([torch.zeros(1, dtype=torch.int64), others]), clean.shape[2]
            clean, labels = clean[:, :, rope.kept], labels[:, rope.kept]
        # stratified over the batch, then shifted towards noise as the sampler's schedule is
        uniform = (torch.arange(len(prompts)) + torch.rand(len(prompts))) / len(prompts)
        sigma = (FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)).to(args.device)
        noise = torch.randn(clean.shape).to(args.device)
        mix = sigma.view(-1, 1, 1, 1, 1)
        kept = [p if keep else "" for p, keep in zip(prompts, torch.rand(len(prompts)) > 0.1, strict=True)]
        velocity = pipe.transformer(
            (1 - mix) * clean + mix * noise, sigma * 1000, encode_prompts(pipe, kept), return_dict=False
        )[0]
        reading = reader.loss(labels.flatten(1, 3))
        return multiscale_loss(velocity.float() - (noise - clean)) + Reader.WEIGHT * reading

    return loss_of


def plain_attention() -> None:
    """Attention without a fused kernel: on CPUs, in half precision, forward and backward take .6 of its time.

    Measured with 4 heads of 64 on 1,836 to 8,160 tokens (2 cores with AVX512-bf16). Its weights are kept for the
    backward pass, .5 GB per block and video of 8,160 tokens.
    """
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep what is freed: on CPUs, fetching it anew from the kernel is half of every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, default="cpu", help="how long to train, and on what canvases"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for checkpoints and the finished model/"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--start", type=Path, help="a finished model/ to train further: it keeps its VAE and skips that part"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks: a third faster, on CPUs it needs a C++ compiler",
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        keep_freed_memory()
        plain_attention()
    torch.manual_seed(args.seed)
    recipe = RECIPES[args.recipe]
    if args.start is None:
        pipe = build_pipeline().to(args.device)
        (pipe.vae,) = train("vae", recipe.vae, [pipe.vae], vae_loss(pipe), args)
        measure_latents(pipe, args)
    else:
        pipe = WanPipeline.from_pretrained(args.start, dtype=torch.float32).to(args.device)
        pipe.scheduler = build_pipeline().scheduler
    torch.manual_seed(args.seed)  # the VAE, trained or not, has moved on
    blocks = pipe.transformer.blocks
    reader = Reader(
        blocks[len(blocks) // 2],
        pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim,
    )
    if args.compile:
        pipe.transformer.compile_repeated_blocks(dynamic=False)
    pipe.transformer.rope = FrameRope(pipe.transformer.rope)
    modules = [pipe.transformer, pipe.text_encoder, reader.to(args.device)]
    pipe.transformer, pipe.text_encoder, _ = train(
        "transformer", recipe.transformer, modules, flow_loss(pipe, reader, args), args
    )
    pipe.transformer.rope = pipe.transformer.rope.rope
    pipe.to(torch.bfloat16).save_pretrained(args.output / "model")
    print(f"model saved to {args.output / 'model'}")


if __name__ == "__main__":
    main()
