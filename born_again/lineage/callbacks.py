"""Trainer callbacks of a lineage: checkpoints are recorded, and SIGTERM or SIGINT stops a training at a checkpoint."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from born_again.lineage.folders import sync_checkpoint
from born_again.lineage.machine import on_first_process
from born_again.training.background_save import Writer

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher forwards to its processes a signal that the terminal has already sent to all of them: one request.
SIGNAL_REPEAT_SECONDS = 2.0
AGREE_EVERY = 8  # steps, on several processes: to agree costs an all-reduce


class Interrupted(SystemExit):
    """A training was stopped by a signal, after it saved a checkpoint.

    It is a SystemExit: uncaught, it ends the program with the exit status of its signal, 143 or 130.

    Args:
        signum: of the signal.
        message: how to resume.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """A context manager that records SIGTERM and SIGINT; on exit it restores the previous handlers.

    A second signal, two seconds or more after the first, raises KeyboardInterrupt at once. Python handles signals in
    the main thread only: in another thread nothing is installed.

    Args:
        names: of more signals to record, such as SIGUSR1, which schedulers send before they end a job.

    Raises:
        ValueError: a name that is no signal, or one that cannot be handled.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        for name in names:
            if name in ("SIGKILL", "SIGSTOP") or not isinstance(getattr(signal, name, None), signal.Signals):
                raise ValueError(
                    f"stop_signals: got {name!r}, expected signals that a program can handle, such as SIGUSR1."
                )
        self.signals = (*SIGNALS, *(signal.Signals[name] for name in names))
        self.signum: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._processes = PartialState()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in self.signals}
        return self

    def __exit__(self, *exception: Any) -> None:
        for signum, handler in self._before.items():
            # None: a handler that was not installed from Python, and cannot be restored from it.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            if self._processes.is_main_process:
                name = signal.Signals(signum).name
                # Not print or logging, which are not reentrant and may be what was interrupted.
                os.write(2, f"\n{name}: finishing the step and saving; once more to stop at once.\n".encode())
        elif time.monotonic() - self._since >= SIGNAL_REPEAT_SECONDS:
            raise KeyboardInterrupt

    def on_any_process(self) -> int | None:
        """The signal that any of the processes received, or None; every process must call this at the same place.

        It costs an all-reduce of one number; nothing with one process.
        """
        found = _highest(self.signum or 0)
        if not found:
            return None  # also where one has arrived meanwhile, of which the others learn at the next call
        self.signum = found
        return found


class SaveByTime(TrainerCallback):
    """Saves a checkpoint when a time has passed since the last one, and after the last step.

    With save_strategy "best" Trainer decides at every evaluation alone: what is due then is saved after the next step,
    and the last step only where it is the best.

    Args:
        minutes: between two checkpoints, at least.

    Raises:
        ValueError: minutes that are not above 0.
    """

    def __init__(self, minutes: float) -> None:
        if not (math.isfinite(minutes) and minutes > 0):
            raise ValueError(
                f"save_minutes: got {minutes!r}, expected a finite number above 0; to save at other moments give "
                "save_strategy, such as 'epoch'."
            )
        self.seconds = 60 * minutes
        self._since = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps or self._is_due(state.global_step):
            control.should_save = True
        return control

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def _is_due(self, step: int) -> bool:
        if PartialState().num_processes > 1 and step % AGREE_EVERY:
            return False
        return bool(_highest(int(time.monotonic() - self._since >= self.seconds)))


class SaveAfterEvaluation(TrainerCallback):
    """Delays a checkpoint that is due at the last step of an epoch until that epoch has been evaluated.

    A training resumed from such a checkpoint begins with the next epoch, so it would skip what Trainer does at the end
    of the epoch: the evaluation, the plateau schedule, the choice of the best checkpoint.
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


class RecordProgress(TrainerCallback):
    """Records the training seconds and the checkpoints of a generation after every checkpoint.

    So the seconds before a crash are counted. The files of the checkpoint are synced to the disk. An error of the
    writer is raised at the end of the next step.

    Args:
        checkpoint_dir: of the generation.
        seconds: of training in earlier runs.
        update: called on every process with the fields of the record, after every checkpoint.
        writer: of the checkpoints, in which syncing and recording come after the writing.
    """

    def __init__(
        self, checkpoint_dir: Path, seconds: float, update: Callable[..., None], writer: Writer | None = None
    ) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.before = seconds
        self.update = update
        self.writer = Writer(in_background=False) if writer is None else writer
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time over all runs, in seconds."""
        return round(self.before + time.perf_counter() - self._start, 3)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.writer.check()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process has written its files
        checkpoint, seconds = self.checkpoint_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", self.seconds

        def record() -> None:
            on_first_process(lambda: sync_checkpoint(checkpoint))
            self.update(seconds=seconds, checkpoints=checkpoint_names(self.checkpoint_dir))

        self.writer.submit(record)


class StopAndSave(TrainerCallback):
    """Stops a training with a checkpoint at the end of the step in which a signal arrived, on all processes alike.

    At the last step of an epoch it waits for the evaluation, see `SaveAfterEvaluation`. After the last step of the
    training it does nothing. It must be the last callback of its trainer, since it raises in on_save.

    Args:
        signals: records the signals.
        message: how to resume.
        writer: of the checkpoint, which is waited for.

    Raises:
        Interrupted: once the checkpoint is written.
    """

    def __init__(self, signals: StopSignals, message: str, writer: Writer) -> None:
        self.signals = signals
        self.message = message
        self.writer = writer
        self._signum: int | None = None
        self._stops_on_save = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        is_last = state.global_step >= state.max_steps
        self._signum = None if is_last else self.signals.on_any_process()
        if self._signum is not None and not _ends_epoch(state):
            control.should_save = self._stops_on_save = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._signum is not None:
            control.should_save = self._stops_on_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not by control.should_training_stop: Trainer would then finish as if the training were complete, and delete
        # this checkpoint where only the best one is kept.
        if self._stops_on_save:
            self.writer.wait()
            name = signal.Signals(self._signum).name
            raise Interrupted(self._signum, f"{name} after step {state.global_step}: {self.message}")


def checkpoint_names(folder: Path) -> list[str]:
    """Names of the checkpoints of a generation on disk, oldest first."""
    found = [path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda name: int(name.rpartition("-")[2]))


def _highest(value: int) -> int:
    """The highest value of any process; every process must call it at the same place."""
    processes = PartialState()
    if processes.num_processes == 1:
        return value
    found = torch.tensor(value, device=processes.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found.item())


def _ends_epoch(state: TrainerState) -> bool:
    return float(state.epoch).is_integer() or state.global_step >= state.max_steps
