"""What the training scripts share: flags of a lineage, resuming, publishing, and the run with its exit status."""

from __future__ import annotations

import contextlib
import copy
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from born_again.hub.client import HTTP_LIBRARY, HubError
from born_again.hub.files import HubSettings
from born_again.hub.publishing import BackgroundPublisher
from born_again.hub.restoring import restore_lineage
from born_again.lineage.arguments import TRACEBACK
from born_again.lineage.ensemble import ENSEMBLES, largest_ensemble
from born_again.lineage.folders import TEACHER_CACHE_NAME
from born_again.lineage.machine import (
    check_arguments,
    describe_computation,
    frozen_garbage_collector,
    keep_freed_memory,
    on_first_process,
    precision_name,
    precision_problem,
)
from born_again.lineage.manifest import (
    MANIFEST_NAME,
    LineageError,
    Manifest,
    check_one_lineage,
    is_repo_id,
    seed_folder_name,
)
from born_again.lineage.members import ENSEMBLE_NAME
from born_again.lineage.nodes import NodeFolders
from born_again.lineage.runner import Generation, LineageRunner
from born_again.lineage.spec import CONTROLS, TEACHER_OBJECTIVE, LineageSpec
from born_again.lineage.status import results_table
from born_again.lineage.worse import worse_than_teacher
from born_again.training.arguments import BornAgainTrainingArguments, check_choice
from born_again.training.environment import PRECISIONS, launcher_chooses_precision
from born_again.training.failures import LostProcess, exit_with
from born_again.training.fused_optimizer import should_fuse

_Loaded = TypeVar("_Loaded")

SAVE_MINUTES = 5.0


@dataclass
class LineageFlags:
    """Flags of a lineage of any task."""

    generations: int = field(default=3, metadata={"help": "Students after the teacher."})
    name: str | None = field(default=None, metadata={"help": "Name of the lineage; by default MODEL-DATASET."})
    seeds: list[int] | None = field(
        default=None,
        metadata={"help": "Train one lineage for each of these seeds, into OUTPUT_DIR/seedN, named NAME-seedN."},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a network trained elsewhere, to use as generation 0; with --seeds "
            "'outputs/labels/seed{seed}/gen0' is another one for each seed."
        },
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub teacher."})
    from_generation: int | None = field(
        default=None,
        metadata={"help": "Train this generation and later ones again; replaced folders are renamed, not deleted."},
    )
    stop_when_worse: bool = field(
        default=False,
        metadata={
            "help": "End the lineage after a student that is clearly worse than its teacher: it is finished then, "
            "with exit status 0, and the same command without this flag goes on."
        },
    )
    report: bool = field(
        default=True, metadata={"help": "Write report.html and report.png after each generation and at the end."}
    )
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep the checkpoints of finished generations."})
    save_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Save a checkpoint when so many minutes have passed since the last one, and at the end; 5 where "
            "neither save_strategy nor save_steps is given. With load_best_model_at_end also after every evaluation "
            "that is the best so far."
        },
    )
    stop_signals: list[str] | None = field(
        default=None,
        metadata={
            "help": "Signals that stop a run as SIGTERM does, after the step and a checkpoint: SIGUSR1 for SLURM's "
            "--signal=USR1@120."
        },
    )
    hub_namespace: str | None = field(
        default=None, metadata={"help": "User or organisation that --push_to_hub publishes to."}
    )
    hub_name_pattern: str = field(
        default="{name}-gen{index}", metadata={"help": "Pattern of the repository names, with --push_to_hub."}
    )
    hub_license: str | None = field(default=None, metadata={"help": "License in the cards, such as apache-2.0."})
    hub_report: bool = field(
        default=False,
        metadata={"help": "Publish report.png too, and show it in the cards; report.html is never published."},
    )
    hub_defer: bool = field(
        default=False, metadata={"help": "Train even if the Hub cannot be reached, and publish later."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads per process; all cores when not given."})
    tune_process: bool = field(
        default=True,
        metadata={
            "help": "Keep freed memory for the next step (on a CPU, with glibc), and exclude objects older than the "
            "training from garbage collection; both affect the whole process."
        },
    )
    model_args: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of the architecture: depth=172,growth_rate=30, or a mapping in a config file."},
    )
    budget: float = field(
        default=1.0,
        metadata={
            "help": "Train for this share of the epochs, above 0 to 1, one epoch at least; the learning rate falls at "
            "the same shares of the training."
        },
    )
    control: str | None = field(
        default=None,
        metadata={
            "help": "Train what the lineage of the same flags is compared with, on labels alone: equal-compute (one "
            "run, as long as all of its generations) or seeds (as many runs as its largest ensemble has members)."
        },
    )
    control_generations: int | None = field(default=None, init=False)  # by take_control
    smoke: bool = field(default=False, metadata={"help": "Train a tiny network, to check the installation."})
    given: frozenset[str] = field(default=frozenset(), init=False)  # by parse_arguments: the flags that were given


def run_for_each_seed(
    main: Callable[[Any, BornAgainTrainingArguments], int], flags: LineageFlags, training: BornAgainTrainingArguments
) -> int:
    """Runs `main` for each of --seeds, each a lineage of its own in OUTPUT_DIR/seedN; without --seeds once.

    In --teacher, "{seed}" stands for the seed, so that several objectives can have the same teachers.

    Args:
        main: of a script, from flags and training arguments to the exit status.
        flags: of the command.
        training: likewise.

    Returns:
        The largest exit status.

    Raises:
        ValueError: seeds that are repeated or negative, nearer than the generations of a lineage beside --control
            seeds, or given beside --seed or --from_generation; or a teacher of one of them that cannot be loaded. All
            are found before the first training.
        LineageError: output_dir holds a lineage itself.
    """
    if flags.seeds is None:
        return main(flags, training)
    _check_seeds(flags, training)
    folder, status = Path(training.output_dir), 0
    teachers = {seed: flags.teacher and flags.teacher.replace("{seed}", str(seed)) for seed in flags.seeds}
    for seed, teacher in teachers.items():
        is_begun = (folder / seed_folder_name(seed) / MANIFEST_NAME).is_file()
        if teacher is not None and not is_begun:  # whose own copy may be all that is left of it
            check_external_teacher(teacher, flags.teacher_revision)
    for seed, teacher in teachers.items():
        own_flags, own = copy.copy(flags), copy.copy(training)
        own.seed, own.output_dir = seed, str(folder / seed_folder_name(seed))
        own_flags.name = f"{flags.name}-seed{seed}"  # repositories and collections are named after it
        own_flags.teacher = teacher
        try:
            status = max(status, main(own_flags, own))
        except BaseException:
            with contextlib.suppress(OSError):
                Path(own.output_dir).rmdir()  # if nothing was written, so that nothing stands for a lineage
            raise
    if training.process_index == 0:
        print(f"All {len(flags.seeds)} lineages are in {folder}; born-again compare {folder} compares them.")
    return status


def _check_seeds(flags: LineageFlags, training: BornAgainTrainingArguments) -> None:
    seeds = flags.seeds or []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds: got {seeds}, expected one or more whole numbers from 0 on, each once, such as --seeds 0 10 20."
        )
    spacing, ordered = flags.generations + 1, sorted(seeds)
    nearest = min((after - before for before, after in pairwise(ordered)), default=spacing)
    if flags.control == "seeds" and nearest < spacing:
        step = max(10, spacing)
        raise ValueError(
            f"seeds: got {' '.join(map(str, seeds))} beside --control seeds with --generations {flags.generations}, "
            f"expected seeds at least {spacing} apart, since run k of seed s has seed s + k, and lineages of nearer "
            f"seeds would train the same networks; give --seeds 0 {step} {2 * step}, for one."
        )
    if "seed" in flags.given:
        raise ValueError(
            f"seed: got {training.seed} beside --seeds {' '.join(map(str, seeds))}, expected one of the two; put "
            "every seed into --seeds."
        )
    if flags.from_generation is not None:
        raise ValueError(
            f"from_generation: got {flags.from_generation} beside --seeds, expected it for one lineage, since the "
            f"same command run again would restart finished ones; give --seed {seeds[0]} --output_dir "
            f"{Path(training.output_dir) / seed_folder_name(seeds[0])} instead."
        )
    if (Path(training.output_dir) / MANIFEST_NAME).is_file():
        raise LineageError(
            f"output_dir: {training.output_dir} holds a lineage itself, expected a folder for those of --seeds; give "
            "another output_dir."
        )


def apply_budget(flags: LineageFlags, training: BornAgainTrainingArguments) -> None:
    """Shortens the training to the share of --budget: epochs, rounded to whole ones, or max_steps; and warmup.

    Milestones of the learning rate are shares of the training already. Call it once, before the spec is made.

    Raises:
        ValueError: a budget that is not above 0 and at most 1.
    """
    if not 0 < flags.budget <= 1:
        raise ValueError(
            f"budget: got {flags.budget}, expected a share of the epochs above 0 and at most 1, such as 0.05; "
            "--num_train_epochs trains for longer."
        )
    if flags.budget == 1:
        return
    training.num_train_epochs = float(max(1, round(flags.budget * training.num_train_epochs)))
    if training.max_steps > 0:
        training.max_steps = max(1, round(flags.budget * training.max_steps))
    if training.warmup_steps >= 1:
        training.warmup_steps = round(flags.budget * training.warmup_steps)


def default_output_dir(name: str, budget: float) -> str:
    """Where a lineage goes by default; with another budget it is another lineage."""
    return f"outputs/{name}" if budget == 1 else f"outputs/{name}-budget{budget:g}"


def saving(given: frozenset[str], load_best_model_at_end: bool) -> dict[str, Any]:
    """Defaults of the flags that say when checkpoints are saved: by time, unless one of them is given.

    Args:
        given: names of the flags that the user set.
        load_best_model_at_end: whether the best weights must be saved too.
    """
    if "save_strategy" in given:
        return {}
    if "save_steps" in given:
        return {"save_strategy": "steps"}
    return {"save_strategy": "best" if load_best_model_at_end else "no", "save_minutes": SAVE_MINUTES}


def take_control(flags: LineageFlags, training: BornAgainTrainingArguments) -> None:
    """Turns the arguments of a lineage into those of its --control; without one it does nothing.

    "equal-compute" is one training of its epochs, steps and warm-up times its generations, the teacher's among them;
    milestones of the learning rate are fractions already. "seeds" is a training for each member of its largest
    ensemble, with the seeds of its first generations. What only students read is set back to its default.

    Args:
        flags: `generations` and `control_generations` change.
        training: num_train_epochs, max_steps, warmup_steps and the settings of the objective change.

    Raises:
        ValueError: an unknown control, one beside a teacher trained elsewhere, or "seeds" of too few students.
    """
    if flags.control is None:
        return
    check_choice("control", flags.control, CONTROLS)
    for name in ("teacher", "share_teacher_ends"):
        if getattr(flags, name, None):
            raise ValueError(
                f"control: got {flags.control!r} beside --{name} {getattr(flags, name)}, expected no teacher, since a "
                f"control is trained on labels alone; leave --{name} out."
            )
    students = flags.generations
    if flags.control == "equal-compute":
        flags.generations, flags.control_generations = 0, students
        training.num_train_epochs *= students + 1
        training.max_steps *= students + 1 if training.max_steps > 0 else 1
        training.warmup_steps *= students + 1 if training.warmup_steps >= 1 else 1  # below 1 it is a fraction
    elif (members := largest_ensemble(students)) == 0:
        raise ValueError(
            f"control: got 'seeds' with {students} generations, of which no ensemble is evaluated; expected "
            f"--generations {min(ENSEMBLES)} or more."
        )
    else:
        flags.generations = members - 1
    for name in ("temperature", "label_weight", "permutation", "teacher_annealing"):
        setattr(training, name, type(training).__dataclass_fields__[name].default)


def spec_fields(flags: LineageFlags, training: BornAgainTrainingArguments) -> dict[str, Any]:
    """What the spec of every task takes from the flags: lineage, objective, seed, training, teacher and control."""
    return {
        "name": flags.name,
        "generations": flags.generations,
        "objective": training.objective if flags.control is None else TEACHER_OBJECTIVE,
        "seed": training.seed,
        "training": training.weight_affecting(),
        "teacher": flags.teacher,
        "teacher_revision": flags.teacher_revision,
        "control": flags.control,
        "control_generations": flags.control_generations,
    }


def with_control(name: str, control: str | None) -> str:
    """The default name or folder of a lineage, or of its control."""
    return name if control is None else f"{name}-{control}"


def hub_settings(flags: LineageFlags, training: BornAgainTrainingArguments) -> HubSettings | None:
    """The publishing settings, None without --push_to_hub.

    Raises:
        ValueError: --push_to_hub without a namespace, a namespace without it, or a flag that belongs to Trainer's own
            push.
    """
    if not training.push_to_hub:
        if flags.hub_namespace is not None:
            raise ValueError(
                f"hub_namespace: got {flags.hub_namespace!r} without --push_to_hub, expected both to publish; leave "
                "it out to train offline."
            )
        return None
    if flags.hub_namespace is None:
        raise ValueError(
            "push_to_hub: got True without --hub_namespace, expected the user or organisation to publish to; give it."
        )
    if training.hub_model_id is not None:
        raise ValueError(
            f"hub_model_id: got {training.hub_model_id!r}, expected none, since each generation has a repository of "
            "its own; see --hub_namespace and --hub_name_pattern."
        )
    return HubSettings(
        namespace=flags.hub_namespace,
        pattern=flags.hub_name_pattern,
        private=bool(training.hub_private_repo),
        branch=training.hub_revision,
        license=flags.hub_license,
        report=flags.hub_report,
    )


def resume_lineage(flags: LineageFlags, training: BornAgainTrainingArguments) -> LineageSpec | None:
    """Restores a published lineage if output_dir is empty, and fills in arguments from the lineage in output_dir.

    Call it before the spec is made. The name, the mixed precision and the fused optimizer of the existing lineage are
    taken unless the user gave them: a recipe would choose the last two by the machine. A precision given by a flag or
    the launcher stays, and the runner refuses it if it differs.

    Args:
        flags: `name` may change.
        training: its mixed precision may change, which is printed; its fused_optimizer is set.

    Returns:
        The spec of the existing lineage, None if there is none.

    Raises:
        ValueError: see `hub_settings` and `check_arguments`; or the lineage was begun in a precision that this machine
            does not support.
        HubError: the Hub cannot be reached; not with --hub_defer.
        LineageError: the repositories of the lineage's name do not hold a lineage.
    """
    check_arguments(training)
    settings = hub_settings(flags, training)
    _check_not_of_seeds(training)
    if settings is not None and flags.from_generation is None:
        on_first_process(lambda: _restore(flags, training, settings))
    NodeFolders(training.output_dir).receive(MANIFEST_NAME)
    try:
        spec = Manifest.read(Path(training.output_dir)).spec
    except (FileNotFoundError, LineageError):  # the runner says what is wrong with it
        spec = None
    if "fused_optimizer" not in flags.given:
        # A lineage of an earlier version does not say, and was begun without.
        recorded = False if spec is None else spec.training.get("fused_optimizer", False)
        training.fused_optimizer = should_fuse(training) if spec is None else recorded
    if spec is None:
        return None
    if "name" not in flags.given:
        flags.name = spec.name
    if {"bf16", "fp16"}.isdisjoint(flags.given) and not launcher_chooses_precision():
        _use_recorded_precision(spec, training)
    return spec


def _check_not_of_seeds(training: BornAgainTrainingArguments) -> None:
    try:
        check_one_lineage("output_dir", training.output_dir)
    except FileNotFoundError as error:
        raise LineageError(
            f"{error} To train another seed beside them, give --seeds {training.seed}, or --output_dir "
            f"{str(Path(training.output_dir) / seed_folder_name(training.seed))!r}."
        ) from None


def _use_recorded_precision(spec: LineageSpec, training: BornAgainTrainingArguments) -> None:
    begun = next((name for name in PRECISIONS if spec.training.get(name)), spec.training.get("mixed_precision", "no"))
    if begun == training.mixed_precision:
        return
    problem = precision_problem(begun, training.device)
    if problem is not None:
        raise ValueError(
            f"{begun}: the lineage in {training.output_dir} was begun in {precision_name(begun)}, {problem}; resume "
            "it on a machine that supports it, or give another output_dir."
        )
    if training.process_index == 0:
        print(
            f"Resumes in {precision_name(begun)}, as the lineage in {training.output_dir} was begun; the default on "
            f"this machine is {precision_name(training.mixed_precision)}."
        )
    training.use_precision(begun)


def _restore(flags: LineageFlags, training: BornAgainTrainingArguments, settings: HubSettings) -> None:
    try:
        restore_lineage(flags.name, settings, training.output_dir, training.hub_token)
    except HubError as error:
        if not flags.hub_defer:
            raise HubError(f"{error} Or train now and publish later, with --hub_defer.") from error
        logging.getLogger(__name__).warning("%s A new lineage is begun.", error)


def check_external_teacher(source: str, revision: str | None = None) -> None:
    """Looks at the files of --teacher without loading it, so that what is missing is said before a training.

    Args:
        source: folder or Hub id.
        revision: of the Hub repository.

    Raises:
        ValueError: see `load_external_teacher`.
    """

    def look() -> None:
        if not Path(source).is_dir() and not is_repo_id(source):
            raise OSError("there is no such folder")
        PretrainedConfig.get_config_dict(source, revision=revision)
        path = Path(source)
        if path.is_dir() and not (path / SAFE_WEIGHTS_NAME).is_file() and not list(path.glob("*.index.json")):
            raise OSError(f"there is no {SAFE_WEIGHTS_NAME} in it")

    load_external_teacher(source, look)


def load_external_teacher(source: str, load: Callable[[], _Loaded]) -> _Loaded:
    """Loads the network of --teacher, with errors that name the flag.

    Args:
        source: folder or Hub id.
        load: loads it.

    Raises:
        ValueError: it is the folder of an ensemble or a lineage, or cannot be loaded.
    """
    try:
        check_one_lineage("--teacher", source, "gen0")
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    for name, what in ((ENSEMBLE_NAME, "an ensemble"), (MANIFEST_NAME, "a lineage")):
        if (Path(source) / name).is_file():
            raise ValueError(
                f"--teacher {source!r} is the folder of {what}, expected a single network; give the folder of one "
                "generation, such as OUTPUT_DIR/gen2."
            )
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--teacher {source!r} cannot be loaded ({error}); expected the folder of a generation or of a network "
            "with config.json and model.safetensors (of timm: save_for_hf with safe_serialization=True), or "
            f"'owner/name' on the Hub; check the spelling; relative paths start at {str(Path.cwd())!r}."
        ) from error


def create_publisher(flags: LineageFlags, training: BornAgainTrainingArguments) -> BackgroundPublisher | None:
    """The publisher of a lineage, None without --push_to_hub.

    Raises:
        ValueError: see `hub_settings`.
    """
    settings = hub_settings(flags, training)
    return None if settings is None else BackgroundPublisher(settings, training.hub_token, flags.hub_defer)


def generation_arguments(training: BornAgainTrainingArguments, generation: Generation) -> BornAgainTrainingArguments:
    """The training arguments of one generation, without publishing and without the token.

    Where the objective does not read labels, label_smoothing_factor is left to generation 0.

    The teacher cache on disk is in the lineage's folder, and deleted when the generation is finished, unless
    teacher_cache_dir is given.
    """
    own = copy.copy(training)
    if own.teacher_cache == "disk" and own.teacher_cache_dir is None:
        own.teacher_cache_dir = str(Path(training.output_dir) / TEACHER_CACHE_NAME)
    if generation.parent is not None and not own.has_label_term:
        own.label_smoothing_factor = 0.0
    own.output_dir, own.seed = str(generation.checkpoint_dir), generation.seed
    own.push_to_hub, own.hub_token = False, None
    return own


def train(
    runner: LineageRunner,
    training: BornAgainTrainingArguments,
    task: str,
    network: nn.Module | None = None,
    *,
    tune_process: bool = False,
) -> int:
    """Runs a lineage, and prints its configuration and results.

    Args:
        runner: of the lineage.
        training: of all generations.
        task: model and data, for the first line.
        network: see `describe_computation`.
        tune_process: whether to change settings of the whole process for speed: `keep_freed_memory`, which is
            permanent, and `frozen_garbage_collector`, which ends with the run.

    Returns:
        The exit status: 1 if something could not be published, else 0, also where stop_when_worse ended the lineage.

    Raises:
        ValueError: another loss_normalization than "step".
    """
    if training.loss_normalization != "step":
        raise ValueError(
            f"loss_normalization: got {training.loss_normalization!r}, expected 'step', since every generation of a "
            "lineage, generation 0 too, normalises its loss by step; leave it out."
        )
    is_main, spec = training.process_index == 0, runner.spec
    if is_main:
        print(f"{task}, {_generations_of(spec)}, seed {spec.seed}, into {training.output_dir}")
        if training.label_smoothing_factor:
            print(f"Labels are smoothed by {training.label_smoothing_factor:g}{_smoothed_where(spec, training)}")
        print(f"Computed in {describe_computation(training, network)}")
        if runner.is_finished():
            print("Every generation is trained already; nothing is left to do.")
    if tune_process and training.device.type == "cpu":
        keep_freed_memory()
    with frozen_garbage_collector() if tune_process else contextlib.nullcontext():
        manifest = runner.run()
    if not is_main:
        return 0
    print(results_table(manifest.content))
    for record in manifest.generations:
        if text := " ".join(worse_than_teacher(manifest.content, record["index"])):
            print(f"* {text}")
    if len(manifest.generations) <= spec.generations:
        print(
            f"Stopped after generation {len(manifest.generations) - 1} (--stop_when_worse): the lineage is finished "
            "and usable; the same command without --stop_when_worse goes on."
        )
    for what, why in runner.unpublished.items():
        print(f"Not published: {what}: {why}", file=sys.stderr)
    if runner.unpublished:
        print(
            f"Everything is trained and saved in {runner.output_dir}; to publish the rest: born-again publish "
            f"{runner.output_dir}",
            file=sys.stderr,
        )
    return 1 if runner.unpublished else 0


def _generations_of(spec: LineageSpec) -> str:
    if spec.control == "equal-compute":
        return f"control: one run on labels, as long as a teacher + {spec.control_generations}"
    if spec.control == "seeds":
        return f"control: {spec.generations + 1} independent runs on labels"
    return f"{'teacher' if spec.teacher is None else spec.teacher} + {spec.generations} by {spec.objective}"


def _smoothed_where(spec: LineageSpec, training: BornAgainTrainingArguments) -> str:
    if training.has_label_term or not spec.generations or spec.control is not None:
        return ""
    return f", in generation 0 alone, since objective {spec.objective!r} has no term with the labels"


def launch(start: Callable[[], Any]) -> None:
    """Runs a script, and prints expected errors as one line, once for all processes that raise it.

    With --traceback on the command line they are raised. An error that is not expected keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger(HTTP_LIBRARY.__name__).setLevel(logging.WARNING)  # a line for each request to the Hub
    try:
        status = start()
    except KeyboardInterrupt:  # before or after the training, which ends with a checkpoint
        if TRACEBACK in sys.argv:
            raise
        sys.exit(128 + signal.SIGINT)
    except (ValueError, LineageError, HubError, FloatingPointError, OSError, ImportError, LostProcess) as error:
        if TRACEBACK in sys.argv:
            raise
        exit_with(error)
    except torch.OutOfMemoryError as error:
        error.add_note(
            "Give a smaller --per_device_train_batch_size, with as much more --gradient_accumulation_steps: the loss "
            "is the same."
        )
        raise
    sys.exit(status)
