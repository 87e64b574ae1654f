"""A lineage whose checkpoints are written in the background waits for them where it must, and hides no error."""

import time

import pytest
from tiny_lineage import STEPS, hashes, runner, spec
from transformers import TrainerCallback

from born_again.lineage import callbacks
from born_again.lineage import runner as running
from born_again.lineage.folders import sync_checkpoint
from born_again.lineage.manifest import LineageError, Manifest


def test_a_generation_gets_its_name_after_the_last_checkpoint_is_on_the_disk(tmp_path, monkeypatch):
    events, put = [], running.put_in_place

    def late(checkpoint):
        time.sleep(0.3)
        sync_checkpoint(checkpoint)
        events.append(checkpoint.name)

    def put_in_place(partial, folder, sha256):
        events.append(folder.name)
        put(partial, folder, sha256)

    class Ends(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            events.append("end")

    monkeypatch.setattr(callbacks, "sync_checkpoint", late)
    monkeypatch.setattr(running, "put_in_place", put_in_place)
    folder = tmp_path / "out"
    runner(folder, spec=spec(generations=0), crash=Ends()).run()
    # The training ends, and is evaluated, while the last one is written.
    assert events == ["checkpoint-2", "checkpoint-4", "end", f"checkpoint-{STEPS}", "gen0"]
    record = Manifest.read(folder).record(0)
    assert record["status"] == "finished" and record["seconds"] > 0.3


@pytest.mark.parametrize("at", [2, STEPS])
def test_an_error_of_the_writing_ends_the_run_and_the_same_command_goes_on(tmp_path, monkeypatch, at):
    runner(tmp_path / "whole", spec=spec(generations=0)).run()

    def fail(checkpoint):
        if checkpoint.name == f"checkpoint-{at}":
            raise OSError(28, "No space left on device", str(checkpoint))
        sync_checkpoint(checkpoint)

    folder = tmp_path / "out"
    with (
        monkeypatch.context() as patch,
        pytest.raises(LineageError, match="no space left on device: checkpoints.gen0.checkpoint-"),
    ):
        patch.setattr(callbacks, "sync_checkpoint", fail)
        runner(folder, spec=spec(generations=0)).run()
    assert not (folder / "gen0").exists() and Manifest.read(folder).record(0)["status"] == "training"
    runner(folder, spec=spec(generations=0)).run()
    assert hashes(folder) == hashes(tmp_path / "whole")
