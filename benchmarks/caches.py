"""Compare feature caches on the demo model at equal PSNR: those of diffusers and cache-dit, ours, and calibrated plans.

    pip install -e '.[peers]'
    python benchmarks/caches.py --schedule plan:outputs/schedule --joint plan:outputs/joint     # hours on two CPU cores

Every cache has one dial, a threshold or an interval. It is tuned on other prompts than the compared ones, by bisection,
to the largest skipped share that keeps the mean PSNR at ``--target-psnr``. Then all run the held-out prompts in one
process, with equal seeds, in an order that rotates. ``--schedule``, ``--sparse`` and ``--joint`` add variants that are
used as they are: plans by directory, or any name that ``dit-accel evaluate`` knows.

All other settings are those of the authors, with these exceptions: the demo has 6 blocks and 20 steps, so DBCache looks
at 1 block (ours at 2) and warms up for 4 steps. Where there is a limit on skips in a row it is 6, since smaller ones
keep a dial from reaching the target. TaylorSeer of diffusers runs in its lite mode, since its default patterns match
nothing on Wan. Both MagCaches have one curve, measured by diffusers' calibration on the first tuning prompt. TeaCache's
polynomial is fitted to the same prompt.

Each finished generation is kept in ``--work``, in a folder named after model, settings and machine. Started again, the
command goes on where it was.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from dit_accel.calibration import measure_cache
from dit_accel.evaluation.curve import magnitude_curve
from dit_accel.evaluation.generate import generate_variant, quiet
from dit_accel.evaluation.metrics import psnr
from dit_accel.evaluation.models import GenerationSettings, resolve_device
from dit_accel.evaluation.result import Evaluation, Scorer
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.store import GenerationStore, slug, write_json
from dit_accel.evaluation.timing import machine, package_version, weights_digest
from dit_accel.evaluation.variants import DENSE, Variant, parse_variant, plan_variant
from dit_accel.pipelines import demo, load_demo

FORMAT_VERSION = 1
SIZES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps"}
GIVEN = ("schedule", "sparse", "joint")
HELD_OUT_SEED = 1000  # added to the seed: tuning has seen none of these


@dataclass(frozen=True)
class Way:
    """A cache with its dial: `{}` in the variant's name, from `low`, which skips least, to `high`.

    Whole numbers make the dial whole; others are searched on a logarithmic scale.
    """

    label: str
    template: str
    low: float
    high: float

    @property
    def peer(self) -> bool:
        """Whether it belongs to another project."""
        return not self.template.startswith("preset:")

    @property
    def whole(self) -> bool:
        """Whether the dial has whole numbers only."""
        return isinstance(self.low, int)

    def name(self, value: float) -> str:
        """The variant at a place of the dial."""
        return self.template.format(f"{value:g}")

    def probes(self, most: int) -> int:
        """How many places of the dial a search looks at, at most."""
        return min(most, int(self.high - self.low + 1).bit_length()) if self.whole else most


_DBCACHE = "cache-dit:dbcache@{}:Fn_compute_blocks=1:max_warmup_steps=4"
WAYS = (
    Way("diffusers:first_block", "diffusers:first_block@{}", 0.005, 1.0),
    Way("diffusers:mag_cache", "diffusers:mag_cache@{}:max_skip_steps=6", 0.005, 1.0),
    Way("diffusers:taylorseer", "diffusers:taylorseer@{}", 2, 8),
    # From 1 on, cache-dit takes everything as alike.
    Way("cache-dit:dbcache", _DBCACHE, 0.005, 0.9),
    Way("cache-dit:dbcache+taylorseer", f"{_DBCACHE}:taylorseer=true", 0.005, 0.9),
    Way("cg-taylor", "preset:cg-taylor@{}:max_skips=6", 0.005, 1.0),
    Way("dbcache", "preset:dbcache@{}:first_blocks=2:warm_up=4:max_skips=6", 0.005, 1.0),
    Way("easycache", "preset:easycache@{}:max_skips=6", 0.005, 1.0),
    Way("first-block", "preset:first-block@{}:max_skips=6", 0.005, 1.0),
    Way("magcache", "preset:magcache@{}:max_skips=6", 0.005, 1.0),
    Way("taylorseer", "preset:taylorseer:max_skips={}", 1, 7),
    Way("teacache", "preset:teacache@{}:max_skips=6", 0.005, 1.0),
)


@dataclass(frozen=True)
class Probe:
    """A place of a dial: mean PSNR in dB against dense, and mean skipped share, over the tuning prompts."""

    value: float
    psnr: float
    skipped_share: float


@dataclass(frozen=True)
class Tuned:
    """What a search found: all probes in order, the chosen one, and whether it keeps to the target."""

    probes: tuple[Probe, ...]
    chosen: Probe
    reached: bool


def tune(way: Way, target: float, most: int, measure: Callable[[float], Probe]) -> Tuned:
    """Search a dial for the largest skipped share with a mean PSNR of at least `target`.

    PSNR falls with the dial on the whole, but not always: of all probes that keep to the target the one that skips most
    is chosen, of these the best one. Where none does, the one of the highest PSNR stands in.
    """
    found: list[Probe] = []
    low, high = way.low, way.high
    for _ in range(way.probes(most)):
        middle = (low + high) // 2 if way.whole else float(f"{(low * high) ** 0.5:.3g}")
        found.append(measure(middle))
        if found[-1].psnr >= target:
            low = middle + 1 if way.whole else middle
        else:
            high = middle - 1 if way.whole else middle
        if low > high:
            break
    kept = [probe for probe in found if probe.psnr >= target]
    if kept:
        return Tuned(tuple(found), max(kept, key=lambda probe: (probe.skipped_share, probe.psnr)), True)
    return Tuned(tuple(found), max(found, key=lambda probe: probe.psnr), False)


@dataclass(eq=False)
class Bench:
    """A pipeline, what to generate with it, and where results go.

    given: variants that are not tuned, by the name of their row.
    """

    pipe: Any
    model: str
    settings: GenerationSettings
    seed: int
    tuning_prompts: list[str]
    prompts: list[str]
    target: float
    probes: int
    ways: Sequence[Way]
    given: dict[str, Variant]
    work: Path
    output: Path
    scorer: Scorer | None = None

    def variant(self, name: str) -> Variant:
        """The variant of a cache's name, with what has to be measured on the model."""
        variant = parse_variant(name)
        if variant.with_curve:
            return variant.with_curve(self.curve())
        if (
            variant.plan is not None
            and variant.plan.cache is not None
            and variant.plan.cache.gate == "teacache"
        ):
            cache = replace(variant.plan.cache, polynomial=self.polynomial())
            return plan_variant(replace(variant.plan, cache=cache), name)
        return variant

    def curve(self) -> tuple[float, ...]:
        """The curve of MagCache on the first tuning prompt, measured once."""
        return self._measured(
            "curve",
            lambda: magnitude_curve(self.pipe, self.tuning_prompts[0], self.settings, seed=self.seed),
        )

    def polynomial(self) -> tuple[float, ...]:
        """TeaCache's polynomial on the first tuning prompt, fitted once."""
        return self._measured(
            "polynomial",
            lambda: measure_cache(
                self.pipe, self.tuning_prompts[0], **self.settings.to_dict(), seed=self.seed
            )["polynomial"],
        )

    def _measured(self, name: str, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        path = self.work / f"{name}.json"
        if not path.is_file():
            write_json(path, measure())
        return tuple(json.loads(path.read_text(encoding="utf-8")))


def tune_all(bench: Bench) -> dict[str, Tuned]:
    """Tune every cache; what finished generations gave is taken over."""
    count = len(bench.tuning_prompts)
    steps = bench.settings.num_inference_steps
    dense = GenerationStore(bench.work / "tuning" / "dense")
    total = (count + count * sum(way.probes(bench.probes) for way in bench.ways)) * steps
    found: dict[str, Tuned] = {}
    with quiet(bench.pipe), tqdm(total=total, unit="step", smoothing=0.05) as bar:
        for prompt, text in enumerate(bench.tuning_prompts):
            bar.set_description(f"tuning, dense {prompt + 1} of {count}")
            if not dense.has(prompt, "dense"):
                made = generate_variant(
                    bench.pipe, DENSE, text, bench.settings, seed=bench.seed + prompt, on_step=bar.update
                )
                dense.put(prompt, "dense", made)
        done = count * steps
        for way in bench.ways:
            bar.n = done  # some searches end early, and finished generations take no time
            bar.set_description(f"tuning, {way.label}")
            found[way.label] = tune(
                way,
                bench.target,
                bench.probes,
                lambda value, way=way: _probe(bench, way, value, dense, bar.update),
            )
            done += count * way.probes(bench.probes) * steps
        bar.n = done
        bar.refresh()
    return found


def _probe(
    bench: Bench, way: Way, value: float, dense: GenerationStore, on_step: Callable[[], object]
) -> Probe:
    """Generate the tuning prompts at a place of a dial."""
    name = way.name(value)
    runs = []
    for prompt, text in enumerate(bench.tuning_prompts):
        path = bench.work / "tuning" / f"{prompt:03d}-{slug(name)}.json"
        if not path.is_file():
            made = generate_variant(
                bench.pipe,
                bench.variant(name),
                text,
                bench.settings,
                seed=bench.seed + prompt,
                on_step=on_step,
            )
            near = psnr(made.frames, dense.get(prompt, "dense").frames)
            write_json(path, {"variant": name, "psnr": near, "skipped_share": made.skipped_share})
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    return Probe(value, fmean(run["psnr"] for run in runs), fmean(run["skipped_share"] for run in runs))


def compare(bench: Bench, tuned: dict[str, Tuned]) -> Evaluation:
    """Run dense, the tuned caches and what was given on the held-out prompts.

    Each set of rows has a folder of its own: to add one leaves the others alone, but runs all anew, side by side.
    """
    variants = [DENSE]
    variants += [bench.variant(way.name(tuned[way.label].chosen.value)) for way in bench.ways]
    variants += [_renamed(bench, variant, label) for label, variant in bench.given.items()]
    rows = hashlib.sha256("\n".join(variant.identity for variant in variants).encode()).hexdigest()[:12]
    return evaluate(
        bench.pipe,
        variants,
        bench.prompts,
        bench.settings,
        model=bench.model,
        seed=bench.seed + HELD_OUT_SEED,
        scorer=bench.scorer,
        output_dir=bench.work / f"held-out-{rows}",
    )


def _renamed(bench: Bench, variant: Variant, label: str) -> Variant:
    """A given variant under the name of its row: a directory's name tells a reader nothing."""
    if variant.with_curve:
        variant = variant.with_curve(bench.curve())
    if variant.plan is not None:
        return plan_variant(variant.plan, label)
    return Variant(label, variant.apply, None, f"{label} {variant.identity}")


def report(bench: Bench, tuned: dict[str, Tuned], evaluation: Evaluation) -> dict[str, Any]:
    """`caches.json`: how each dial was found, and the comparison on the held-out prompts."""
    rows = []
    for way in bench.ways:
        result = tuned[way.label]
        rows.append(
            {
                "label": way.label,
                "peer": way.peer,
                "variant": way.name(result.chosen.value),
                "reached": result.reached,
                "chosen": vars(result.chosen),
                "probes": [vars(probe) for probe in result.probes],
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "machine": {**evaluation.machine, "cache_dit": package_version("cache-dit")},
        "target_psnr": bench.target,
        "tuning_prompts": bench.tuning_prompts,
        "tuning_seed": bench.seed,
        "tuned": rows,
        "given": {label: variant.name for label, variant in bench.given.items()},
        "evaluation": evaluation.to_dict(),
    }


def run(bench: Bench) -> dict[str, Any]:
    """Tune, compare and write the output."""
    tuned = tune_all(bench)
    found = report(bench, tuned, compare(bench, tuned))
    write_json(bench.output, found)
    return found


def parse_labels(text: str | None) -> list[Way]:
    """The caches of a comma-separated list of labels, all where there is none.

    Raises:
        ValueError: a label is unknown.
    """
    if text is None:
        return list(WAYS)
    labels = [label.strip() for label in text.split(",") if label.strip()]
    unknown = sorted(set(labels) - {way.label for way in WAYS})
    if unknown:
        known = ", ".join(way.label for way in WAYS)
        raise ValueError(f"only: expected labels out of {known}, got {', '.join(unknown)}")
    return [way for way in WAYS if way.label in labels]


def prepared(args: argparse.Namespace) -> Bench:
    """Load the model and open the folder of what was measured on it.

    Raises:
        ValueError: a number out of range, an unknown name, or a device or package that is not there.
    """
    ways = parse_labels(args.only)
    parts = {"prompts": "held_out", "tuning_prompts": "calibration"}
    for name, part in parts.items():
        most = len(demo.PROMPTS[part])
        if not 1 <= getattr(args, name) <= most:
            raise ValueError(f"{name}: expected a number from 1 to {most}, got {getattr(args, name)}")
    if args.probes < 1:
        raise ValueError(f"probes: expected a number from 1, got {args.probes}")
    for way in ways:
        parse_variant(way.name(way.low))  # refuses at once where cache-dit is missing
    given = {label: parse_variant(name) for label in GIVEN if (name := getattr(args, label)) is not None}
    sizes = {name: getattr(args, option) for option, name in SIZES.items()}
    settings = GenerationSettings(**{**demo.DEFAULTS, **sizes})
    pipe = load_demo(torch.bfloat16, str(resolve_device(args.device)))
    place = machine(pipe._execution_device, torch.bfloat16)
    model = [weights_digest(part) for part in (pipe.transformer, pipe.text_encoder, pipe.vae)]
    kind = [FORMAT_VERSION, model, settings.to_dict(), args.seed, demo.PROMPTS, place]
    digest = hashlib.sha256(json.dumps([*kind, package_version("cache-dit")]).encode()).hexdigest()[:12]
    return Bench(
        pipe=pipe,
        model="demo",
        settings=settings,
        seed=args.seed,
        tuning_prompts=demo.PROMPTS["calibration"][: args.tuning_prompts],
        prompts=demo.PROMPTS["held_out"][: args.prompts],
        target=args.target_psnr,
        probes=args.probes,
        ways=ways,
        given=given,
        work=args.work / digest,
        output=args.output,
        scorer=demo.score,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-psnr", type=float, default=30.0, metavar="DB", help="default %(default)g")
    for label in GIVEN:
        parser.add_argument(f"--{label}", metavar="VARIANT", help=f"row {label!r}, for instance plan:DIR")
    parser.add_argument("--only", metavar="LABELS", help="these caches, comma-separated")
    parser.add_argument("--prompts", type=int, default=4, help="held-out ones (default %(default)s)")
    parser.add_argument("--tuning-prompts", type=int, default=1, help="default %(default)s")
    parser.add_argument("--probes", type=int, default=6, help="most places of a dial (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    for option, name in SIZES.items():
        parser.add_argument(f"--{option}", type=int, default=demo.DEFAULTS[name])
    parser.add_argument("--device", help="default: CUDA where there is one, else the CPU")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/caches.json"))
    parser.add_argument("--work", type=Path, default=Path("outputs/caches"), help="finished generations")
    args = parser.parse_args(argv)
    try:
        bench = prepared(args)
    except ValueError as error:
        parser.error(str(error))
    run(bench)


if __name__ == "__main__":
    main()
