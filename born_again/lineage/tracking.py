"""Experiment trackers of a lineage: one run for each generation, under a name that a resumed training finds again."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

if TYPE_CHECKING:
    from born_again.training.trainer import BornAgainTrainer

RUNS_NAME = "runs"  # in the lineage's folder: a folder of TensorBoard event files for each generation
_LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"  # of transformers
# Tracker -> any of the packages that transformers takes for it, and our extra.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}


def check_trackers(args: TrainingArguments) -> None:
    """Refuses a tracker that is not installed, before any work.

    Raises:
        ValueError: report_to names it.
    """
    for name, packages in _PACKAGES.items():
        if name in args.report_to and not any(find_spec(package) for package in packages):
            raise ValueError(
                f"report_to: got {name!r}, which is not installed, expected an installed tracker or 'none'; "
                f"pip install 'born-again[{name}]'."
            )


def name_runs(
    trainer: BornAgainTrainer, lineage: str, generation: int, output_dir: Path, checkpoint: Path | None
) -> None:
    """Has the trackers of a generation's trainer write a run of its own, which its resumed training goes on with.

    The run is called LINEAGE-genK, or RUN_NAME-genK where run_name is given, in the project named after the lineage
    unless one is given. TensorBoard writes to OUTPUT_DIR/runs/genK, or to a folder of the run's name in
    TENSORBOARD_LOGGING_DIR where that is set; what an interrupted training wrote there after its last checkpoint is
    hidden. In trackio, which appends, these steps are there twice.

    Args:
        trainer: before its training; its arguments' run_name and project are set.
        lineage: name.
        generation: index.
        output_dir: the lineage's folder.
        checkpoint: that the training goes on from, None for a new one.
    """
    args, suffix = trainer.args, f"-gen{generation}"
    given = (args.run_name or lineage).removesuffix(f"-gen{generation - 1}")  # of arguments that generations share
    args.run_name = given if given.endswith(suffix) else given + suffix
    if args.project == type(args).__dataclass_fields__["project"].default:
        args.project = lineage
    if not trainer.is_world_process_zero():
        return
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is None:
            folder = output_dir / RUNS_NAME / f"gen{generation}"
            if os.environ.get(_LOGGING_DIR):
                folder = Path(os.environ[_LOGGING_DIR]).expanduser() / args.run_name
            callback.logging_dir = str(folder)
            callback.tb_writer = callback._SummaryWriter(str(folder), purge_step=step + 1)
        elif type(callback).__name__ == "TrackioCallback" and not isinstance(callback._trackio, _Grouped):
            callback._trackio = _Grouped(callback._trackio, lineage)


class _Grouped:
    """The module trackio, whose runs are put into a group: transformers has no argument for it."""

    def __init__(self, module: Any, group: str) -> None:
        self._module, self._group = module, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def init(self, **arguments: Any) -> Any:
        return self._module.init(group=self._group, **arguments)
