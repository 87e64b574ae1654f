"""The loop over generations: trains what is missing, in order, and writes down what happened."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, set_seed

from born_again.lineage.folders import last_checkpoint, move_aside, sync_files
from born_again.lineage.interruption import Interrupted, Interruption, StopAndSave
from born_again.lineage.lock import LOCK_NAME, FolderLock
from born_again.lineage.machine import hardware, peak_memory_mib, versions
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256, sync_folder
from born_again.lineage.spec import LineageSpec

if TYPE_CHECKING:
    from born_again.trainer import BornAgainTrainer

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CHECKPOINTS_NAME = "checkpoints"
_NO_METRIC = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(frozen=True)
class Generation:
    """What the factories of a runner are told about the generation they build for.

    Args:
        index: 0 for the teacher, k for the k-th student.
        seed: of its initial weights, data order and augmentation.
        objective: "label" for generation 0, the spec's for students.
        parent: index of its teacher, None for generation 0.
        checkpoint_dir: where its trainer must keep its checkpoints (`output_dir` of the training arguments).
    """

    index: int
    seed: int
    objective: str
    parent: int | None
    checkpoint_dir: Path


class LineageRunner:
    """Trains a teacher and its students, each taught by the one before, into one folder.

    Every process of a distributed launch runs the same loop; the first one writes. A generation that is finished and
    whose weights still hash to the manifest is skipped, an interrupted one goes on from its last whole checkpoint.
    Initial weights depend on the generation's seed alone: set_seed, then `build_student`. A generation is loaded from
    its folder to teach and to be measured, so that what is measured is what a user loads.

    One run at a time holds the folder. SIGTERM and SIGINT let it finish the step, write a checkpoint and leave; the
    same command then gives the weights of a run that nothing interrupted.

    Args:
        spec: what is asked.
        output_dir: the lineage's folder; new, empty, or of the same spec.
        build_student: makes the untrained network of a generation.
        build_trainer: from (student, teacher or None, generation) to a `BornAgainTrainer` whose output_dir is the
            generation's `checkpoint_dir` and whose seed is the generation's.
        load_teacher: from the folder of a generation to its network.
        evaluate: from a loaded network to metrics by split, {"test": {"accuracy": ...}}; None calls the trainer's
            evaluate(), whose eval_dataset may be a dict by split.
        save_student: writes config.json and model.safetensors of a trained network into a folder; None calls its
            save_pretrained.
        write_card: from (manifest content, generation index) to the text of the generation's README.md; None writes
            none.
        data: fingerprint of the data, compared when the lineage goes on.
        keep_checkpoints: keeps the checkpoints of finished generations.

    Raises:
        LineageError: the folder holds something else, another experiment, other data, or changed weights.
    """

    def __init__(
        self,
        spec: LineageSpec,
        output_dir: str | Path,
        *,
        build_student: Callable[[Generation], nn.Module],
        build_trainer: Callable[[nn.Module, nn.Module | None, Generation], BornAgainTrainer],
        load_teacher: Callable[[Path], nn.Module],
        evaluate: Callable[[nn.Module], Mapping[str, Mapping[str, float]]] | None = None,
        save_student: Callable[[nn.Module, Path], None] | None = None,
        write_card: Callable[[Mapping[str, Any], int], str] | None = None,
        data: Mapping[str, Any] | None = None,
        keep_checkpoints: bool = False,
    ) -> None:
        self.spec = spec
        self.output_dir = Path(output_dir)
        self.build_student = build_student
        self.build_trainer = build_trainer
        self.load_teacher = load_teacher
        self.evaluate = evaluate
        self.save_student = save_student or (lambda model, folder: model.save_pretrained(folder))
        self.write_card = write_card
        self.keep_checkpoints = keep_checkpoints
        self.data = dict(data or {})
        self._processes = PartialState()
        self._interruption = Interruption()
        self.manifest = self._open()

    def run(self) -> Manifest:
        """Trains every generation that is not finished.

        Returns:
            The manifest, also on disk.

        Raises:
            LineageError: weights of a finished generation are not those that were written, or another run uses the
                folder.
            FloatingPointError: a loss was not finite; names generation and step, checkpoints are kept.
            Interrupted: a signal asked to stop, and what was trained is saved; ends a program that does not catch it.
        """
        if self.is_finished():  # nothing is written, so that a folder may be read-only
            self._run()
            return self.manifest
        with self._lock(), self._interruption:
            self.manifest = self._open()  # another run may have gone on in between
            self._processes.wait_for_everyone()
            try:
                self._run()
            except Interrupted as interrupted:
                if self._processes.is_main_process:
                    logger.warning("%s", interrupted)
                raise
        return self.manifest

    def _run(self) -> None:
        for index in range(self.spec.generations + 1):
            record = self.manifest.record(index)
            if record is not None and record["status"] == "finished":
                self._check_weights(index)
                logger.info("Generation %d of %s is finished.", index, self.spec.name)
                continue
            signum = self._interruption.agreed()
            if signum is not None:
                raise Interrupted(signum, f"before generation {index}: {self._how_to_go_on()}")
            self._train(index)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Holds the folder on the first process; where it cannot, every process raises and none waits."""
        with contextlib.ExitStack() as held:
            refusal = [None]
            if self._processes.is_main_process:
                try:
                    held.enter_context(FolderLock(self.output_dir))
                except LineageError as error:
                    refusal = [str(error)]
            broadcast_object_list(refusal)
            if refusal[0] is not None:
                raise LineageError(refusal[0])
            yield

    def _how_to_go_on(self) -> str:
        return f"what is trained is saved in {self.output_dir}; the same command goes on from there."

    def folder(self, index: int) -> Path:
        """Where a finished generation is."""
        return self.output_dir / f"gen{index}"

    def is_finished(self) -> bool:
        """Whether every generation that is asked for is trained."""
        return len(self.manifest.generations) > self.spec.generations and all(
            record["status"] == "finished" for record in self.manifest.generations
        )

    def _open(self) -> Manifest:
        folder, data = self.output_dir, self.data
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.read(folder)
            differences = self.spec.differences(manifest.spec)
            if differences:
                raise LineageError(
                    f"output_dir: {folder} holds a lineage of another experiment ({'; '.join(differences)}); give the "
                    "same arguments to go on with it, or another output_dir."
                )
            if manifest.content["data"] != data:
                known = manifest.content["data"]
                changed = sorted(key for key in {*data, *known} if data.get(key) != known.get(key))
                raise LineageError(
                    f"output_dir: the data is not what the lineage in {folder} was trained on (other "
                    f"{', '.join(changed)}); give the same data, or another output_dir."
                )
            manifest.content["spec"]["generations"] = max(self.spec.generations, manifest.spec.generations)
            return manifest
        if folder.exists() and (not folder.is_dir() or any(path.name != LOCK_NAME for path in folder.iterdir())):
            raise LineageError(
                f"output_dir: {folder} holds something that is no lineage (it has no {MANIFEST_NAME}), expected a new "
                "or empty folder; nothing in it was touched."
            )
        manifest = Manifest.create(folder, self.spec, data)
        self._processes.wait_for_everyone()  # before the first process makes the folder that the others still look at
        return manifest

    def _train(self, index: int) -> None:
        generation = Generation(
            index=index,
            seed=self.spec.seed_of(index),
            objective=self.spec.objective_of(index),
            parent=index - 1 if index else None,
            checkpoint_dir=self.output_dir / CHECKPOINTS_NAME / f"gen{index}",
        )
        self._begin(generation)
        set_seed(generation.seed)
        student = self.build_student(generation)
        teacher = None if generation.parent is None else self.load_teacher(self.folder(generation.parent))
        trainer = self.build_trainer(student, teacher, generation)
        clock = _Clock(self, index)
        trainer.add_callback(clock)
        trainer.add_callback(StopAndSave(self._interruption, self._how_to_go_on()))  # after the clock: it ends it
        checkpoint = last_checkpoint(generation.checkpoint_dir)
        logger.info(
            "Generation %d of %s: %s with seed %d%s.",
            index,
            self.spec.name,
            "on labels" if generation.parent is None else f"{generation.objective}, taught by gen{generation.parent},",
            generation.seed,
            f", going on from {checkpoint.name}" if checkpoint else "",
        )
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except FloatingPointError as error:
            raise FloatingPointError(f"generation {index} of {self.spec.name}: {error}") from error
        clock.read()
        self._finish(generation, trainer)
        # The next generation must not find this one's optimizer and activations in memory.
        trainer.accelerator.free_memory()
        del trainer, student, teacher, clock
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _begin(self, generation: Generation) -> None:
        if self.manifest.record(generation.index) is None:
            self.manifest.update(
                generation.index,
                status="training",
                seed=generation.seed,
                parent=generation.parent,
                objective=generation.objective,
                weights_sha256=None,
                metrics={},
                seconds=0.0,
                versions=versions(),
                hardware=hardware(),
                hub=None,
            )
        self._save_manifest()

    def _finish(self, generation: Generation, trainer: BornAgainTrainer) -> None:
        """Weights first, then their measurement, then the record: a crash in between repeats only what came after."""
        partial = self.output_dir / f".gen{generation.index}.partial"
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if self._processes.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.save_student(model, partial)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(partial)
        self._processes.wait_for_everyone()
        if self.evaluate is None:
            metrics = _by_split(trainer.evaluate())
        else:
            metrics = {split: dict(values) for split, values in self.evaluate(self.load_teacher(partial)).items()}
        self.manifest.update(
            generation.index,
            status="finished",
            weights_sha256=file_sha256(partial / WEIGHTS_NAME),
            metrics={split: _finite(values) for split, values in metrics.items()},
            teacher_fit=trainer.teacher_fit and _finite(trainer.teacher_fit),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            steps=trainer.state.global_step,
            peak_memory_mib=peak_memory_mib(),
        )
        self._processes.wait_for_everyone()  # every process has read the weights where they are
        folder = self.folder(generation.index)
        if self._processes.is_main_process:
            if self.write_card is not None:
                (partial / "README.md").write_text(self.write_card(self.manifest.content, generation.index), "utf-8")
            sync_files(partial)
            move_aside(folder, f"is not in {MANIFEST_NAME}")
            os.rename(partial, folder)
            sync_folder(self.output_dir)
        self._save_manifest()
        if self._processes.is_main_process and not self.keep_checkpoints:
            shutil.rmtree(generation.checkpoint_dir, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds the checkpoints of another generation
                generation.checkpoint_dir.parent.rmdir()
        self._processes.wait_for_everyone()

    def _check_weights(self, index: int) -> None:
        path = self.folder(index) / WEIGHTS_NAME
        expected = self.manifest.record(index)["weights_sha256"]
        if not path.is_file():
            raise LineageError(
                f"{path}: is missing, though {MANIFEST_NAME} says that generation {index} is finished; put it back, "
                "or start again in another output_dir."
            )
        if file_sha256(path) != expected:
            raise LineageError(
                f"{path}: does not hash to what {MANIFEST_NAME} holds ({expected[:12]}...), so it is not the "
                "generation that was trained here; put the file back, or start again in another output_dir."
            )

    def _save_manifest(self) -> None:
        if self._processes.is_main_process:
            self.manifest.save()
        self._processes.wait_for_everyone()


class _Clock(TrainerCallback):
    """Adds a training's seconds to its record, at every checkpoint, so that those before a crash are counted."""

    def __init__(self, runner: LineageRunner, index: int) -> None:
        self.runner = runner
        self.index = index
        self.before = runner.manifest.record(index)["seconds"]
        self.start = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.read()
        if self.runner._processes.is_main_process:
            self.runner.manifest.save()

    def read(self) -> None:
        seconds = round(self.before + time.perf_counter() - self.start, 3)
        self.runner.manifest.update(self.index, seconds=seconds)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity and no number of torch's or numpy's; a bad one must not cost a generation its record."""
    return {
        name: (int(value) if isinstance(value, int) else float(value)) if math.isfinite(value) else None
        for name, value in metrics.items()
    }


def _by_split(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """From Trainer's flat names, eval_accuracy or eval_SPLIT_accuracy, to metrics by split."""
    splits: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name == "epoch" or name.endswith(_NO_METRIC):
            continue
        split, _, metric = name.removeprefix("eval_").partition("_")
        if split not in ("train", "validation", "test"):
            split, metric = "test", name.removeprefix("eval_")
        splits.setdefault(split, {})[metric] = value
    return splits
