"""The global batch of a step, and when another number of processes that share it out is the same experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _BatchNorm

from born_again.lineage.manifest import LineageError

if TYPE_CHECKING:
    from born_again.training.trainer import BornAgainTrainer

_SHARES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "world_size": 1}
# The fields of a spec that say how its batch is shared out.
SHARE_FIELDS = frozenset(f"training.{name}" for name in _SHARES)
# Samplers whose order of rows depends on what one process reads.
_BY_SHARE = ("group_by_length", "batch_rebalance")


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of an optimisation step, as processes share them out.

    Args:
        micro_batch_size: rows of one forward of one process.
        accumulation: micro-batches of a process in a step.
        processes: their number.
        split_batches: whether per_device_train_batch_size counts the rows of all processes, as accelerate's
            split_batches has it.
    """

    micro_batch_size: int
    accumulation: int
    processes: int
    split_batches: bool = field(default=False, compare=False)

    @classmethod
    def of_spec(cls, training: Mapping[str, Any]) -> GlobalBatch:
        """Of the `training` of a spec."""
        rows, accumulation, processes = (training.get(name, default) for name, default in _SHARES.items())
        split = bool((training.get("accelerator_config") or {}).get("split_batches", False))
        return cls(rows // processes if split else rows, accumulation, processes, split)

    @classmethod
    def of(cls, trainer: BornAgainTrainer) -> GlobalBatch:
        """Of a trainer."""
        args, split = trainer.args, trainer.args.accelerator_config.split_batches
        rows = args.train_batch_size // (args.world_size if split else 1)
        return cls(rows, args.gradient_accumulation_steps, args.world_size, split)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], asked: GlobalBatch) -> GlobalBatch:
        """Of a generation that was begun, as it went on last.

        Args:
            record: of the generation; those of earlier versions have no micro_batch_size.
            asked: of the lineage's spec.
        """
        said = [record.get("computation", {}), *record.get("resumed_on", [])][-1]
        if "micro_batch_size" not in said:
            return asked
        numbers = (said[name] for name in ("micro_batch_size", "gradient_accumulation_steps", "processes"))
        return cls(*numbers, asked.split_batches)

    @property
    def size(self) -> int:
        return self.round * self.accumulation

    @property
    def round(self) -> int:
        """Rows that all processes together read at once."""
        return self.micro_batch_size * self.processes

    def flags(self) -> str:
        """As flags of `accelerate launch` and of a script."""
        rows = self.round if self.split_batches else self.micro_batch_size
        return (
            f"--num_processes {self.processes} with --per_device_train_batch_size {rows} "
            f"--gradient_accumulation_steps {self.accumulation}"
        )

    def same_on(self, processes: int) -> GlobalBatch | None:
        """The same batch on another number of processes; None where they cannot share it evenly."""
        for accumulation in (self.accumulation, *range(1, self.size // processes + 1)):
            if self.size % (processes * accumulation) == 0:
                rows = self.size // (processes * accumulation)
                return GlobalBatch(rows, accumulation, processes, self.split_batches)
        return None

    def __str__(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        accumulated = f" x {self.accumulation} accumulated" if self.accumulation > 1 else ""
        return f"{processes} x {self.micro_batch_size} rows{accumulated}"


def may_differ(here: Mapping[str, Any], there: Mapping[str, Any]) -> set[str]:
    """Fields of a spec in which two may differ, since both share out the same global batch.

    Whether network, data and loss depend on how is for `check_same_experiment`, once they are there.

    Args:
        here: `training` of a spec.
        there: that of another.
    """
    ours, theirs = GlobalBatch.of_spec(here), GlobalBatch.of_spec(there)
    if ours.size != theirs.size:
        return set()
    same = _normalizes_all(here, ours.processes) == _normalizes_all(there, theirs.processes)
    return {*SHARE_FIELDS, *(["training.sync_batchnorm"] if same else [])}


def _normalizes_all(training: Mapping[str, Any], processes: int) -> bool:
    """Whether BatchNorm normalises by the rows of all processes: it is synchronised, or there is one process."""
    return processes == 1 or bool(training.get("sync_batchnorm", False))


def resumed_on(record: Mapping[str, Any], here: GlobalBatch, asked: GlobalBatch, step: int) -> list[dict[str, int]]:
    """From which steps on a generation was computed on other processes than it was begun on, for its record.

    Args:
        record: of the generation.
        here: how its batch is shared out from `step` on.
        asked: of the lineage's spec.
        step: of the checkpoint that it is resumed from.
    """
    before = [entry for entry in record.get("resumed_on", []) if entry["step"] < step]
    if GlobalBatch.of_record({**record, "resumed_on": before}, asked) == here:
        return before
    numbers = {
        "processes": here.processes,
        "gradient_accumulation_steps": here.accumulation,
        "micro_batch_size": here.micro_batch_size,
    }
    return [*before, {"step": step, **numbers}]


def check_same_experiment(
    trainer: BornAgainTrainer,
    generation: int,
    there: GlobalBatch,
    training: Mapping[str, Any],
    is_scaled: bool = False,
) -> None:
    """Checks that a generation on other processes or accumulated micro-batches trains what it would have there.

    Every step must have the same rows, gradient and BatchNorm statistics, but for rounding and random numbers.

    Args:
        trainer: of the generation.
        generation: its index.
        there: how the lineage, or the generation that is resumed, shared its batch out.
        training: of the lineage's spec.
        is_scaled: whether the loss is normalised as Trainer does it, by micro-batch.

    Raises:
        LineageError: it would be another experiment; says why, and what goes on.
    """
    here = GlobalBatch.of(trainer)
    problem = _problem(trainer, here, there, training, is_scaled)
    if problem is not None:
        same = there.same_on(here.processes) if here.size != there.size else None
        raise LineageError(
            f"generation {generation} would be another experiment on {here} than on {there}, as it was begun: "
            f"{problem}; go on with {there.flags()}"
            + (f", or {same.flags()}" if same not in (None, there) else "")
            + ", or give another output_dir."
        )


def _problem(
    trainer: BornAgainTrainer,
    here: GlobalBatch,
    there: GlobalBatch,
    training: Mapping[str, Any],
    is_scaled: bool,
) -> str | None:
    args = trainer.args
    if here.size != there.size:
        return f"a step has {here.size} rows here, {there.size} there"
    if is_scaled:
        return "its loss is the mean of its micro-batches' means (loss_normalization 'trainer')"
    strategy = getattr(args, "train_sampling_strategy", None)
    if strategy in _BY_SHARE or getattr(args, "group_by_length", False):
        return f"{strategy or 'group_by_length'} orders rows by what one process reads in a step"
    if not args.accelerator_config.use_seedable_sampler:
        return "use_seedable_sampler=False orders rows by the random state of a process"
    if here.round != there.round:
        if args.dataloader_drop_last:
            return f"dataloader_drop_last drops what does not fill {here.round} rows here, {there.round} there"
        if hasattr(trainer.train_dataset, "streams"):
            return f"a text is read as {here.round} streams here, {there.round} there"
    layers = sum(isinstance(layer, _BatchNorm) for layer in trainer.model.modules())
    all_rows_here = _normalizes_all({"sync_batchnorm": getattr(args, "sync_batchnorm", False)}, here.processes)
    all_rows_there = _normalizes_all(training, there.processes)
    if layers and not (all_rows_here and all_rows_there and here.round == there.round):
        remedy = " (on GPUs --sync_batchnorm True has them be those of all processes)"
        return f"its {layers} BatchNorm layers have the statistics of the rows that a process reads at once" + (
            remedy if all_rows_there and here.round == there.round else ""
        )
    return None
