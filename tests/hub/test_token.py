"""The token is sent to the Hub as the header that it is for, and is in nothing else that a run leaves."""

import base64
import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from secret_search import places_of

SCRIPT = Path(__file__).parents[2] / "examples" / "run_cifar.py"
SECRET = "hf_aSecretThatNobodyShouldSee"


def train(hub: HubServer, work: Path, *words: str, token: str | None, launcher: tuple[str, ...] = ()):
    """A tiny lineage in a new process that writes nowhere but below `work`."""
    tiny = ["--smoke", "--generations", "1", "--max_train_samples", "64", "--max_eval_samples", "32"]
    tiny += ["--num_train_epochs", "1", "--threads", "1", "--output_dir", "out"]
    folders = {"HOME": work / "home", "TMPDIR": work / "tmp", "XDG_CACHE_HOME": work / "home" / "cache"}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    environment = hub.environment(token=token, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    environment |= {name: str(path) for name, path in folders.items()}
    # As loud as it gets: with HF_DEBUG huggingface_hub prints its requests.
    environment |= {"HF_DEBUG": "1", "TRANSFORMERS_VERBOSITY": "debug"}
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *tiny, "--push_to_hub", "--hub_namespace", "born-again", *words],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_everything_uploaded_logged_and_written_is_without_the_token(tmp_path, way):
    with HubServer(tmp_path / "hub_home") as hub:
        by_flag = way == "flag"
        done = train(
            hub,
            tmp_path,
            *("--keep_checkpoints", "True", "--save_strategy", "epoch", "--log_level", "debug"),
            *(("--hub_token", hub.token) if by_flag else ()),
            token=None if by_flag else hub.token,
            launcher=("-m", "accelerate.commands.launch"),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert {request.token for request in hub.requests if request.endpoint == "commit"} == {hub.token}
        assert len([key for key in hub.store.repositories if key[0] == "model"]) == 2
        # There is something to look into: a pickle of the training arguments in each checkpoint.
        assert len(list((tmp_path / "out" / "checkpoints").rglob("training_args.bin"))) == 2
        assert places_of(hub.token, tmp_path) == []
        assert hub.token not in done.stdout + done.stderr
        assert hub.leaks(hub.token) == []
        names = {name for repository in hub.store.repositories.values() for name in repository.at("main").files}
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "defer"),
    [(SECRET, ()), (f"{SECRET}\n", ()), (f"{SECRET}\n", ("--hub_defer",)), (f"{SECRET} é", ())],
    ids=["wrong", "newline", "newline and later", "no ASCII"],
)
def test_an_error_is_told_without_the_token(tmp_path, token, defer):
    with HubServer(tmp_path / "hub_home") as hub:
        done = train(hub, tmp_path, "--hub_token", token, *defer, token=None)
        assert done.returncode == 1
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert places_of(SECRET, tmp_path) == [] and hub.leaks(SECRET) == []


def test_the_search_finds_what_is_packed(tmp_path):
    (tmp_path / "sub").mkdir()
    torch.save({"token": SECRET}, tmp_path / "sub" / "args.bin")
    (tmp_path / "clean.txt").write_text(SECRET[:-1])
    (tmp_path / "plain.txt").write_text(f"a{SECRET}b")
    with zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.gz", gzip.compress(SECRET.encode()))
    (tmp_path / "encoded.json").write_text(base64.b64encode(f"ab{SECRET}".encode()).decode())
    os.symlink(SECRET, tmp_path / "link")
    (tmp_path / f"named{SECRET}").touch()
    found = [os.path.basename(place) for place in places_of(SECRET, tmp_path)]
    assert sorted(found) == ["args.bin", "encoded.json", "link", f"named{SECRET}", "packed.bin", "plain.txt"]
