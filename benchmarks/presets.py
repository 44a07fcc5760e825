"""Compare all published systems on the demo model at equal density, on single heads and in whole generations.

    python benchmarks/presets.py                                # everything, hours on two CPU cores
    python benchmarks/presets.py --stage heads --only svg2,sta  # one part, some systems

- ``heads``: recall and rel L2 of every head at several densities, over query blocks sampled from the calls of
  dense generations, and the multiply-adds and bytes of a selection.
- ``generations``: whole generations at one density, with and without the remainder, against dense ones.
- ``picture``: ``masks.png`` beside the output, the mask of every family on one head.

Every system of ``dit_accel.presets``, and our family ``balanced``, runs on the same work: its family, options and
block, but at the density asked for, which takes the place of ``top_p``; no step is left dense; ``reuse``, which authors
count in 50 steps, is scaled to the steps of the run. A family that has one density only keeps it. The heads are
measured with a choice made on the spot, without reuse.

With ``--calibration`` a plan of ours at the same density stands among the generations: chosen anew, by least error,
from what that calibration measured.

Each finished measurement is a file in ``--work``, in a folder named after model, settings and machine. Started again,
the command goes on where it was. The output is made anew from these files after each of them, whatever ``--only``
names, and says how many there are.
"""

import argparse
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dit_accel
from dit_accel import attention
from dit_accel.bench.demo_work import DemoWork, add_arguments, demo_work
from dit_accel.calibration import calibrate
from dit_accel.calibration.profile import profile_call
from dit_accel.candidate import Candidate
from dit_accel.evaluation.files import slug, write_json
from dit_accel.evaluation.generate import dense_attention, generate_variant, quiet
from dit_accel.evaluation.mask_figure import attention_panel, family_panel, save_masks
from dit_accel.evaluation.metrics import psnr, ssim
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.store import GenerationStore
from dit_accel.evaluation.timing import dense_backend, now
from dit_accel.evaluation.variants import DENSE, Variant, plan_variant
from dit_accel.grid import TokenGrid
from dit_accel.patterns import FAMILIES, cost, select
from dit_accel.pipelines import demo
from dit_accel.plan import AccelPlan
from dit_accel.presets import PRESETS, Preset
from dit_accel.switch import states

# What the tables compare: the published systems, and the family that is ours.
SYSTEMS = {**PRESETS, "balanced": Preset("balanced", 0.25)}

FORMAT_VERSION = 1
PUBLISHED_STEPS = 50
# A dense generation is timed before this many others: near enough to share the machine's mood, rare enough to pay.
DENSE_EVERY = 11
ATTENTION_STEPS = 3
PICTURE_STEPS = 4
STAGES = ("heads", "generations", "picture")
_GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly
COSTS = ("multiply_adds_first", "multiply_adds_later", "bytes_first", "bytes_later")
SUMS = ("mass", "rows", "norm", "error", "error_remainder")

# use(step, layer, query, key, value, grid) of a dense generation; tensors [batch, seq, heads, dim].
Use = Callable[[int, int, Tensor, Tensor, Tensor, TokenGrid], None]


@dataclass(frozen=True)
class Setting:
    """A system at one density: how its heads run, and its tokens per block."""

    candidate: Candidate
    block: int

    def with_and_without(self) -> list[Candidate]:
        """The candidate as published and with the means of what it leaves out, if it leaves anything out."""
        leaves_out = FAMILIES[self.candidate.family].density != 1.0
        return [self.candidate, self.candidate.with_means()] if leaves_out else [self.candidate]

    @property
    def label(self) -> str:
        return self.candidate.label

    @property
    def name(self) -> str:
        """Tells apart all that can give other results; systems that become equal share their measurements."""
        return f"{self.candidate.label} density={self.candidate.density!r} block={self.block}"

    def costs(self, query: Tensor, grid: TokenGrid) -> dict[str, int]:
        """What the first choice of a generation and a later one cost for all heads of `[batch, seq, heads, dim]`."""
        c = self.candidate
        batch, _, heads, dim = query.shape
        options: dict[str, Any] = dict(c.options)
        first, later = (
            cost(
                c.family, grid, heads, dim, self.block,
                density=c.density, batch=batch, item_bytes=query.element_size(), later=late, **options,
            )
            for late in (False, True)
        )  # fmt: skip
        counts = (first.multiply_adds, later.multiply_adds, first.bytes, later.bytes)
        return dict(zip(COSTS, counts, strict=True))

    def variant(self) -> Variant:
        """The setting for all heads, layers and steps of a pipeline."""
        c = self.candidate
        options: dict[str, Any] = dict(c.options)
        plan = AccelPlan.preset(
            c.family, density=c.density, block=self.block, remainder=c.remainder, **options
        )
        return plan_variant(plan, self.name)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A plan of ours at one density, which a guard would move."""

    plan: AccelPlan
    label: str = "calibrated"

    @property
    def name(self) -> str:
        """Tells plans apart."""
        identity = plan_variant(self.plan, "", guard=False).identity
        return f"{self.label} {hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def variant(self) -> Variant:
        return plan_variant(self.plan, self.name, guard=False)


# What a generation may run with.
Way = Setting | Calibrated


def calibrated(
    pipe: Any, directory: Path, density: float, folder: Path, prompts: Sequence[str], seeds: range
) -> Calibrated:
    """The plan of least error at a density, from what a calibration of the same pipeline measured.

    Raises:
        ValueError: the directory holds no calibration, one of another model or machine, or one that has seen a held-out
            prompt or its noise.
    """
    measured = directory / "calibration"
    if not (measured / "fingerprint.json").is_file():
        raise ValueError(f"calibration: expected a directory written by calibrate, got {directory}")
    conditions = json.loads((measured / "fingerprint.json").read_text(encoding="utf-8"))
    first = conditions["seed"]
    if first < seeds.stop and seeds.start < first + len(conditions["prompts"]):
        raise ValueError(
            f"calibration: expected seeds other than those of the held-out prompts, {seeds.start} to {seeds.stop - 1}, "
            f"got {first}; calibrate with --seed {seeds.stop + 1000}, or give another --seed here"
        )
    if seen := sorted(set(conditions["prompts"]) & set(prompts)):
        raise ValueError(
            f"calibration: expected prompts other than the held-out ones, got {seen[0]!r}; calibrate on others"
        )
    folder /= hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]
    shutil.copytree(measured, folder / "calibration", dirs_exist_ok=True)
    arguments = {name: conditions[name] for name in GenerationSettings.__dataclass_fields__}
    arguments |= {name: conditions[name] for name in ("seed", "downstream", "held_out_prompts")}
    arguments["candidates"] = AccelPlan.from_pretrained(directory).candidates
    plan = calibrate(pipe, conditions["prompts"], density=density, output_dir=folder, **arguments)
    return Calibrated(plan)


def at_density(preset: Preset, density: float, steps: int) -> Setting:
    """A system at a density, for generations of so many steps."""
    options = {name: value for name, value in preset.options.items() if name != "top_p"}
    if "reuse" in options:
        options["reuse"] = max(1, round(int(options["reuse"]) * steps / PUBLISHED_STEPS))
    only = FAMILIES[preset.family].density
    density = density if only is None else only
    candidate = Candidate(preset.family, density, tuple(sorted(options.items())))
    return Setting(candidate, preset.block)


def parse_names(text: str | None) -> list[str]:
    """The systems of a comma-separated list, all where there is none.

    Raises:
        ValueError: a name is unknown or occurs twice, or there is none in the list.
    """
    if text is None:
        return sorted(SYSTEMS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown or not names:
        got = ", ".join(unknown) or "none"
        raise ValueError(f"only: expected names of presets, got {got}; known: {', '.join(sorted(SYSTEMS))}")
    if len(set(names)) != len(names):
        raise ValueError(f"only: expected each name once, got {text!r}; leave the second one out")
    return names


def parse_densities(text: str) -> list[float]:
    """The densities of a comma-separated list.

    Raises:
        ValueError: one is no number above 0 and up to 1, or there is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        densities = [float(part) for part in parts]
    except ValueError:
        densities = []
    if not densities or not all(0.0 < density <= 1.0 for density in densities):
        raise ValueError(
            f"density: expected numbers above 0 and up to 1, got {text!r}; give for instance 0.25"
        )
    return densities


class Work:
    """What one model, at some settings, on one machine was measured on so far: small JSON files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dense = GenerationStore(folder / "dense")

    def _path(self, kind: str, name: str, prompt: int) -> Path:
        return self.folder / kind / f"{prompt:03d}-{slug(name)}.json"

    def get(self, kind: str, name: str, prompt: int = 0) -> dict[str, Any] | None:
        """A finished measurement, None if it is still to be made.

        Raises:
            ValueError: its file cannot be read.
        """
        path = self._path(kind, name, prompt)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: expected a measurement, got broken JSON ({error}); delete it"
            ) from error

    def put(self, kind: str, name: str, found: dict[str, Any], prompt: int = 0) -> None:
        """Keep a finished measurement."""
        write_json(self._path(kind, name, prompt), found)


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench(DemoWork):
    """What to measure, and where the result goes."""

    output: Path
    densities: list[float]
    density: float
    levels: int
    query_blocks: int
    plan: Calibrated | None = None

    @functools.cached_property
    def work(self) -> Work:
        """What is measured so far."""
        return Work(self.folder)

    @property
    def steps(self) -> int:
        return self.settings.num_inference_steps

    @property
    def captured_steps(self) -> list[int]:
        """Numbers of the steps whose heads are measured, spread evenly over the generation."""
        return sorted({(2 * n + 1) * self.steps // (2 * self.levels) for n in range(self.levels)})

    def runs(self, kind: str, name: str) -> list[dict[str, Any]]:
        """What is finished of a measurement, prompt by prompt."""
        found = [self.work.get(kind, name, prompt) for prompt in range(len(self.prompts))]
        return [measured for measured in found if measured is not None]

    def heads_name(self, setting: Setting) -> str:
        """Of a setting's measurement on heads, which also depends on what was sampled."""
        return f"{setting.name} steps={self.captured_steps} query_blocks={self.query_blocks}"


@contextmanager
def clocked(module: ModuleType, name: str, device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds of every call of a function that its module makes; a GPU is waited for before and after."""
    original, taken = getattr(module, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now(device)
        result = original(*args, **kwargs)
        taken.append(now(device) - start)
        return result

    setattr(module, name, timed)
    try:
        yield taken
    finally:
        setattr(module, name, original)


def watch(bench: Bench, prompt: int, settings: GenerationSettings, use: Use) -> None:
    """Run a dense generation and show every attention call of it to `use`."""
    pipe = bench.pipe
    dit_accel.enable(pipe, AccelPlan.preset("dense"))
    (state,) = states(pipe)
    levels: list[float] = []

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
        if state.grid is None:
            raise RuntimeError("the token grid is unknown; set capture before generating")
        if not levels or levels[-1] != state.progress:
            levels.append(state.progress)
        use(len(levels) - 1, layer, query, key, value, state.grid)

    state.capture = look
    try:
        with quiet(pipe):
            pipe(
                bench.prompts[prompt],
                generator=torch.Generator().manual_seed(bench.seed + prompt),
                output_type="latent",
                **settings.to_dict(),
            )
    finally:
        dit_accel.disable(pipe)


def measure_heads(bench: Bench, names: Sequence[str]) -> None:
    """Profile what is missing of each prompt; one dense generation per prompt serves all systems."""
    settings = {
        setting.name: setting
        for name in names
        for density in bench.densities
        for setting in [at_density(SYSTEMS[name], density, bench.steps)]
    }
    missing = {
        prompt: [s for s in settings.values() if bench.work.get("heads", bench.heads_name(s), prompt) is None]
        for prompt in range(len(bench.prompts))
    }
    if not any(missing.values()):
        return
    branches = 2 if bench.settings.guidance_scale > 1 else 1
    calls = len(bench.captured_steps) * len(bench.pipe.transformer.blocks) * branches
    with tqdm(
        total=calls * sum(len(rest) for rest in missing.values()), unit="choice", smoothing=0.05
    ) as bar:
        for prompt, rest in missing.items():
            if rest:
                bar.set_description(f"heads, prompt {prompt + 1} of {len(bench.prompts)}")
                for setting, found in _profile(bench, prompt, rest, bar.update).items():
                    bench.work.put("heads", bench.heads_name(setting), found, prompt)
                write_report(bench)


def _profile(
    bench: Bench, prompt: int, settings: Sequence[Setting], done: Callable[[], object]
) -> dict[Setting, dict[str, Any]]:
    """Sums `[layers, heads]` over the captured calls of one prompt, by setting."""
    shape = (len(bench.pipe.transformer.blocks), bench.pipe.transformer.config.num_attention_heads)
    sums = {s: {name: torch.zeros(shape, dtype=torch.float64) for name in SUMS} for s in settings}
    kept: dict[Setting, list[float]] = {s: [] for s in settings}
    costs: dict[Setting, dict[str, int]] = {}
    calls = 0

    def use(step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid) -> None:
        nonlocal calls
        if step not in bench.captured_steps:
            return
        calls += 1
        for s in settings:
            found = profile_call(
                query, key, value, grid, s.with_and_without(),
                block=s.block, query_blocks=bench.query_blocks, phase=calls * _GOLDEN % 1.0,
            )  # fmt: skip
            of = sums[s]
            of["mass"][layer] += found.mass[:, 0]
            of["rows"][layer] += found.rows[:, 0]
            of["norm"][layer] += found.norm[:, 0]
            of["error"][layer] += found.error[:, 0]
            of["error_remainder"][layer] += found.error[:, -1]
            kept[s].append(float(found.density[0]))
            costs[s] = s.costs(query, grid)
            done()

    watch(bench, prompt, bench.settings, use)
    return {
        s: {
            **{name: table.tolist() for name, table in found.items()},
            "density": fmean(kept[s]),
            **costs[s],
        }
        for s, found in sums.items()
    }


def heads_report(bench: Bench) -> dict[str, Any]:
    """Rows of all systems and densities that were measured on at least one prompt."""
    rows, done, total = [], 0, 0
    for name, preset in sorted(SYSTEMS.items()):
        for density in bench.densities:
            setting = at_density(preset, density, bench.steps)
            records = bench.runs("heads", bench.heads_name(setting))
            done, total = done + len(records), total + len(bench.prompts)
            if records:
                rows.append({"preset": name, "asked": density, **_described(setting), **_heads_row(records)})
    return {
        "done": done,
        "of": total,
        "steps": bench.captured_steps,
        "query_blocks_per_call": bench.query_blocks,
        "rows": rows,
    }


def _described(setting: Setting) -> dict[str, Any]:
    c = setting.candidate
    return {"family": c.family, "options": dict(c.options), "block": setting.block}


def _heads_row(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall and rel L2 per head over all prompts, then their mean and worst over heads."""

    def total(name: str) -> Tensor:
        return torch.tensor([record[name] for record in records], dtype=torch.float64).sum(0)

    recall = total("mass") / total("rows")
    rel_l2, rel_l2_remainder = ((total(name) / total("norm")).sqrt() for name in ("error", "error_remainder"))
    return {
        "prompts": len(records),
        "density": fmean(record["density"] for record in records),
        "recall": float(recall.mean()),
        "recall_min": float(recall.min()),
        "rel_l2": float(rel_l2.mean()),
        "rel_l2_remainder": float(rel_l2_remainder.mean()),
        **{name: records[0][name] for name in COSTS},
    }


def schedule(missing: Sequence[tuple[int, Way]], frames: set[int]) -> list[tuple[int, Way | None]]:
    """Put the dense generations (None) between the missing ones.

    One comes first in a process, before a prompt that has no dense `frames` yet, and before every `DENSE_EVERY` others.
    """
    tasks: list[tuple[int, Way | None]] = []
    have, since = set(frames), DENSE_EVERY
    for prompt, setting in missing:
        if since == DENSE_EVERY or prompt not in have:
            tasks.append((prompt, None))
            have.add(prompt)
            since = 0
        tasks.append((prompt, setting))
        since += 1
    return tasks


def generated_ways(bench: Bench, name: str) -> list[Setting]:
    """A system without remainder and with it, at the density of the generations."""
    setting = at_density(SYSTEMS[name], bench.density, bench.steps)
    return [Setting(candidate, setting.block) for candidate in setting.with_and_without()]


def measure_generations(bench: Bench, names: Sequence[str]) -> None:
    """Generate what is missing, prompt by prompt; each finished generation is kept at once."""
    ways: list[Way] = [way for name in names for way in generated_ways(bench, name)]
    ways += [] if bench.plan is None else [bench.plan]
    settings = list({setting.name: setting for setting in ways}.values())
    count, work = len(settings), bench.work
    # The order rotates, so that no system always runs right after a dense one.
    missing = [
        (prompt, setting)
        for prompt in range(len(bench.prompts))
        for turn in range(count)
        if work.get("runs", (setting := settings[(prompt + turn) % count]).name, prompt) is None
    ]
    if not missing:
        return
    frames = {prompt for prompt in range(len(bench.prompts)) if work.dense.has(prompt, "dense")}
    tasks = schedule(missing, frames)
    share = work.get("runs", "attention share")
    short = bench.settings.with_steps(min(ATTENTION_STEPS, bench.steps))
    total = len(tasks) * bench.steps + 1 + (0 if share else short.num_inference_steps)
    with quiet(bench.pipe), tqdm(total=total, unit="step", smoothing=0.05) as bar:
        bar.set_description("warm-up")
        once, first = bench.settings.with_steps(1), bench.prompts[0]
        generate_variant(bench.pipe, DENSE, first, once, seed=bench.seed, on_step=bar.update)
        if not share:
            bar.set_description("attention alone, dense")
            spans = dense_attention(bench.pipe, first, short, seed=bench.seed, on_step=bar.update)
            work.put("runs", "attention share", {"attention": spans[0], "transformer": spans[1]})
        dense_seconds = 0.0
        for number, (prompt, task) in enumerate(tasks):
            label = "dense" if task is None else task.label
            bar.set_description(f"generation {number + 1} of {len(tasks)}, {label}")
            if task is None:
                dense_seconds = _dense(bench, prompt, bar.update)
            else:
                found = _sparse(bench, prompt, task, dense_seconds, bar.update)
                work.put("runs", task.name, found, prompt)
            write_report(bench)


def _dense(bench: Bench, prompt: int, on_step: Callable[[], object]) -> float:
    """Seconds of a dense generation; the first one of a prompt is what all others are compared with."""
    text = bench.prompts[prompt]
    made = generate_variant(
        bench.pipe, DENSE, text, bench.settings, seed=bench.seed + prompt, on_step=on_step
    )
    if not bench.work.dense.has(prompt, "dense"):
        semantic = demo.score(made.frames, text)
        bench.work.put("runs", "dense", {"seconds": made.seconds, "semantic": semantic}, prompt)
        bench.work.dense.put(prompt, "dense", made)
    return made.seconds


def _sparse(
    bench: Bench, prompt: int, setting: Way, dense_seconds: float, on_step: Callable[[], object]
) -> dict[str, Any]:
    text, device = bench.prompts[prompt], bench.pipe._execution_device
    with clocked(attention, "select", device) as selecting:
        made = generate_variant(
            bench.pipe,
            setting.variant(),
            text,
            bench.settings,
            seed=bench.seed + prompt,
            on_step=on_step,
        )
    dense = bench.work.dense.get(prompt, "dense")
    return {
        "seconds": made.seconds,
        "dense_seconds": dense_seconds,
        "attention_seconds": made.attention_seconds,
        "selection_seconds": sum(selecting),
        "density": made.density,
        "psnr": psnr(made.frames, dense.frames),
        "ssim": ssim(made.frames, dense.frames),
        "semantic": demo.score(made.frames, text),
    }


def generations_report(bench: Bench) -> dict[str, Any]:
    """Rows of all systems of which at least one generation is finished, and one for dense."""
    rows, done, total = [], 0, 0
    dense_seconds: set[float] = set()
    for name in sorted(SYSTEMS):
        for setting in generated_ways(bench, name):
            runs = bench.runs("runs", setting.name)
            done, total = done + len(runs), total + len(bench.prompts)
            dense_seconds |= {run["dense_seconds"] for run in runs}
            if runs:
                remainder = setting.candidate.remainder
                rows.append(
                    {"preset": name, "remainder": remainder, **_described(setting), **_runs_row(runs)}
                )
    # The last one measured, also where this process was given none.
    known = bench.work.get("runs", "calibrated")
    if known is not None and known["density"] == bench.density:
        runs = bench.runs("runs", known["name"])
        done, total = done + len(runs), total + len(bench.prompts)
        dense_seconds |= {run["dense_seconds"] for run in runs}
        if runs:
            rows.append({"preset": "calibrated", "remainder": True, **_runs_row(runs)})
    share = bench.work.get("runs", "attention share")
    dense = None
    if share is not None and dense_seconds:
        seconds = median(dense_seconds)
        runs = bench.runs("runs", "dense")
        dense = {
            "prompts": len(runs),
            "seconds": seconds,
            # All steps take alike.
            "attention_seconds": share["attention"] * bench.steps / min(ATTENTION_STEPS, bench.steps),
            "semantic": _semantic(runs),
        }
    return {"done": done, "of": total, "asked": bench.density, "dense": dense, "rows": rows}


def _runs_row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of quality, medians of time; each generation is compared with the dense one timed before it."""
    return {
        "prompts": len(runs),
        "density": fmean(run["density"] for run in runs),
        "psnr_mean": fmean(run["psnr"] for run in runs),
        "psnr_min": min(run["psnr"] for run in runs),
        "ssim": fmean(run["ssim"] for run in runs),
        "semantic": _semantic(runs),
        "selection_seconds": median(run["selection_seconds"] for run in runs),
        "attention_seconds": median(run["attention_seconds"] for run in runs),
        "seconds": median(run["seconds"] for run in runs),
        "speedup": median(run["dense_seconds"] / run["seconds"] for run in runs),
    }


def _semantic(runs: list[dict[str, Any]]) -> float:
    """Share of the parts of the prompts that the videos show."""
    return fmean(fmean(run["semantic"].values()) for run in runs)


def draw_masks(bench: Bench, path: Path) -> None:
    """Draw what every family keeps of one head in the middle of denoising: the one where they differ most in recall."""
    families = list(FAMILIES)
    densities = [bench.density if f.density is None else f.density for f in FAMILIES.values()]
    candidates = [Candidate(*pair) for pair in zip(families, densities, strict=True)]
    choosing = [number for number, f in enumerate(FAMILIES.values()) if f.density is None]
    calls: list[tuple[Tensor, Tensor, Tensor, TokenGrid]] = []
    recalls: list[Tensor] = []  # [heads, families] of each layer

    def use(step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid) -> None:
        if step == PICTURE_STEPS // 2 and layer == len(calls):  # the first guidance branch only
            found = profile_call(query, key, value, grid, candidates)
            calls.append((query.clone(), key.clone(), value.clone(), grid))
            recalls.append(found.mass / found.rows)

    watch(bench, 0, bench.settings.with_steps(PICTURE_STEPS), use)
    spread = torch.stack(recalls)[..., choosing].std(2)  # [layers, heads]
    layer, head = divmod(int(spread.argmax()), spread.shape[1])
    query, key, value, grid = calls[layer]
    panels = [attention_panel(query[0, :, head], key[0, :, head], grid)]
    for (name, density), recall in zip(
        zip(families, densities, strict=True), recalls[layer][head].tolist(), strict=True
    ):
        selection = select(name, query, key, grid, density=density, value=value)
        panels.append(family_panel(name, selection, head, recall))
    title = (
        f"What each family keeps of one head at density {bench.density:g}: layer {layer}, head {head} of the demo "
        f"model, {grid.total_tokens:,} tokens in {grid.frames} frames"
    )
    save_masks(panels, grid, title, path)


def write_report(bench: Bench) -> None:
    """Write the output from all that is finished."""
    report = {
        "format_version": FORMAT_VERSION,
        "machine": bench.machine,
        "dense_backend": dense_backend(bench.pipe.transformer),
        "model": "demo",
        "settings": bench.settings.to_dict(),
        "seed": bench.seed,
        "prompts": bench.prompts,
        "heads": heads_report(bench),
        "generations": generations_report(bench),
    }
    write_json(bench.output, report)


def prepared(args: argparse.Namespace, densities: list[float], density: float) -> Bench:
    """Load the model and open the folder of what was measured on it.

    Raises:
        ValueError: a number out of range, or a device that is not there.
    """
    for name, most in (("levels", 1000), ("query_blocks", 1_000_000)):
        if not 1 <= getattr(args, name) <= most:
            raise ValueError(
                f"{name}: expected a number from 1 to {most}, got {getattr(args, name)}; choose one of these"
            )
    at = demo_work(args, FORMAT_VERSION, tuning=False)
    plan = None
    if args.calibration is not None:
        seeds = range(at.seed, at.seed + len(at.prompts))
        plan = calibrated(at.pipe, args.calibration, density, at.folder / "plan", at.prompts, seeds)
        Work(at.folder).put("runs", "calibrated", {"name": plan.name, "density": density})
    return Bench(
        **vars(at),
        output=args.output,
        densities=densities,
        density=density,
        levels=args.levels,
        query_blocks=args.query_blocks,
        plan=plan,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/presets.json"))
    parser.add_argument("--only", metavar="NAMES", help="measure these systems, comma-separated")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--densities", default="0.5,0.25,0.15", help="of the heads (default %(default)s)")
    parser.add_argument("--density", default="0.25", help="of generations and picture (default %(default)s)")
    parser.add_argument("--levels", type=int, default=3, help="noise levels of the heads")
    parser.add_argument("--query-blocks", type=int, default=8, help="sampled in each attention call")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="of a plan of ours for the generations"
    )
    add_arguments(parser, work="outputs/presets", tuning=False)
    args = parser.parse_args(argv)
    try:
        names = parse_names(args.only)
        densities, density = parse_densities(args.densities), parse_densities(args.density)
        if len(density) != 1:
            raise ValueError(f"density: expected one number, got {args.density!r}; see --densities")
        bench = prepared(args, densities, density[0])
    except ValueError as error:
        parser.error(str(error))
    stages = STAGES if args.stage == "all" else (args.stage,)
    if "heads" in stages:
        measure_heads(bench, names)
    if "picture" in stages:
        draw_masks(bench, args.output.with_name("masks.png"))
    if "generations" in stages:
        measure_generations(bench, names)
    if stages != ("picture",):
        write_report(bench)


if __name__ == "__main__":
    main()
