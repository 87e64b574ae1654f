"""What is installed from a wheel, without the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import born_again
from born_again import cli

ROOT = Path(born_again.__file__).parents[1]
PACKAGE = ROOT / "born_again"


def test_every_package_is_in_the_list():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("*.py")}
    assert set(listed) == found | {"born_again.examples"} and len(set(listed)) == len(listed)


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["ci"]["steps"][-1] == {"run": ".ci/run"}
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


def test_train_runs_a_script_with_its_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["born-again"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "cifar", "--dataset", "digits", "--help"])
    assert "usage: run_cifar.py" in (said := capsys.readouterr().out) and "in pixels. [16]" in said
    with pytest.raises(SystemExit, match="command line: '--genrations' is no flag; did you mean '--generations'"):
        cli.main(["train", "cifar", "--genrations", "3"])
    assert cli.main(["train", "imagenet"]) == 2
    assert "'imagenet' (choose from" in capsys.readouterr().err


BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
)


def build(kind: str, source: Path, folder: Path) -> Path:
    """Without a network and without build isolation."""
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_wheel_of_the_sdist_trains_the_digits_without_the_repository(tmp_path):
    ignored = shutil.ignore_patterns(".*", "__pycache__", "outputs", "build", "dist", "*.egg-info", "shared")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    with tarfile.open(build("sdist", tmp_path / "source", tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "tests/support").is_dir() and (unpacked / "CHANGELOG.md").is_file()
    wheel = build("wheel", unpacked, tmp_path)

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names
    recipes = {path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.yaml")}
    assert {f"born_again/{path.as_posix()}" for path in recipes} <= names
    assert not any(name.startswith(("tests/", "examples/")) for name in names)

    venv.create(tmp_path / "venv")
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # those that are installed here
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = run(str(python), "-c", "import born_again; print(born_again.__file__)").strip()
    assert Path(where) == site / "born_again/__init__.py"
    command = str(scripts / "born-again")
    tiny = ["--smoke", "--threads", "1", "--max_train_samples", "64", "--max_eval_samples", "32", "--generations", "1"]
    run(command, "train", "cifar", "--dataset", "digits", *tiny, "--output_dir", "out")
    status = json.loads(run(command, "status", "out", "--json"))
    assert [own["status"] for own in status["generations"]] == ["finished", "finished"]
    assert (tmp_path / "out/gen1/README.md").is_file()  # by the templates of the wheel
