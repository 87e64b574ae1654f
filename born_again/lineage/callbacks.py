"""What a runner listens to while one generation is trained: checkpoints, the clock, and requests to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from born_again.lineage.folders import sync_checkpoint
from born_again.lineage.machine import on_first_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on to its processes what the terminal has sent to all of them already: that is one request.
ONE_REQUEST_SECONDS = 2.0


class Interrupted(SystemExit):
    """A training that was asked to stop, and has saved where it is.

    As a SystemExit it ends a program that does not catch it with the exit status of its signal, 143 or 130.

    Args:
        signum: of the signal.
        message: how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interruption:
    """Notes SIGTERM and SIGINT while its block runs; the handlers that were there come back after it.

    A second signal, two seconds or more after the first, raises KeyboardInterrupt at once. Python lets the main thread
    alone handle signals: in another one nothing is installed, and signals do what they did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._processes = PartialState()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for signum, handler in self._before.items():
            # None: a handler that was not installed from Python, and cannot be put back from it.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            if self._processes.is_main_process:
                name = signal.Signals(signum).name
                # Printing and logging may be what was interrupted, and cannot be entered twice.
                os.write(2, f"\n{name}: finishing the step and saving; once more to stop at once.\n".encode())
        elif time.monotonic() - self._since >= ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt

    def agreed(self) -> int | None:
        """The signal that any of the processes got, or None; every process must call this at the same place.

        It costs one number sent between processes, and nothing where there is one.
        """
        if self._processes.num_processes > 1:
            device = self._processes.device
            found = torch.tensor(self.signum or 0, device=device)
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(found.item()) or None
        return self.signum


class SaveAfterEvaluation(TrainerCallback):
    """Puts off a checkpoint that is due with the last step of an epoch until that epoch has been evaluated.

    A training that goes on from there begins with the next epoch: what Trainer does at an epoch's end (its evaluation,
    the plateau schedule, the choice of the best checkpoint) would never be made up for.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if control.should_save and _ends_epoch(state):
            control.should_save, self._is_due = False, True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._is_due:
            control.should_save, self._is_due = True, False
        return control


class KeepRecord(TrainerCallback):
    """Writes the seconds of a training and its checkpoints into its record, whenever there is a new checkpoint.

    So the seconds before a crash are counted. The files of the checkpoint are made to survive a loss of power.

    Args:
        checkpoint_dir: of the generation.
        seconds: of its training in runs before this one.
        keep: called with the fields of the record on every process, after every checkpoint.
    """

    def __init__(self, checkpoint_dir: Path, seconds: float, keep: Callable[..., None]) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.before = seconds
        self.keep = keep
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of training, over all of its starts."""
        return round(self.before + time.perf_counter() - self._start, 3)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # each one has written its own part
        checkpoint = self.checkpoint_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        on_first_process(lambda: sync_checkpoint(checkpoint))
        self.keep(seconds=self.seconds, checkpoints=checkpoint_names(self.checkpoint_dir))


class StopAndSave(TrainerCallback):
    """Ends a training with a checkpoint, soon after a signal: at the end of the step on every process alike.

    After the last step of an epoch that is where the epoch has been evaluated, for the reason of
    `SaveAfterEvaluation`. After the last step of all there is nothing to go on with, and the training ends as it does.
    It must be the last callback of its trainer, since it leaves in on_save.

    Args:
        interruption: notes the signals.
        message: how to go on.

    Raises:
        Interrupted: once the checkpoint is written.
    """

    def __init__(self, interruption: Interruption, message: str) -> None:
        self.interruption = interruption
        self.message = message
        self._signum: int | None = None
        self._leaves = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        is_last = state.global_step >= state.max_steps
        self._signum = None if is_last else self.interruption.agreed()
        if self._signum is not None and not _ends_epoch(state):
            control.should_save = self._leaves = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._signum is not None:
            control.should_save = self._leaves = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not by control.should_training_stop: what Trainer does at its end is for a training that is finished, and
        # would delete this checkpoint where the best one alone is kept.
        if self._leaves:
            name = signal.Signals(self._signum).name
            raise Interrupted(self._signum, f"{name} after step {state.global_step}: {self.message}")


def checkpoint_names(folder: Path) -> list[str]:
    """The checkpoints of a generation on disk, oldest first."""
    found = [path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda name: int(name.rpartition("-")[2]))


def _ends_epoch(state: TrainerState) -> bool:
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps
