"""Checkpoints that are copied at the step and written in the background while training goes on."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


class Writer:
    """A context manager that runs jobs in one thread of its own, one after the other.

    After a job that raised, the later ones are skipped, and the error is raised by the next call. On exit it waits
    for all jobs; where the block raised another error, that of a job is logged.

    Args:
        in_background: False runs every job at once, in the caller's thread.
    """

    def __init__(self, in_background: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: list[Future[None]] = []
        self._has_failed = False

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        try:
            self.check()
        except Exception as own:
            if error is None:
                raise
            logger.error("A checkpoint was not written: %s: %s", type(own).__name__, own)

    @property
    def in_background(self) -> bool:
        """Whether jobs run in a thread of their own."""
        return self._pool is not None

    def submit(self, job: Callable[[], None]) -> None:
        """Runs a job after those submitted before it."""
        if self._pool is None:
            job()
            return
        self.check()
        self._pending.append(self._pool.submit(self._run, job))

    def check(self) -> None:
        """Raises the error of a job that has ended, if there is one."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Waits until all jobs have ended.

        Raises:
            Exception: what a job raised.
        """
        while self._pending:
            self._pending.pop(0).result()

    def _run(self, job: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            job()
        except BaseException:
            self._has_failed = True
            raise


class BackgroundSaveMixin(Trainer):
    """Trainer whose checkpoints may be written in the background; without a writer it saves as Trainer does.

    At the step weights and optimizer state are copied, on CUDA to pinned memory without waiting for the device, and
    the states of random number generators, which are small, are written. A thread then has Trainer write the rest, in
    its order: trainer_state.json, without which a checkpoint is not complete, comes last, and older checkpoints are
    deleted after it. One checkpoint is written at a time; the next one waits. Main memory holds one more copy of
    weights and optimizer state meanwhile. Several processes, students in shards, and fp16, whose scaler is on the
    device, save as Trainer does.

    Attributes:
        checkpoint_writer: set by who runs the training, who waits for it before the files are used.
    """

    checkpoint_writer: Writer | None = None
    is_sharded: bool

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        writer = self.checkpoint_writer
        is_whole = self.args.world_size == 1 and not self.is_sharded
        can_be_copied = is_whole and self.accelerator.scaler is None and trial is None
        if writer is None or not writer.in_background or not can_be_copied:
            super()._save_checkpoint(model, trial)
            return
        writer.wait()
        self.store_flos()
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        os.makedirs(folder, exist_ok=True)
        self._save_rng_state(folder)
        frozen, copied = self._frozen()

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            frozen._save_checkpoint(frozen.model, trial)
            self.state.best_model_checkpoint = frozen.state.best_model_checkpoint

        writer.submit(write)

    def _frozen(self) -> tuple[Any, torch.cuda.Event | None]:
        """A copy of this trainer for writing a checkpoint of this moment, and what tells when it is complete."""
        frozen = copy.copy(self)
        frozen.checkpoint_writer = None
        frozen.args, frozen.control = copy.copy(self.args), copy.copy(self.control)
        frozen.state = copy.copy(self.state)
        frozen.state.log_history = list(self.state.log_history)
        frozen.state.stateful_callbacks = copy.deepcopy(self.state.stateful_callbacks)
        callbacks = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
        frozen.callback_handler = SimpleNamespace(callbacks=copy.deepcopy(callbacks))
        student = getattr(self.model, "_orig_mod", self.model)
        weights, optimizer = _copied([student.state_dict(), self.optimizer.state_dict()])
        scheduler = copy.deepcopy(self.lr_scheduler.state_dict())

        # Not Trainer's, which keeps warnings of the whole process back while it saves the schedule.
        def save_optimizer_and_scheduler(folder: str) -> None:
            torch.save(optimizer, os.path.join(folder, OPTIMIZER_NAME))
            torch.save(scheduler, os.path.join(folder, SCHEDULER_NAME))

        frozen._save = functools.partial(frozen._save, state_dict=weights)
        frozen._save_optimizer_and_scheduler = save_optimizer_and_scheduler
        frozen._save_rng_state = lambda folder: None
        copied = None
        if self.args.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return frozen, copied

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Whatever ended the training: Trainer now loads the best checkpoint, or deletes the others.
        if self.checkpoint_writer is not None and self.args.metric_for_best_model is not None:
            self.checkpoint_writer.wait()
        return super()._finalize_training(*args, **kwargs)


def _copied(states: Any) -> Any:
    """Nested states with every tensor copied to main memory; tensors that are one, as tied weights are, stay one."""
    copies: dict[Any, Tensor] = {}

    def copy_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
        if key not in copies:
            if value.is_cuda:
                there = torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
                copies[key] = there.copy_(value.detach(), non_blocking=True)
            else:
                copies[key] = value.detach().clone()
        return copies[key]

    return tree_map(copy_of, states)
