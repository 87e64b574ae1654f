"""Trackers see one run for each generation, under names that a resumed training goes on with."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from tiny_lineage import Crash, runner
from transformers.integrations import integration_utils

TENSORBOARD = {"report_to": "tensorboard", "logging_steps": 1}


def scalars(folder, tag="train/loss"):
    """Steps and values of a tag as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_a_run_for_each_generation(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    runner(tmp_path / "out", changes=TENSORBOARD).run()
    runs = {path.name: scalars(path) for path in (tmp_path / "out/runs").iterdir()}
    assert runs.keys() == {"gen0", "gen1", "gen2"}
    assert all([step for step, _ in points] == [1, 2, 3, 4, 5, 6] for points in runs.values())
    assert len({tuple(points) for points in runs.values()}) == 3


def test_a_resumed_training_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "whole"))
    runner(tmp_path / "uninterrupted", changes=TENSORBOARD).run()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):  # steps 1 to 4 are logged, the last checkpoint is of step 3
        runner(tmp_path / "out", changes={**TENSORBOARD, "save_steps": 3}, crash=Crash(1, 5)).run()
    runner(tmp_path / "out", changes={**TENSORBOARD, "save_steps": 3}).run()
    for name in ("tiny-words-gen0", "tiny-words-gen1", "tiny-words-gen2"):
        assert scalars(tmp_path / "parts" / name) == scalars(tmp_path / "whole" / name)


class Config(dict):
    def update(self, values, allow_val_change):
        pass


@pytest.fixture
def trackio(monkeypatch):
    """A stand-in for the module; its list of what was called."""
    module, calls = ModuleType("trackio"), []
    module.__spec__ = ModuleSpec("trackio", None)
    module.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    module.init = lambda **arguments: calls.append(arguments)
    module.log = lambda values: calls.append(values["train/global_step"])
    module.finish = lambda: calls.append("finish")
    module.config = Config()
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    return calls


@pytest.mark.parametrize(
    ("given", "project", "names"),
    [
        ({}, "tiny-words", ["tiny-words-gen0", "tiny-words-gen1", "tiny-words-gen2"]),
        ({"project": "mine", "run_name": "first"}, "mine", ["first-gen0", "first-gen1", "first-gen2"]),
    ],
)
def test_trackio_has_a_run_for_each_generation_in_the_project_of_the_lineage(tmp_path, trackio, given, project, names):
    runner(tmp_path, changes={"report_to": "trackio", "logging_steps": 3, **given}, evaluate=lambda model: {}).run()
    begun = [call for call in trackio if isinstance(call, dict)]
    assert [call["name"] for call in begun] == names
    assert {(call["project"], call["group"], call["resume"]) for call in begun} == {(project, "tiny-words", "allow")}
    assert trackio[1:] == [3, 6, 6, "finish", begun[1], 3, 6, 6, "finish", begun[2], 3, 6, 6, "finish"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("born_again.lineage.tracking.find_spec", lambda package: None)
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    with pytest.raises(
        ValueError, match=rf"report_to: got '{name}', which is not.*pip install 'born-again\[{name}\]'"
    ):
        runner(tmp_path, changes={"report_to": name}).run()
