"""--help, exit statuses and errors of the command and the scripts, and shell completion."""

import argparse
import builtins
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from example_scripts import EXAMPLES, load_example

from born_again import cli
from born_again.hub.launch import launch

COMMANDS = next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("run_*.py"))


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_of_a_command(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"] if command is None else [command, "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    if command is not None:
        assert "Exit status: 0" in said and "2 after an error" in said
        assert all(action.help for action in COMMANDS[command]._actions)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        load_example(script).start(["--smoke", "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    groups = [line for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[0] == "options:" and groups[-1] == "All other arguments of transformers.TrainingArguments:"
    shown = [word for line in said.splitlines() if line.startswith("  --") for word in line.split()[:1]]
    flags = [shown.index(name) for name in ("--config", "--generations", "--objective", "--seed,", "--adam_beta1")
             if name in shown]  # fmt: skip
    assert len(flags) > 3 and flags == sorted(flags) and len(shown) == len(set(shown)) > 150
    for flag in ("--flip, --no_flip", "--images_on_gpu, --no_images_on_gpu"):
        assert (flag in said) == (flag.split(",")[0] in " ".join(shown))
    assert "Exit status: 0 when the lineage is finished" in said
    assert "    accelerate launch examples/" + script in said


def test_help_of_a_script_shows_what_the_other_flags_choose(capsys):
    with pytest.raises(SystemExit):
        load_example("run_cifar").start(["--dataset", "digits", "--help"])
    digits = capsys.readouterr().out
    with pytest.raises(SystemExit):
        load_example("run_cifar").start(["--help"])
    cifar = capsys.readouterr().out
    assert "in pixels. [16]" in digits
    assert "in pixels. [32]" in cifar


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (ValueError("batch: got 0"), "ValueError: batch: got 0"),
        (ImportError("no tokenizers"), "ImportError: no tokenizers"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_scripts_print_an_error_as_one_line(raised, status, monkeypatch):
    def start():
        raise raised

    monkeypatch.setattr(sys, "argv", ["run_cifar.py"])
    with pytest.raises(SystemExit) as ended:
        launch(start)
    assert ended.value.code == status
    monkeypatch.setattr(sys, "argv", ["run_cifar.py", "--traceback"])
    with pytest.raises(type(raised)):
        launch(start)


def test_too_little_memory_says_what_to_do():
    def start():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        launch(start)
    assert "smaller --per_device_train_batch_size, with as much more" in raised.value.__notes__[0]


def test_debug_shows_where_an_error_was_raised(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.main(["status", str(tmp_path / "none"), "--debug"]) == 2
    assert "Traceback" in (said := capsys.readouterr().err) and "FileNotFoundError: output_dir: " in said


def test_an_interrupt_has_a_status_of_its_own(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_status", interrupted)
    assert cli.main(["status", "out"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    (tmp_path / "lineage").mkdir()
    code = "import os, sys; from born_again.cli import main; os.close(1); os.dup2(os.open(os.devnull, os.O_RDONLY), 1)"
    pipe = "read, write = os.pipe(); os.dup2(write, 1); os.close(read); os.close(write)"
    command = f"{code}; {pipe}; sys.exit(main(['status', {str(tmp_path / 'lineage')!r}]))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("born-again 0.")


def test_cards_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("born_again.hub.files.render_cards", lambda folder: [tmp_path / "gen0/README.md"])
    assert cli.main(["card", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cards": [str(tmp_path / "gen0/README.md")]}


def test_reports_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("born_again.lineage.status.lineages_in", lambda folder: [tmp_path])
    monkeypatch.setattr("born_again.report.page.write_report", lambda folder: [tmp_path / "report.html"])
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"reports": [str(tmp_path / "report.html")]}


def test_what_is_not_published_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("born_again.hub.publishing.publish_lineage", lambda folder, **settings: {"gen1": "no network"})
    assert cli.main(["publish", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"unpublished": {"gen1": "no network"}}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)

    def completed(*words):
        asked = (
            f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _shtab_born_again; echo "${{COMPREPLY[@]}}"'
        )
        command = ["bash", "-c", f"source {tmp_path / 'completion.sh'}; {asked}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout.split()

    assert completed("born-again", "ev") == ["evaluate"]
    assert completed("born-again", "evaluate", "--max") == ["--max_eval_samples"]


def test_completion_without_its_package(monkeypatch, capsys):
    real = builtins.__import__

    def importing(name, *rest, **kwargs):
        if name == "shtab":
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert cli.main(["completion", "bash"]) == 2
    assert "completion: shtab is not installed; pip install 'born-again[completion]'" in capsys.readouterr().err
