"""The command line: every subcommand on a tiny pipeline, every message, and what importing it costs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dit_accel
from dit_accel import AccelPlan
from dit_accel.caching import cache_preset
from dit_accel.cli import COMMANDS, main

SCRIPT = Path(sys.executable).with_name("dit-accel")
SIZES = [
    "--height",
    "48",
    "--width",
    "80",
    "--frames",
    "5",
    "--steps",
    "3",
    "--guidance",
    "3",
    "--dtype",
    "float32",
]
PROMPTS = [
    "a red circle moves left",
    "a blue square moves up",
    "a red square moves left",
    "a blue circle moves up",
]


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@pytest.fixture
def run(capsys):
    """Run a command and return its exit code, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _is_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        darkest, lightest = image.convert("L").getextrema()
    return lightest - darkest > 100


def test_importing_the_package_and_the_command_line_loads_nothing_heavy():
    code = (
        "import sys, dit_accel.cli; dit_accel.cli.build_parser(); "
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'matplotlib', 'torchmetrics', 'tqdm'}; "
        "print(sorted(heavy & set(sys.modules)), dit_accel.__version__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "0.1.0"]


def test_every_public_name_can_be_imported():
    for name in dit_accel.__all__:
        assert getattr(dit_accel, name) is not None
    assert set(dit_accel.__all__) <= set(dir(dit_accel))
    with pytest.raises(AttributeError, match=r"no attribute 'accelerate'; it offers AccelPlan, PlanError"):
        dit_accel.accelerate  # noqa: B018


def test_the_installed_script_lists_the_subcommands():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f"\n    {command.__name__.rsplit('.', 1)[1]}" in done.stdout
    assert done.stderr == ""


def test_the_installed_script_fails_with_one_line():
    done = subprocess.run([SCRIPT, "inspect", "/no/such/plan"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("dit-accel inspect: error: /no/such/plan")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [command.__name__.rsplit(".", 1)[1] for command in COMMANDS])
def test_every_subcommand_has_json_output_and_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert ("--output FILE" if command == "bench" else "--output DIR") in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "dit-accel: error: the following arguments are required: COMMAND"),
        (["paint"], "dit-accel: error: argument COMMAND: invalid choice: 'paint'"),
        (["evaluate", "demo"], "dit-accel evaluate: error: the following arguments are required: --variants"),
        (
            ["generate", "demo", "--prompt", "x", "--steps", "few"],
            "argument --steps: invalid int value: 'few'",
        ),
        (
            ["calibrate", "demo", "--density", "0.3", "--target-psnr", "30"],
            "not allowed with argument --density",
        ),
        (["env", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", "/no/model", "--prompt", "x"],
            "model: there is no directory /no/model; give a pipeline",
        ),
        (["generate", "TMP", "--prompt", "x"], "is no diffusers pipeline, it has no model_index.json"),
        (["generate", "TMP", "--prompt", "x", "--device", "abacus"], "device: expected cpu, cuda or cuda:N"),
        (["generate", "TMP", "--prompt", "x", "--device", "meta"], "device: expected cpu, cuda or cuda:N"),
        (["evaluate", "TMP", "--variants", "preset:window@0.3:name=x"], "has no option 'name'"),
        (["evaluate", "TMP", "--variants", "preset:window@0.3:cls=1"], "has no option 'cls'"),
        (["evaluate", "TMP", "--variants", "preset:magcache:curve=0.9"], "has no option 'curve'"),
        (
            ["evaluate", "TMP", "--variants", "preset:window@0.3:cache=cg-taylor:cache.name=x"],
            "has no option 'name'",
        ),
        (
            ["generate", "demo", "--prompt", "x", "--frames", "300", "--output", "TMP/x"],
            "num_frames: expected at most 255",
        ),
        (
            ["generate", "demo", "--prompt", "x", "--guidance", "nan", "--output", "TMP/x"],
            "guidance_scale: expected a finite",
        ),
        (["generate", "demo", "--prompt", "x", "--output", "TMP/foreign.txt"], "File exists"),
        (["bench", "--compile-only", "--output", "TMP"], "output: expected a file, got the directory"),
        (["generate", "TMP", "--prompt", "x", "--plan", "TMP"], "accel_config.json"),
        (["evaluate", "TMP", "--variants", "dense"], "prompts: only the model 'demo' brings its own"),
        (["evaluate", "TMP", "--variants", "fast"], "variant 'fast': expected dense, plan:DIR"),
        (["evaluate", "demo", "--variants", "dense", "--prompts", "TMP/none.txt"], "prompts: cannot read"),
        (
            ["evaluate", "demo", "--variants", "dense", "--prompts", "TMP/foreign.txt"],
            "prompt: expected a sentence of the demo world such as",
        ),
        (["evaluate", "demo", "--variants", "dense", "--limit", "0"], "limit: expected at least 1, got 0"),
        (["calibrate", "TMP"], "prompts: only the model 'demo' brings its own"),
        (["demo", "--model", "TMP"], "prompts: only the model 'demo' brings its own"),
        (["inspect", "TMP"], "accel_config.json"),
        (["env", "--device", "cuda:77x"], "device: expected cpu, cuda or cuda:N"),
    ],
)
def test_user_errors_are_one_line_and_no_traceback(argv, message, run, tmp_path):
    (tmp_path / "foreign.txt").write_text("a cat plays the piano\n")
    code, out, err = run(*(argument.replace("TMP", str(tmp_path)) for argument in argv))
    assert code == 1
    assert out == ""
    assert err.startswith(f"dit-accel {argv[0]}: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_too_few_prompts_for_the_demo(run, tiny_wan_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    code, _, err = run("demo", "--model", tiny_wan_dir, "--prompts", tmp_path / "prompts.txt")
    assert code == 1
    assert "expected 1 to calibrate on and 2 to compare, got 1 and 1" in err


def test_an_interrupted_command_says_so(run, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dit_accel.cli.env.run", interrupt)
    assert run("env") == (130, "", "dit-accel env: interrupted\n")


def test_a_device_without_room_says_so(run, monkeypatch):
    def exhaust(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("dit_accel.cli.env.run", exhaust)
    code, out, err = run("env")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "env: error: CUDA out of memory. Tried to allocate 20.00 GiB. (fewer frames" in err


def test_a_cpu_without_room_says_so(run, monkeypatch):
    def exhaust(args):
        torch.empty(1 << 60)

    monkeypatch.setattr("dit_accel.cli.env.run", exhaust)
    code, out, err = run("env")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "can't allocate memory" in err
    assert "fewer frames or pixels take less" in err


def test_generate_says_what_was_made_where_it_is_not_what_was_asked_for(run, tiny_wan_dir, tmp_path):
    sizes = list(SIZES)
    sizes[sizes.index("--frames") + 1] = "6"
    code, out, err = run(
        "generate", tiny_wan_dir, "--prompt", PROMPTS[0], *sizes, "--json", "--output", tmp_path
    )
    made = len(list((tmp_path / "frames").glob("*.png")))
    assert (code, made) == (0, json.loads(out)["settings"]["num_frames"])
    assert made != 6
    assert f"asked for 6 frames of 80×48, the pipeline made {made} of 80×48" in err


def test_generate_refuses_frames_that_are_not_finite(run, tiny_wan_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_dir, folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.bias"].fill_(torch.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    code, _, err = run("generate", folder, "--prompt", PROMPTS[0], *SIZES, "--output", tmp_path / "out")
    assert code == 1
    assert "the frames are not finite, NaN or infinity; give the model another --dtype" in err
    assert not (tmp_path / "out" / "video.mp4").exists()


def test_weights_that_were_never_fetched_are_one_line(run, tiny_wan_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_dir, folder)
    for part in ("transformer", "text_encoder"):
        (weights,) = (folder / part).glob("*.safetensors")
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    code, _, err = run("generate", folder, "--prompt", PROMPTS[0], *SIZES, "--output", tmp_path / "out")
    assert code == 1
    assert "generate: error: model: " in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    AccelPlan.preset("window", density=0.3).save_pretrained(tmp_path)
    command = f"{SCRIPT} inspect {tmp_path} --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_env(run, tmp_path):
    code, out, _ = run("env", "--json", "--device", "cpu", "--output", tmp_path)
    data = json.loads(out)
    assert code == 0
    assert data["versions"]["torch"] == torch.__version__
    assert data["attention_backend"] in {"torch", "flex", "triton", "reference"}
    assert data["attention_precisions"][0] == "native"
    assert isinstance(data["amx"], bool)
    assert json.loads((tmp_path / "env.json").read_text()) == data
    _, text, _ = run("env", "--device", "cpu", "--dtype", "float32")
    assert torch.__version__ in text
    assert "cpu, float32" in text


def test_inspect(run, tmp_path):
    AccelPlan.preset("window", density=0.3).save_pretrained(tmp_path / "plan")
    code, out, _ = run("inspect", tmp_path / "plan", "--json", "--output", tmp_path)
    data = json.loads(out)
    assert code == 0
    assert data["choice"] == [[[0]]]
    assert data["candidates"][0]["label"] == "window@0.30"
    assert data["candidates"][0]["heads"] == 1
    assert data["density_mean"] == pytest.approx(0.3)
    assert (data["cache"], data["grid"], data["dense_layers"]) == (None, None, 0.0)
    assert _is_a_picture(tmp_path / "heads.png")
    _, text, _ = run("inspect", tmp_path / "plan")
    assert "every layer  window@0.30" in text
    assert "any (a preset)" in text
    plan = AccelPlan.preset("svg", cache=cache_preset("cg-taylor"))
    plan.save_pretrained(tmp_path / "both")
    data = json.loads(run("inspect", tmp_path / "both", "--json")[1])
    assert data["cache"] == plan.cache.to_dict()
    assert data["dense_layers"] == plan.dense_layers > 0


def test_generate_dense_and_with_a_plan(run, tiny_wan_dir, tmp_path):
    AccelPlan.preset("skip").save_pretrained(tmp_path / "plan")
    arguments = ["generate", tiny_wan_dir, "--prompt", PROMPTS[0], *SIZES, "--json", "--output"]
    code, out, _ = run(*arguments, tmp_path / "dense")
    dense = json.loads(out)
    assert (code, dense["density"], dense["plan"]) == (0, 1.0, None)
    code, out, _ = run(*arguments, tmp_path / "fast", "--plan", tmp_path / "plan")
    assert (code, json.loads(out)["density"]) == (0, 0.0)
    for name in ("dense", "fast"):
        frames = sorted((tmp_path / name / "frames").glob("*.png"))
        assert len(frames) == 5
        with Image.open(frames[0]) as image:
            assert image.size == (80, 48)
        assert (tmp_path / name / "video.mp4").stat().st_size > 500
    first = [(tmp_path / name / "frames" / "000.png").read_bytes() for name in ("dense", "fast")]
    assert first[0] != first[1]


def test_evaluate(run, tiny_wan_dir, prompts, tmp_path):
    names = "preset:window@0.3:block=8,preset:pooled@0.5:block=8"
    arguments = ["evaluate", tiny_wan_dir, "--variants", names, "--prompts", prompts, "--limit", 1, *SIZES]
    code, out, _ = run(*arguments, "--json", "--output", tmp_path, "--attention-steps", 1)
    data = json.loads(out)
    assert code == 0
    assert data["prompts"] == PROMPTS[:1]
    assert [row["name"] for row in data["variants"]] == ["dense", *names.split(",")]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == data
    assert _is_a_picture(tmp_path / "comparison.png")
    assert _is_a_picture(tmp_path / "curve.png")
    assert len(list(tmp_path.glob("*.mp4"))) == 3
    assert "| `dense` |" in (tmp_path / "table.md").read_text()
    # Started again, nothing is generated twice, and the table says the same.
    code, out, err = run(*arguments, "--output", tmp_path, "--attention-steps", 1)
    assert code == 0
    assert "3 finished generations are taken over" in err
    assert f"{data['variants'][1]['seconds_p50']:.2f}" in out


def test_calibrate_and_use_the_plan(run, tiny_wan_dir, prompts, tmp_path):
    plan = tmp_path / "plan"
    arguments = ["calibrate", tiny_wan_dir, "--prompts", prompts, *SIZES, "--output", plan]
    code, out, err = run(*arguments, "--target-psnr", 99, "--json")
    assert code == 0
    assert "only the dense generation reaches it" in err
    assert json.loads(out)["density_mean"] == 1.0
    arguments += ["--density", 0.5]
    code, out, _ = run(*arguments, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["plan"] == str(plan)
    assert data["objective"]["density"] == 0.5
    assert data["density_mean"] == pytest.approx(AccelPlan.from_pretrained(plan).density_mean)
    code, out, _ = run(
        "generate", tiny_wan_dir, "--prompt", PROMPTS[0], "--plan", plan, *SIZES, "--output", tmp_path
    )
    assert code == 0
    assert "attention density" in out


def test_demo(run, tiny_wan_dir, prompts, tmp_path):
    arguments = ["demo", "--model", tiny_wan_dir, "--prompts", prompts, *SIZES, "--target-psnr", 60]
    code, out, err = run(*arguments, "--output", tmp_path, "--json")
    data = json.loads(out)
    assert code == 0
    for part in (
        "1 of 3: calibrate attention and steps",
        "2 of 3: the same for attention",
        "3 of 3: generate",
    ):
        assert part in err
    assert data["prompts"] == PROMPTS[1:3]
    assert data["seed"] == 1
    assert [row["name"] for row in data["variants"]] == ["dense", "accelerated", "joint"]
    for plan in ("plan", "joint_plan"):
        assert AccelPlan.from_pretrained(tmp_path / plan).layers == ("blocks.0.attn1", "blocks.1.attn1")
    assert AccelPlan.from_pretrained(tmp_path / "plan").cache is None
    assert _is_a_picture(tmp_path / "comparison.png")
    assert _is_a_picture(tmp_path / "heads.png")
    videos = sorted(path.name for path in tmp_path.glob("*.mp4"))
    assert videos == [f"00{n}-{name}.mp4" for n in range(2) for name in ("accelerated", "dense", "joint")]
    code, out, err = run(*arguments, "--output", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["runs"] == data["runs"]
