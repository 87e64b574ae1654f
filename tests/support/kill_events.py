"""What a child of the kill harness does, counted, so that it can be killed at any of it."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import TrainerCallback


@dataclass(frozen=True)
class Plan:
    """When a start is killed: at the `number`-th event (of `category`, or of all), or after `seconds`, or never."""

    mode: str = "never"
    number: int = 0
    category: str | None = None
    seconds: float = 0.0
    half: bool = False  # leaves the file that is being written empty or half written


class Events:
    """Counts what a child does, tells the parent by shared memory, and kills the child when its time has come."""

    def __init__(self, folder: Path, plan: Plan, board: mmap.mmap) -> None:
        self.folder, self.plan, self.board = str(folder), plan, board
        self.seen: list[str] = []
        self.generation = ""
        self.deletes = ""  # the folder that is being deleted
        self.is_named = False  # weights have got their name, and their record is not yet known to be written
        self.entered = False

    def watch(self) -> None:
        sys.addaudithook(self._audit)
        # These write in C++ and Rust, unseen by the hook. A path is the second argument of both.
        torch.save = self._watched(torch.save, "torch.save")
        safetensors.torch.serialize_file = self._watched(safetensors.torch.serialize_file, "safetensors")

    def tick(self, what: str, category: str) -> bool:
        """Notes an event; whether it is the last one."""
        self.seen.append(category)
        line = f"{category}\t{self.generation}\t{what}".encode()[: len(self.board) - 1]
        self.board[: len(line) + 1] = line + b"\0"
        plan, counted = self.plan, self.seen.count(category) if self.plan.category else len(self.seen)
        return plan.number == counted and plan.category in (None, category)

    def reach(self, what: str, category: str = "training") -> None:
        """An event that is no writing."""
        self.is_named = False
        if self.tick(what, category):
            die()

    def _audit(self, event: str, args: tuple) -> None:
        if event not in _AUDITED or self.entered:
            return
        self.entered = True
        try:
            path = _AUDITED[event](args)
            if path is None or not (path == self.folder or path.startswith(f"{self.folder}/")):
                return
            place = path[len(self.folder) + 1 :]
            if event == "shutil.rmtree":
                self.deletes = place
            if self.tick(f"{event} {place}", self._category(event, place)):
                if event == "open" and self.plan.half:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
                die()
        finally:
            self.entered = False

    def _watched(self, write: Callable, name: str) -> Callable:
        def watched(content: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            place = os.path.relpath(path, self.folder) if isinstance(path, str | os.PathLike) else "memory"
            if self.tick(f"{name} {place}", self._category(name, place)):
                if self.plan.half:
                    write(content, path, *args, **kwargs)
                    os.truncate(path, os.path.getsize(path) // 2)
                die()
            return write(content, path, *args, **kwargs)

        return watched

    def _category(self, event: str, place: str) -> str:
        if event in ("shutil.rmtree", "os.remove", "os.rmdir") and place.startswith("checkpoints"):
            return "rotation" if "/checkpoint-" in self.deletes else "deletion"
        if place.startswith((".lineage.json", "lineage.json")) or not place:
            return "recording" if self.is_named else "manifest"
        if place.startswith(".lineage.lock"):
            return "lock"
        if event == "os.rename":
            self.is_named = place.startswith("gen")
            return "renaming"
        return {"checkpoints": "checkpoint", "ensemble": "ensemble"}.get(place.split("/")[0], "weights")


def _at(path: Any, descriptor: int = -1) -> str | None:
    """A path that may be relative to an open folder, as rmtree's are."""
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    folder = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor != -1 else os.getcwd()
    return os.path.join(folder, os.fsdecode(path))


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_AUDITED: dict[str, Callable[[tuple], str | None]] = {
    "open": lambda args: _at(args[0]) if args[2] & _WRITING else None,
    "os.mkdir": lambda args: _at(args[0], args[2]),
    "os.rename": lambda args: _at(args[1], args[3]),
    "os.remove": lambda args: _at(*args),
    "os.rmdir": lambda args: _at(*args),
    "shutil.rmtree": lambda args: _at(args[0]),
    "os.truncate": lambda args: _at(args[0]),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def told(events: Events) -> TrainerCallback:
    """A callback for which every moment that Trainer tells of is an event."""

    def tell(name: str) -> Callable:
        category = "evaluation" if name in ("on_prediction_step", "on_evaluate") else "training"
        return lambda self, args, state, *_, **kwargs: events.reach(f"{name} at step {state.global_step}", category)

    names = [name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_init_end"]
    return type("Told", (TrainerCallback,), {name: tell(name) for name in names})()
