"""The package as users get it: the wheel in an empty environment, and the names at the top level."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUBPACKAGES = [
    "bench",
    "caching",
    "patterns",
    "evaluation",
    "cli",
    "kernels",
    "kernels.block_sparse",
    "pipelines",
    "pipelines.demo",
    "calibration",
]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a new environment that holds nothing but the wheel, and sees our dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("dit_accel", "kernels", "pipelines", "calibration"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=source)
    (wheel,) = folder.glob("dit_accel-*.whl")
    venv.create(folder / "env", with_pip=False)
    bin_folder = folder / "env" / "bin"
    target = Path(
        run(
            bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        bin_folder / "python",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    run(*pip, wheel, cwd=folder)
    # A path from a .pth file is not searched for further .pth files, so the editable install stays unseen.
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return bin_folder


def test_wheel_imports_every_subpackage(installed: Path, tmp_path: Path) -> None:
    names = ["dit_accel", *(f"dit_accel.{name}" for name in SUBPACKAGES)]
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    files = run(installed / "python", "-W", "ignore", "-c", code, cwd=tmp_path).split()
    assert len(files) == len(names)
    assert all(file.startswith(str(installed.parent)) for file in files), files


def test_wheel_lists_every_package_of_the_tree() -> None:
    on_disk = {
        f"dit_accel.{path.parent.relative_to(ROOT)}".replace("/", ".").removeprefix("dit_accel.dit_accel.")
        for folder in ("dit_accel", "kernels", "pipelines", "calibration")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert {name.removeprefix("dit_accel.") for name in on_disk} - {"dit_accel"} == set(SUBPACKAGES)


def test_wheel_runs_the_console_script(installed: Path, tmp_path: Path) -> None:
    listed = run(installed / "dit-accel", "--help", cwd=tmp_path)
    assert all(
        name in listed for name in ("demo", "calibrate", "generate", "evaluate", "inspect", "bench", "env")
    )
    assert "torch" in run(installed / "dit-accel", "env", cwd=tmp_path)


def test_wheel_carries_the_demo_model(installed: Path, tmp_path: Path) -> None:
    code = "from dit_accel.pipelines import load_demo; print(type(load_demo()).__name__)"
    assert run(installed / "python", "-W", "ignore", "-c", code, cwd=tmp_path).strip().endswith("WanPipeline")


def test_our_folders_shadow_no_installed_package() -> None:
    """diffusers imports Hugging Face's ``kernels``; ours must never be found under that name."""
    code = "from importlib.util import find_spec as f; print([f(n) and f(n).origin for n in ('kernels', 'pipelines')])"
    found = run(sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH="1")
    assert str(ROOT) not in found
    here = importlib.util.find_spec("kernels")
    assert here is None or not str(here.origin).startswith(str(ROOT))
