"""The loop over generations: trains the missing ones in order, and records them in the manifest."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import set_seed

from born_again.lineage.callbacks import (
    Interrupted,
    RecordProgress,
    SaveAfterEvaluation,
    SaveByTime,
    StopAndSave,
    StopSignals,
    checkpoint_names,
)
from born_again.lineage.checkpoints import checkpoint_step
from born_again.lineage.disk import disk_message, disk_problem
from born_again.lineage.ensemble import ENSEMBLES, evaluate_ensemble, missing_ensembles
from born_again.lineage.evaluation import by_split, finite_or_none
from born_again.lineage.folders import (
    CHECKPOINTS_NAME,
    CURVE_NAME,
    WEIGHTS_NAME,
    check_restart,
    check_weights,
    clean_up,
    is_free,
    last_checkpoint,
    put_in_place,
    remove_leftovers,
    remove_training_files,
    restart_from,
    set_aside_later_checkpoints,
)
from born_again.lineage.global_batch import SHARE_FIELDS, GlobalBatch, check_same_experiment, may_differ, resumed_on
from born_again.lineage.history import HISTORY_NAME, write_history
from born_again.lineage.lock import FolderLock
from born_again.lineage.machine import (
    SHARES,
    check_arguments,
    check_computation,
    check_sharding,
    collect_memory,
    computation_of,
    computation_warning,
    hardware,
    on_first_process,
    peak_memory_mib,
    release_memory,
    reset_peak_memory,
    versions,
)
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256
from born_again.lineage.nodes import GatherRandomStates, NodeFolders
from born_again.lineage.predictions import (
    PREDICTIONS_NAME,
    predictions_by_split,
    write_predictions,
)
from born_again.lineage.progress import LineageProgress
from born_again.lineage.report_hook import ReportHook
from born_again.lineage.spec import CUSTOM, DATA_SOURCE, EXTERNAL, LineageSpec, data_differences
from born_again.lineage.tracking import name_runs
from born_again.lineage.worse import is_clearly_worse, nll_difference_from, worse_than_teacher
from born_again.teacher import FrozenTeacher
from born_again.teacher.preprocessing import check_prepared_as
from born_again.training.background_save import Writer
from born_again.training.environment import number_of_processes
from born_again.training.failures import naming_lost_processes
from born_again.training.sharding import count_parameters, loading_whole

if TYPE_CHECKING:
    from born_again.hub.publishing import BackgroundPublisher
    from born_again.training.trainer import BornAgainTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """The generation that the factories of a runner build for.

    Args:
        index: 0 for the teacher, k for the k-th student.
        seed: of its initial weights, data order and augmentation.
        objective: of generation 0 "label", or "external" if it was trained elsewhere; of students the spec's.
        parent: index of its teacher, None for generation 0 and the runs of a control.
        checkpoint_dir: folder for its checkpoints (`output_dir` of the training arguments).
    """

    index: int
    seed: int
    objective: str
    parent: int | None
    checkpoint_dir: Path


class LineageRunner:
    """Trains a teacher and its students, each taught by the one before, into one folder.

    Every process of a distributed launch runs the same loop; the first one writes. On CPUs make the training
    arguments, with use_cpu=True, before the runner, so that the process group exists. A finished generation whose
    weights match the hash of the manifest is skipped; an interrupted one resumes from its last complete checkpoint.
    Initial weights depend on the generation's seed only: set_seed, then `build_student`. A generation is loaded from
    its folder to teach and to be evaluated, so the evaluated weights are those that a user loads.

    One run at a time holds the folder. After SIGTERM or SIGINT it finishes the step, writes a checkpoint and exits;
    the same command then reaches the weights of an uninterrupted run.

    Args:
        spec: of the lineage.
        output_dir: the lineage's folder; new, empty, or of the same spec. Several nodes share it, or each has its own
            by that path, see `born_again.lineage.nodes`.
        build_student: makes the untrained network of a generation.
        build_trainer: from (student, teacher or None, generation) to a `BornAgainTrainer` whose output_dir is the
            generation's `checkpoint_dir` and whose seed is the generation's. Generation 0 is trained with
            loss_normalization "step" whatever its arguments say, as its students are.
        load_teacher: from the folder of a generation to its network.
        evaluate: from a loaded network to metrics by split, {"test": {"accuracy": ...}}; None calls the trainer's
            evaluate(), whose eval_dataset may be a dict by split. Predictions of `SplitMetrics` are kept beside the
            weights.
        save_student: writes config.json and model.safetensors of a trained network into a folder; None calls its
            save_pretrained.
        write_card: from (manifest content, generation index, curve=name of the training curve's picture or None) to
            the text of the generation's README.md; None writes neither card nor picture. With `write_report` it is
            also given report= and picture=, the paths of report.html and report.png from the card's folder.
        draw_curve: from (log history of a trainer, path of a PNG) to whether it drew the training curve; None draws
            none.
        write_ensemble_card: from (manifest content, record of the ensemble) to the text of its README.md; with
            `write_report` also given report= and picture=.
        write_report: called with output_dir after each generation and at the end, such as
            `born_again.report.page.write_report`; its errors are logged. None writes none.
        data: fingerprint of the data, compared when the lineage is resumed, except "coverage".
        keep_checkpoints: keeps the checkpoints of finished generations.
        save_minutes: saves a checkpoint when so many minutes have passed since the last one, and after the last step,
            beside those of the trainer's save_strategy; None saves those alone.
        take_teacher: loads the network trained elsewhere that the spec names as teacher; it is saved and evaluated as
            generation 0, and not trained.
        from_generation: trains this generation and those after it again, see
            `born_again.lineage.folders.restart_from`; the same command after a crash continues the restart.
        ensembles: for each number, an ensemble of that many of the newest students, evaluated by `evaluate` once all
            are trained; the last is saved in OUTPUT_DIR/ensemble. Without `evaluate` there are none.
        load_member: loads the members of ensembles from their folders; None takes `born_again.load_generation`.
        publisher: uploads finished generations to the Hub while the next one trains; None publishes nothing.
        stop_when_worse: ends the lineage after a student that is clearly worse than its teacher (see
            `born_again.lineage.worse`): it is finished then, its ensembles evaluated, and the spec in lineage.json has
            as many generations as were trained. Without it the same command goes on.
        stop_signals: names of signals that stop a run as SIGTERM does, such as SIGUSR1, which SLURM sends before a
            time limit with `--signal=USR1@120`.

    Attributes:
        manifest: of the lineage.
        unpublished: after run(), what could not be published, from its name to the reason.

    Raises:
        LineageError: the folder holds something else, another experiment, other data, or changed weights.
        ValueError: an invalid from_generation; a teacher in the spec without take_teacher, or the reverse; from run(),
            a teacher that the trainer would evaluate on images with another preprocessing than its own;
            save_minutes that are not above 0; stop_signals that are none; processes that are not joined yet.
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
        write_card: Callable[..., str] | None = None,
        draw_curve: Callable[[list[dict[str, float]], Path], bool] | None = None,
        write_ensemble_card: Callable[..., str] | None = None,
        write_report: Callable[[Path], Any] | None = None,
        data: Mapping[str, Any] | None = None,
        keep_checkpoints: bool = False,
        save_minutes: float | None = None,
        take_teacher: Callable[[], nn.Module] | None = None,
        from_generation: int | None = None,
        ensembles: Sequence[int] = ENSEMBLES,
        load_member: Callable[[Path], nn.Module] | None = None,
        publisher: BackgroundPublisher | None = None,
        stop_when_worse: bool = False,
        stop_signals: Sequence[str] = (),
    ) -> None:
        self.spec = spec
        self.output_dir = Path(output_dir)
        self.build_student = build_student
        self.build_trainer = build_trainer
        self.load_teacher = load_teacher
        self.evaluate = evaluate
        self.save_student = save_student or (lambda model, folder: model.save_pretrained(folder))
        self.write_card = write_card
        self.draw_curve = draw_curve
        self._report = ReportHook(write_report, self.output_dir)
        self.write_ensemble_card = write_ensemble_card and functools.partial(write_ensemble_card, **self._report.links)
        self.keep_checkpoints = keep_checkpoints
        self._savers = () if save_minutes is None else (SaveByTime(save_minutes),)
        self.data = dict(data or {})
        self.take_teacher = take_teacher
        self.from_generation = from_generation
        self.ensembles = () if evaluate is None else tuple(ensembles)
        self.load_member = load_member
        self.publisher = publisher
        self.stop_when_worse = stop_when_worse
        self.unpublished: dict[str, str] = {}
        if (spec.teacher is None) != (take_teacher is None):
            raise ValueError(
                f"take_teacher: got {take_teacher!r} and a spec with teacher {spec.teacher!r}, expected both or none "
                "of the two; the spec says what take_teacher loads."
            )
        self._processes = PartialState()
        if number_of_processes() > self._processes.num_processes:
            raise ValueError(
                f"training arguments: the launcher started {number_of_processes()} processes, which are not joined: "
                "each would train alone and write the same files; make the training arguments before the runner, with "
                "use_cpu=True on a machine without GPUs."
            )
        self._stop_signals = StopSignals(stop_signals)
        self._progress = LineageProgress(spec.name, spec.generations)
        self._nodes = NodeFolders(self.output_dir)
        self.manifest = self._open()
        if from_generation is not None:
            check_restart(self.manifest, from_generation)

    def run(self) -> Manifest:
        """Trains every generation that is not finished, then evaluates the ensembles.

        Returns:
            The manifest, which is also on disk.

        Raises:
            LineageError: weights of a finished generation are missing or changed, another run uses the folder, or it
                cannot be written: the disk is full, or it is read-only.
            FloatingPointError: a loss was not finite; names generation and step. Checkpoints are kept.
            LostProcess: another process has ended or hangs; names it.
            Interrupted: stopped by a signal, after a checkpoint was saved; uncaught, it ends the program.
        """
        with naming_lost_processes():
            return self._run_locked()

    def _run_locked(self) -> Manifest:
        if self.is_finished():  # writes nothing, so the folder may be read-only
            self._run()
            if self._processes.is_main_process:
                clean_up(self.manifest)
            return self.manifest
        with self._lock(), self._stop_signals, self._progress:
            self.manifest = self._open()  # another run may have changed it meanwhile
            self._processes.wait_for_everyone()
            on_first_process(lambda: remove_leftovers(self.manifest))
            try:
                self._restart()
                if (publisher := self.publisher) is not None:
                    on_first_process(lambda: publisher.start(self.manifest))
                self._run()
                if self._report.is_due:
                    self._report()
                if self.publisher is not None and self._processes.is_main_process:
                    self.unpublished = self.publisher.finish(stop=lambda: self._stop_signals.signum)
            except Interrupted as interrupted:
                self._log(logging.WARNING, "%s", interrupted)
                raise
            except Exception as error:
                problem = disk_problem(error, self.output_dir)
                if problem is None:
                    raise
                raise LineageError(disk_message(problem, self.manifest)) from error
            finally:
                if self.publisher is not None:
                    self.publisher.detach()  # before the folder is unlocked
        return self.manifest

    def _restart(self) -> None:
        index = self.from_generation
        if index is None:
            return
        on_first_process(lambda: restart_from(self.manifest, index))
        self.manifest, self.from_generation = self._open(), None

    def _run(self) -> None:
        self._nodes.receive("gen*/**/*")
        for index in range(self.spec.generations + 1):
            if index > self.manifest.spec.generations:
                break  # stop_when_worse
            record = self.manifest.record(index)
            if record is not None and record["status"] == "finished":
                check_weights(self.folder(index), record)
                self._log(logging.INFO, "Generation %d of %s is finished.", index, self.spec.name)
                continue
            signum = self._stop_signals.on_any_process()
            if signum is not None:
                raise Interrupted(signum, f"before generation {index}: {self._resume_hint()}")
            self._train(index)
            self._progress.finished(index)
        if self.evaluate is not None:
            for members in missing_ensembles(self.manifest, self.ensembles):
                with loading_whole():
                    evaluate_ensemble(
                        self.manifest, members, self.evaluate, self.write_ensemble_card, self.load_member
                    )
                self._save_manifest()
                self._report.is_due = True
        with self.manifest.lock:
            restarted = self.manifest.content.pop("restart", None)
        if restarted is not None:
            self._save_manifest()
        for pattern in ("ensemble/**/*", MANIFEST_NAME):
            self._nodes.receive(pattern)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Holds the lock of the folder."""
        with contextlib.ExitStack() as held:
            on_first_process(lambda: held.enter_context(FolderLock(self.output_dir)))
            yield

    def _log(self, level: int, message: str, *values: Any) -> None:
        if self._processes.is_main_process:
            logger.log(level, message, *values)

    def _resume_hint(self) -> str:
        return f"everything is saved in {self.output_dir}; the same command resumes from there."

    def folder(self, index: int) -> Path:
        """The folder of a finished generation."""
        return self.output_dir / f"gen{index}"

    def is_finished(self) -> bool:
        """Whether every generation of the spec is trained, evaluated and published, so that nothing is left to do."""
        return (
            self.from_generation is None
            and "restart" not in self.manifest.content
            and len(self.manifest.generations) > min(self.spec.generations, self.manifest.spec.generations)
            and all(record["status"] == "finished" for record in self.manifest.generations)
            and not missing_ensembles(self.manifest, self.ensembles)
            and (self.publisher is None or not self.publisher.unpublished(self.manifest))
        )

    def _open(self) -> Manifest:
        folder, data = self.output_dir, self.data
        self._nodes.receive(MANIFEST_NAME)
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.read(folder)
            differences = self.spec.differences(manifest.spec, self._ignored_fields(manifest))
            if differences:
                same = (
                    self._same_batch(manifest)
                    if any(text.split(": ")[0] in SHARE_FIELDS for text in differences)
                    else ""
                )
                raise LineageError(
                    f"output_dir: {folder} holds a lineage of another experiment ({'; '.join(differences)}); give the "
                    f"same arguments{same} to continue it, or another output_dir."
                )
            if changed := data_differences(data, manifest.content["data"]):
                raise LineageError(
                    f"output_dir: the data is not what the lineage in {folder} was trained on (other "
                    f"{', '.join(changed)}); give the same data, or another output_dir."
                )
            last = len(manifest.generations) - 1
            if not (self.stop_when_worse and last > 0 and is_clearly_worse(manifest.content, last)):
                last = max(self.spec.generations, manifest.spec.generations)
                if last >= len(manifest.generations):
                    manifest.content.pop("stopped_when_worse", None)
            manifest.content["spec"]["generations"] = last
            return manifest
        if not is_free(folder):
            raise LineageError(
                f"output_dir: {folder} holds something that is no lineage (it has no {MANIFEST_NAME}), expected a new "
                "or empty folder; nothing in it was touched."
            )
        manifest = Manifest.create(folder, self.spec, data)
        self._processes.wait_for_everyone()  # the others still check that the folder is free
        return manifest

    def _same_batch(self, manifest: Manifest) -> str:
        """The flags by which the lineage shares its batch out, and those on as many processes as there are here."""
        there = GlobalBatch.of_spec(manifest.spec.training)
        same = there.same_on(GlobalBatch.of_spec(self.spec.training).processes)
        return f" ({there.flags()}" + ("" if same in (None, there) else f", or {same.flags()}") + ")"

    def _ignored_fields(self, manifest: Manifest) -> set[str]:
        """Fields of the spec that may differ: how the same global batch is shared out, paths of the same data, or of a
        teacher with the same weights."""
        ignored = may_differ(self.spec.training, manifest.spec.training)
        known = manifest.content["data"].get("sha256")
        if known is not None and known == self.data.get("sha256"):
            ignored |= DATA_SOURCE
        first = manifest.record(0)
        if self.spec.teacher is not None and first is not None and first["objective"] == EXTERNAL:
            weights = Path(self.spec.teacher) / WEIGHTS_NAME
            if weights.is_file() and file_sha256(weights) == first["weights_sha256"]:
                ignored |= {"teacher", "teacher_revision"}
        return ignored

    def _train(self, index: int) -> None:
        generation = Generation(
            index=index,
            seed=self.spec.seed_of(index),
            objective=self.spec.objective_of(index),
            parent=self.spec.parent_of(index),
            checkpoint_dir=self.output_dir / CHECKPOINTS_NAME / f"gen{index}",
        )
        has_own_peak = reset_peak_memory()
        set_seed(generation.seed)
        if generation.objective == EXTERNAL and self.take_teacher is not None:
            self._log(logging.INFO, "Generation 0 of %s: %s, trained elsewhere.", self.spec.name, self.spec.teacher)
            with loading_whole():
                taken = self.take_teacher()
                FrozenTeacher(taken).check_against(self.build_student(generation))  # before anything is written
            trainer = self._trainer(taken, None, generation)
            if self.evaluate is None:
                check_prepared_as(taken, trainer.eval_dataset, trainer.processing_class)
            self._begin(generation, {})
            trainer.use_loss_normalization("step")  # evaluated as its students are
            self._finish(generation, trainer, has_own_peak)
            return
        with loading_whole():
            student = self.build_student(generation)
            teacher = None if generation.parent is None else self.load_teacher(self.folder(generation.parent))
        trainer = self._trainer(student, teacher, generation)
        self._check_objective(trainer, generation)
        self._check_trainer(index, trainer)
        self._begin(generation, {"computation": computation_of(trainer)})
        record = self.manifest.generations[index]
        if generation.parent is None:
            self._normalize_loss(trainer, record)
        writer = trainer.checkpoint_writer = Writer(in_background=self._processes.num_processes == 1)
        keeper = RecordProgress(
            generation.checkpoint_dir, record["seconds"], lambda **fields: self._update_record(index, **fields), writer
        )
        gathering = GatherRandomStates(self._nodes, generation.checkpoint_dir)
        for callback in (*self._savers, SaveAfterEvaluation(), gathering):
            trainer.add_callback(callback)
        trainer.add_callback(keeper)
        trainer.add_callback(StopAndSave(self._stop_signals, self._resume_hint(), writer))
        checkpoint = self._last_checkpoint(generation)
        self._record_processes(generation, trainer, checkpoint)
        self._processes.wait_for_everyone()
        on_first_process(
            lambda: set_aside_later_checkpoints(generation.checkpoint_dir, checkpoint, record.get("checkpoints", []))
        )
        self._log(
            logging.INFO,
            "Generation %d of %s: %s with seed %d%s.",
            index,
            self.spec.name,
            "on labels" if generation.parent is None else f"{generation.objective}, taught by gen{generation.parent},",
            generation.seed,
            f", resumed from {checkpoint.name}" if checkpoint else "",
        )
        name_runs(trainer, self.spec.name, index, self.output_dir, checkpoint)
        self._progress.follow(trainer, index)
        with writer:
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except FloatingPointError as error:
                raise FloatingPointError(f"generation {index} of {self.spec.name}: {error}") from error
            self._finish(generation, trainer, has_own_peak, keeper.seconds)
        # Free optimizer and activations before the next generation.
        release_memory(trainer)
        del trainer, student, teacher, keeper
        collect_memory()

    def _trainer(self, student: nn.Module, teacher: nn.Module | None, generation: Generation) -> BornAgainTrainer:
        trainer = self.build_trainer(student, teacher, generation)
        trainer.in_lineage = True
        return trainer

    def _last_checkpoint(self, generation: Generation) -> Path | None:
        folder = generation.checkpoint_dir
        if self._nodes.is_shared:
            return last_checkpoint(folder)
        found = [last_checkpoint(folder)] if self._processes.is_main_process else [None]
        (checkpoint,) = broadcast_object_list(found)
        if checkpoint is not None:
            self._nodes.receive(f"{CHECKPOINTS_NAME}/{folder.name}/{checkpoint.name}/**/*")
        return checkpoint

    def _check_objective(self, trainer: BornAgainTrainer, generation: Generation) -> None:
        """Refuses a function as objective that the spec, and so the record, would call otherwise."""
        own, recorded = trainer.objective_name, self.spec.objective
        is_custom = own.startswith(CUSTOM) or (generation.parent is not None and recorded.startswith(CUSTOM))
        if is_custom and own != recorded:
            raise ValueError(
                f"objective: the spec of {self.spec.name} says {recorded!r}, and build_trainer gave a trainer with "
                f"{own!r}; expected the same, since it is recorded: give LineageSpec(objective={own!r}), and the same "
                "objective to the trainer of every generation."
            )

    def _normalize_loss(self, trainer: BornAgainTrainer, record: Mapping[str, Any]) -> None:
        """Normalises the loss of generation 0 as its students', unless an earlier version began it differently."""
        how = record.get("loss_normalization", "trainer")
        trainer.use_loss_normalization(how)
        if how == "trainer":
            self._log(
                logging.INFO,
                "Generation 0 of %s was begun with Trainer's normalisation of the loss (loss_normalization 'trainer') "
                "and goes on with it; from_generation=0 would begin it again with that of its students.",
                self.spec.name,
            )
        else:
            self._log(
                logging.INFO,
                "Generation 0 of %s has the mean over all items of a step as its loss (loss_normalization 'step'), as "
                "its students have.",
                self.spec.name,
            )

    def _check_trainer(self, index: int, trainer: BornAgainTrainer) -> None:
        """Validates arguments and computation before a generation begins or is resumed."""
        check_arguments(trainer.args, self.spec.has_students and trainer.train_dataset)
        check_sharding(trainer, self._nodes.is_shared)
        here, begun = computation_of(trainer), self.manifest.record(index)
        ignored = SHARES if self._is_shared_out_anew(index, trainer) else ()
        if begun is not None:
            check_computation(here, index, begun, ignored)
        differing = computation_warning(here, self.manifest.generations[: index + 1], ignored)
        if differing is not None:
            self._log(
                logging.WARNING,
                "Generation %d of %s is computed differently than the lineage before it: %s.",
                index,
                self.spec.name,
                differing,
            )

    def _is_shared_out_anew(self, index: int, trainer: BornAgainTrainer) -> bool:
        """Whether processes share the same global batch out in another way than before; warns of it.

        Raises:
            LineageError: it would be another experiment.
        """
        begun, here = self.manifest.record(index), GlobalBatch.of(trainer)
        asked = self._batch_asked(here)
        there = asked if begun is None else GlobalBatch.of_record(begun, asked)
        if there == here:
            return False
        is_scaled = begun is not None and begun["parent"] is None and begun.get("loss_normalization") != "step"
        check_same_experiment(trainer, index, there, self.manifest.spec.training, is_scaled)
        self._log(
            logging.WARNING,
            "Generation %d of %s goes on with %s instead of %s: the same %d rows a step, so the same experiment. Its "
            "weights are not the same to the bit, since sums are rounded in another order and each process draws its "
            "own random numbers (dropout, 'fresh' permutations).",
            index,
            self.spec.name,
            here,
            there,
            here.size,
        )
        return True

    def _batch_asked(self, here: GlobalBatch) -> GlobalBatch:
        """What the lineage's spec says; `here` where ours says the same: a program may leave it out of its spec."""
        asked = GlobalBatch.of_spec(self.manifest.spec.training)
        return here if asked == GlobalBatch.of_spec(self.spec.training) else asked

    def _record_processes(self, generation: Generation, trainer: BornAgainTrainer, checkpoint: Path | None) -> None:
        """Records from which step on a generation shares its batch out in another way than it was begun."""
        record, here = self.manifest.generations[generation.index], GlobalBatch.of(trainer)
        changes: dict[str, Any] = {}
        if checkpoint is None:
            entries: list[dict[str, int]] = []
            if GlobalBatch.of_record({**record, "resumed_on": []}, here) != here:
                changes["computation"] = computation_of(trainer)
        else:
            entries = resumed_on(record, here, self._batch_asked(here), checkpoint_step(checkpoint) or 0)
        if entries != record.get("resumed_on", []):
            changes["resumed_on"] = entries
        if changes:
            self._update_record(generation.index, **changes)

    def _begin(self, generation: Generation, facts: Mapping[str, Any]) -> None:
        if self.manifest.record(generation.index) is None:
            self.manifest.update(
                generation.index,
                status="training",
                seed=None if generation.objective == EXTERNAL else generation.seed,
                parent=generation.parent,
                objective=generation.objective,
                weights_sha256=None,
                metrics={},
                seconds=0.0,
                checkpoints=[],
                versions=versions(),
                hardware=hardware(),
                hub=None,
                **facts,
            )
            if generation.objective == EXTERNAL:
                source = {"path_or_repo": self.spec.teacher, "revision": self.spec.teacher_revision}
                self.manifest.update(generation.index, source=source)
            elif generation.parent is None:
                self.manifest.update(generation.index, loss_normalization="step")
        self._save_manifest()

    def _finish(
        self, generation: Generation, trainer: BornAgainTrainer, has_own_peak: bool, seconds: float = 0.0
    ) -> None:
        """Saves the weights, evaluates them, then records both: a crash in between repeats only what follows."""
        partial = self.output_dir / f".gen{generation.index}.partial"

        def write() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.save_student(model, partial)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(partial)

        with trainer.whole_student() as model:
            on_first_process(write)
        self._nodes.on_other_nodes(lambda: shutil.rmtree(partial, ignore_errors=True))
        self._nodes.receive(f"{partial.name}/**/*")
        if self.evaluate is None:
            metrics = by_split(trainer.evaluate())
        else:
            with loading_whole():
                trained = self.load_teacher(partial)
            metrics = self.evaluate(trained)
        if trainer.checkpoint_writer is not None:
            trainer.checkpoint_writer.wait()  # while it wrote the last checkpoint the weights were evaluated
        parent = None if generation.parent is None else self.manifest.generations[generation.parent]
        facts = {
            "status": "finished",
            "seconds": seconds,
            "weights_sha256": file_sha256(partial / WEIGHTS_NAME),
            "metrics": {split: finite_or_none(values) for split, values in metrics.items()},
            "teacher_fit": trainer.teacher_train_metrics and finite_or_none(trainer.teacher_train_metrics),
            "parameters": count_parameters(model),
            "nll_difference": None if parent is None else nll_difference_from(parent, self.output_dir, metrics),
            "steps": trainer.state.global_step,
            "checkpoints": checkpoint_names(generation.checkpoint_dir) if self.keep_checkpoints else [],
            "peak_memory_mib": peak_memory_mib() if has_own_peak else None,
        }
        is_worse = self._agreed(
            is_clearly_worse(self.manifest.content_with(generation.index, **facts), generation.index)
        )
        if is_worse:
            facts["train_fit"] = finite_or_none(trainer.evaluate_student() or {}) or None
        self._processes.wait_for_everyone()  # every process has loaded the weights from this path

        def finish() -> None:
            history = trainer.state.log_history
            if self.write_card is not None:
                drawn = self.draw_curve is not None and self.draw_curve(history, partial / CURVE_NAME)
                content = self.manifest.content_with(generation.index, **facts)
                links = {"curve": CURVE_NAME if drawn else None, **self._report.links}
                (partial / "README.md").write_text(self.write_card(content, generation.index, **links), "utf-8")
            write_predictions(partial / PREDICTIONS_NAME, predictions_by_split(metrics), facts["weights_sha256"])
            write_history(partial / HISTORY_NAME, history, facts["weights_sha256"])
            put_in_place(partial, self.folder(generation.index), facts["weights_sha256"])

        on_first_process(finish)
        self._nodes.on_other_nodes(
            lambda: put_in_place(partial, self.folder(generation.index), facts["weights_sha256"])
        )
        self._nodes.receive(f"gen{generation.index}/**/*")
        self.manifest.update(generation.index, **facts)  # only now: a finished record must have its folder
        if is_worse and self.stop_when_worse and generation.index < self.spec.generations:
            with self.manifest.lock:
                self.manifest.content["spec"]["generations"] = generation.index
                self.manifest.content["stopped_when_worse"] = {"generations": self.spec.generations}
        self._save_manifest()
        if is_worse:
            self._log(logging.WARNING, "%s", " ".join(worse_than_teacher(self.manifest.content, generation.index)))
        self._report()
        if self.publisher is not None and self._processes.is_main_process:
            self.publisher.wake()

        def clean() -> None:
            remove_training_files(self.output_dir, generation.index, self.keep_checkpoints)

        on_first_process(clean)
        self._nodes.on_other_nodes(clean)

    def _agreed(self, value: bool) -> bool:
        """The value of the first process: others may have rounded otherwise."""
        return broadcast_object_list([value])[0] if self._processes.num_processes > 1 else value

    def _update_record(self, index: int, **fields: Any) -> None:
        self.manifest.update(index, **fields)
        self._save_manifest()

    def _save_manifest(self) -> None:
        on_first_process(self.manifest.save)
