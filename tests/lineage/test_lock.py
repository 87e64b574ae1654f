"""A folder is held by one process, and by none that is gone."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from born_again.lineage import lock
from born_again.lineage.lock import FolderLock
from born_again.lineage.manifest import LineageError

posix_only = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")

# lock.py alone, without importing torch.
HOLDER = """
import importlib, sys, types
package = types.ModuleType("born_again"); package.__path__ = [sys.argv[2]]; sys.modules["born_again"] = package
with importlib.import_module("born_again.lineage.lock").FolderLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A second process that holds tmp_path/out."""
    package = os.path.dirname(os.path.dirname(lock.__file__))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out"), package],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_lock_is_there_while_it_is_held_and_says_by_whom(tmp_path):
    folder = tmp_path / "a" / "out"
    with FolderLock(folder):
        holder = json.loads((folder / ".lineage.lock").read_text())
        assert holder["pid"] == os.getpid() and holder["host"] and holder["command"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", holder["since"])
    assert list(folder.iterdir()) == []
    with FolderLock(folder):
        pass


def test_an_error_in_the_block_lets_go(tmp_path):
    with pytest.raises(KeyboardInterrupt), FolderLock(tmp_path):
        raise KeyboardInterrupt
    with FolderLock(tmp_path):
        pass


def test_it_is_not_re_entrant(tmp_path):
    message = f"output_dir: .* is in use by process {os.getpid()} on .* since .*; wait for it or use another"
    with FolderLock(tmp_path) as held:
        with pytest.raises(LineageError, match=message), FolderLock(tmp_path):
            pass
        with pytest.raises(LineageError, match=message), held:
            pass
        assert (tmp_path / ".lineage.lock").exists()


@posix_only
def test_a_second_process_is_told_who_holds_it(tmp_path, holder):
    with pytest.raises(LineageError, match=f"is in use by process {holder.pid} on .* since 20"):
        FolderLock(tmp_path / "out").__enter__()
    holder.communicate("")
    with FolderLock(tmp_path / "out"):
        pass


@posix_only
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / ".lineage.lock").exists()
    with FolderLock(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / ".lineage.lock").read_text())["pid"] == os.getpid()


FORKING_HOLDER = """
import importlib, os, sys, time, types
package = types.ModuleType("born_again"); package.__path__ = [sys.argv[2]]; sys.modules["born_again"] = package
with importlib.import_module("born_again.lineage.lock").FolderLock(sys.argv[1]):
    if os.fork() == 0:
        print("held", flush=True)
        time.sleep(60)  # as the workers of a DataLoader, which look every five seconds whether the run still lives
    sys.stdin.read()
"""


@posix_only
def test_workers_of_a_killed_process_do_not_hold_the_lock(tmp_path):
    package = os.path.dirname(os.path.dirname(lock.__file__))
    holder = subprocess.Popen(
        [sys.executable, "-c", FORKING_HOLDER, str(tmp_path), package],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LineageError, match=f"is in use by process {holder.pid} "), FolderLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.killpg(holder.pid, 0)  # the worker still runs
        with FolderLock(tmp_path):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


@posix_only
def test_a_forked_process_that_leaves_the_block_does_not_release_the_lock(tmp_path):
    with FolderLock(tmp_path) as held:
        worker = os.fork()
        if worker == 0:
            try:
                held.__exit__(None, None, None)
            finally:
                os._exit(0)
        assert os.waitpid(worker, 0)[1] == 0
        with pytest.raises(LineageError, match=f"is in use by process {os.getpid()} "), FolderLock(tmp_path):
            pass


@posix_only
def test_a_file_that_its_holder_has_deleted_is_no_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it, the holder may have left."""
    flock, first = lock.fcntl.flock, []

    def leave_in_between(descriptor, operation):
        if not first:
            first.append(True)
            (tmp_path / ".lineage.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", leave_in_between)
    with FolderLock(tmp_path):
        with pytest.raises(LineageError, match="in use"), FolderLock(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00", "[" * 4000])
def test_a_holder_that_has_not_yet_written_who_it_is(tmp_path, content):
    with FolderLock(tmp_path):
        (tmp_path / ".lineage.lock").write_text(content)
        with pytest.raises(LineageError, match="is in use by another process; wait for it"), FolderLock(tmp_path):
            pass


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # chmod would not stop root
        patch.setattr(lock.os, "open", refuse)
        with pytest.raises(LineageError, match=r"cannot be written \(Permission denied\), expected a folder"):
            FolderLock(tmp_path).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(LineageError, match=r"output_dir: .*file cannot be written \(File exists\)"):
        FolderLock(tmp_path / "file").__enter__()


@posix_only
def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".lineage.lock").symlink_to(tmp_path / "precious.txt")
    with pytest.raises(LineageError, match="cannot be written"):
        FolderLock(folder).__enter__()
    assert (tmp_path / "precious.txt").read_text() == "mine"


@posix_only
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with FolderLock(tmp_path):
        pass
    assert "the file system has no locks" in caplog.text and "one run at a time" in caplog.text


def test_a_system_without_locks_has_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with FolderLock(tmp_path):
        with pytest.raises(LineageError, match=r"is in use by process .* If that process is gone, delete .*\.lock"):
            FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        pass
