"""Publishing beside a training that goes on, whatever the Hub does."""

import logging
import math
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from lineage_folders import lineage, network

from born_again.hub import publishing
from born_again.hub.client import HubError
from born_again.hub.files import HubSettings, unpublished
from born_again.hub.publishing import BackgroundPublisher, HubPublisher, publish_lineage
from born_again.lineage.manifest import Manifest
from born_again.report.figures import draw_curve

SETTINGS = HubSettings("born-again")
PATIENCE = 20.0  # seconds, of what takes one


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return lineage(tmp_path_factory.mktemp("made") / "out", [network("lstm", seed) for seed in range(2)])


@pytest.fixture
def manifest(made, tmp_path):
    """Of a lineage whose student is still in training."""
    manifest = Manifest.read(shutil.copytree(made, tmp_path / "out"))
    manifest.update(1, status="training")
    manifest.save()
    return manifest


@pytest.fixture
def publisher():
    """Whatever a test leaves running ends with it."""
    publisher = BackgroundPublisher(SETTINGS)
    yield publisher
    publisher.detach()
    if publisher._thread is not None:
        publisher._thread.join(PATIENCE)
        assert not publisher._thread.is_alive()


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def end_training(manifest, publisher) -> None:
    manifest.update(1, status="finished")
    manifest.save()
    publisher.wake()


def saved(manifest) -> dict[str, str]:
    return unpublished(Manifest.read(manifest.path.parent))


def test_each_generation_is_published_when_it_is_finished(logged_in_hub, manifest, publisher):
    publisher.start(manifest)
    until(lambda: saved(manifest) == {})
    assert [id for _, id in logged_in_hub.store.repositories] == ["born-again/tiny-gen0"]
    end_training(manifest, publisher)
    until(lambda: manifest.generations[1]["hub"] and manifest.generations[1]["hub"]["status"] == "published")
    assert publisher.finish() == {} == saved(manifest)


def test_a_training_does_not_wait_for_a_slow_hub(logged_in_hub, manifest, publisher):
    publisher.start(manifest)
    logged_in_hub.fail(lambda request: request.endpoint == "commit", "slow", seconds=0.7, times=2)
    began = time.monotonic()
    end_training(manifest, publisher)
    manifest.update(1, seconds=3.0)
    manifest.save()
    assert time.monotonic() - began < 0.4
    assert publisher.finish() == {} and Manifest.read(manifest.path.parent).generations[1]["seconds"] == 3.0
    assert time.monotonic() - began > 0.7


def test_a_hub_that_is_down_at_first(logged_in_hub, manifest, caplog):
    logged_in_hub.fail(lambda request: True, "drop", times=math.inf)
    publisher = BackgroundPublisher(SETTINGS, defer=True)
    with caplog.at_level(logging.WARNING, "born_again"):
        publisher.start(manifest)
        until(lambda: "gen0" in saved(manifest) and saved(manifest)["gen0"] != "not tried yet")
    assert (
        "cannot be reached" in caplog.text and "Training continues, and publishing is tried after each" in caplog.text
    )
    logged_in_hub.clear_faults()
    end_training(manifest, publisher)
    assert publisher.finish() == {} == saved(manifest)


def test_a_hub_that_stays_down(logged_in_hub, manifest):
    publisher = BackgroundPublisher(SETTINGS)
    publisher.start(manifest)
    until(lambda: saved(manifest) == {})
    logged_in_hub.fail(lambda request: True, "500", times=math.inf)
    end_training(manifest, publisher)
    left = publisher.finish()
    assert left == saved(manifest) and list(left) == ["gen1", "collection"] and "500" in left["gen1"]
    logged_in_hub.clear_faults()
    assert publish_lineage(manifest.path.parent) == {}


def test_the_end_tries_once_more(logged_in_hub, manifest, publisher):
    manifest.update(1, status="finished")
    logged_in_hub.fail("add-collection-item", "500")
    publisher.start(manifest)
    until(lambda: "500" in saved(manifest).get("collection", ""))
    assert publisher.finish() == {} == saved(manifest)


def test_without_defer_a_hub_that_says_no_is_an_error_before_the_training(logged_in_hub, manifest):
    before = manifest.path.read_bytes()
    publisher = BackgroundPublisher(HubSettings("nobody"))
    with pytest.raises(HubError, match="got 'nobody', expected 'tester' .* publish later, with --hub_defer"):
        publisher.start(manifest)
    assert manifest.path.read_bytes() == before and logged_in_hub.store.repositories == {}
    publisher.detach()  # as the runner does


@pytest.mark.parametrize("name", ["generation_files", "unpublished"])
def test_a_mistake_of_ours_ends_no_training(logged_in_hub, manifest, publisher, monkeypatch, caplog, name):
    failed = threading.Event()

    def fail(*arguments):
        failed.set()
        raise ZeroDivisionError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(publishing, name, fail)
        publisher.start(manifest)
        assert failed.wait(PATIENCE)
        until(lambda: "a mistake" in caplog.text)
    assert publisher._thread.is_alive()
    if name == "generation_files":
        until(lambda: saved(manifest) == {"gen0": "a mistake. Try again later."})
        until(lambda: "ZeroDivisionError is not an error of the Hub; it was raised in" in caplog.text)
    end_training(manifest, publisher)
    assert publisher.finish() == {}


def test_who_has_left_writes_no_more(logged_in_hub, manifest, publisher):
    """The next run may be writing the same lineage.json."""
    logged_in_hub.fail("commit", "slow", seconds=0.5)
    publisher.start(manifest)
    until(lambda: "commit" in logged_in_hub.made())
    publisher.detach()
    content = manifest.path.read_bytes()
    publisher._thread.join(PATIENCE)
    assert manifest.path.read_bytes() == content and saved(manifest) == {"gen0": "the upload was cut short"}
    assert publish_lineage(manifest.path.parent) == {}
    repository = logged_in_hub.store.repositories["model", "born-again/tiny-gen0"]
    assert [commit.title for commit in repository.history()] == ["Generation 0 of tiny", "initial commit"]


def test_waiting_for_the_end_can_be_stopped(logged_in_hub, manifest, publisher):
    logged_in_hub.fail("commit", "slow", seconds=1.5)
    publisher.start(manifest)
    until(lambda: "commit" in logged_in_hub.made())
    began = time.monotonic()
    assert publisher.finish(stop=lambda: 15) == {"gen0": "the upload was cut short"}
    assert time.monotonic() - began < 1.0


def test_uploads_in_the_background_draw_no_bars(logged_in_hub, manifest, publisher, capsys):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()  # which another test may have changed
    publisher.start(manifest)
    until(lambda: saved(manifest) == {})
    assert publisher.finish() == {} and "model.safetensors" not in capsys.readouterr().err
    HubPublisher(manifest, SETTINGS)  # and in the foreground they may be drawn again
    assert not are_progress_bars_disabled()


def test_the_same_publisher_can_start_again(logged_in_hub, manifest, publisher):
    publisher.start(manifest)
    assert publisher.finish() == {}
    manifest.update(1, status="finished")
    publisher.start(manifest)
    until(lambda: saved(manifest) == {})
    assert publisher.finish() == {}


@pytest.mark.slow
def test_an_upload_does_not_keep_a_program_from_ending(hub, manifest):
    """Neither one of weights nor one of two files, which huggingface_hub gives to threads that are waited for."""
    folder = manifest.path.parent
    assert draw_curve([{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}], folder / "gen0/training.png")
    hub.fail("lfs-upload", "slow", seconds=60)
    code = f"""
    import time
    from pathlib import Path
    from born_again.lineage.manifest import Manifest
    from born_again.hub.files import HubSettings
    from born_again.hub.publishing import BackgroundPublisher
    publisher = BackgroundPublisher(HubSettings("born-again"))
    publisher.start(Manifest.read(Path({str(folder)!r})))
    while Manifest.read(Path({str(folder)!r})).generations[0]["hub"] is None:
        time.sleep(0.05)
    time.sleep(1.0)
    print(time.time())
    raise SystemExit(143)
    """
    done = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**hub.environment(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    told, _ = done.communicate(timeout=55)
    assert done.returncode == 143 and "lfs-upload" in hub.made()
    assert time.time() - float(told) < 10 and saved(manifest)["gen0"] == "the upload was cut short"
