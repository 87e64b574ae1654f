"""What the scripts that train lineages have in common: their flags, where they publish, how they begin and end."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from born_again.hub.client import HTTP_LIBRARY, HubError
from born_again.hub.files import HubSettings
from born_again.hub.publishing import BackgroundPublisher
from born_again.hub.restoring import restore_lineage
from born_again.lineage.folders import TEACHER_CACHE_NAME
from born_again.lineage.machine import (
    check_arguments,
    how_it_computes,
    keep_freed_memory,
    leaving_old_objects_alone,
    on_first_process,
    precision_problem,
    precision_words,
)
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest
from born_again.lineage.members import ENSEMBLE_NAME
from born_again.lineage.runner import Generation, LineageRunner
from born_again.lineage.spec import LineageSpec
from born_again.lineage.status import results_table
from born_again.training.arguments import BornAgainTrainingArguments
from born_again.training.environment import PRECISIONS, launcher_chooses_precision


@dataclass
class LineageFlags:
    """Flags of a lineage, whatever it is trained on."""

    generations: int = field(default=3, metadata={"help": "Students after the teacher."})
    name: str | None = field(default=None, metadata={"help": "Of the lineage; from model and dataset when not given."})
    teacher: str | None = field(
        default=None, metadata={"help": "A network trained elsewhere, folder or Hub id, in place of generation 0."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub teacher."})
    from_generation: int | None = field(
        default=None, metadata={"help": "Start again from this one; what it replaces is moved aside."}
    )
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep those of finished generations."})
    hub_namespace: str | None = field(
        default=None, metadata={"help": "User or organisation that --push_to_hub publishes to."}
    )
    hub_name_pattern: str = field(
        default="{name}-gen{index}", metadata={"help": "Of the repositories' names, with --push_to_hub."}
    )
    hub_license: str | None = field(default=None, metadata={"help": "For the cards, such as apache-2.0."})
    hub_defer: bool = field(
        default=False, metadata={"help": "Train even where the Hub cannot be published to, and try again later."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of a process; the machine's cores when not given."}
    )
    tune_process: bool = field(
        default=True,
        metadata={
            "help": "Keep freed memory for the next step (on a CPU, with glibc) and collect no garbage among what was "
            "there before the training; both hold for the whole process."
        },
    )
    smoke: bool = field(default=False, metadata={"help": "A tiny network for a minute, to see that all works."})
    given: frozenset[str] = field(default=frozenset(), init=False)  # by parse_arguments: flags that the user chose


def hub_settings(flags: LineageFlags, training: BornAgainTrainingArguments) -> HubSettings | None:
    """Where a lineage is published, None without --push_to_hub.

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
    )


def go_on(flags: LineageFlags, training: BornAgainTrainingArguments) -> LineageSpec | None:
    """Brings a published lineage back, and takes from the one in output_dir what the user did not choose.

    To be called before the spec is made. What the user leaves open goes on as the lineage was begun: its name, and the
    mixed precision, which a recipe chooses by the machine. A precision that was given, by a flag or by the launcher,
    stays, and the runner refuses it where it is another.

    Args:
        flags: `name` may change.
        training: its mixed precision may change, which is printed.

    Returns:
        The spec that the lineage was begun with; None where there is none yet.

    Raises:
        ValueError: see `hub_settings` and `check_arguments`; or the lineage was begun in a precision that this machine
            has not.
        HubError: the Hub cannot be asked what there is; not with --hub_defer.
        LineageError: what is published under the lineage's name is none.
    """
    check_arguments(training)
    settings = hub_settings(flags, training)
    if settings is not None and flags.from_generation is None:
        on_first_process(lambda: _restore(flags, training, settings))
    try:
        spec = Manifest.read(Path(training.output_dir)).spec
    except (FileNotFoundError, LineageError):  # the runner says what is wrong with it
        return None
    if "name" not in flags.given:
        flags.name = spec.name
    if {"bf16", "fp16"}.isdisjoint(flags.given) and not launcher_chooses_precision():
        _take_precision(spec, training)
    return spec


def _take_precision(spec: LineageSpec, training: BornAgainTrainingArguments) -> None:
    begun = next((name for name in PRECISIONS if spec.training.get(name)), spec.training.get("mixed_precision", "no"))
    if begun == training.mixed_precision:
        return
    problem = precision_problem(begun, training.device)
    if problem is not None:
        raise ValueError(
            f"{begun}: the lineage in {training.output_dir} was begun in {precision_words(begun)}, {problem}; go on "
            "with it where it can be computed, or give another output_dir."
        )
    if training.process_index == 0:
        print(
            f"Goes on in {precision_words(begun)}, as the lineage in {training.output_dir} was begun; by itself this "
            f"machine would compute in {precision_words(training.mixed_precision)}."
        )
    training.use_precision(begun)


def _restore(flags: LineageFlags, training: BornAgainTrainingArguments, settings: HubSettings) -> None:
    try:
        restore_lineage(flags.name, settings, training.output_dir, training.hub_token)
    except HubError as error:
        if not flags.hub_defer:
            raise HubError(f"{error} Or train now and publish later, with --hub_defer.") from error
        logging.getLogger(__name__).warning("%s It begins anew.", error)


def teacher_named(source: str, load: Callable[[], nn.Module]) -> nn.Module:
    """Loads what --teacher names.

    Args:
        source: folder or Hub id.
        load: loads it.

    Raises:
        ValueError: it is the folder of several networks, or cannot be loaded; says what --teacher takes.
    """
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
            f"'owner/name' on the Hub; check the spelling, a folder is looked for from {str(Path.cwd())!r}."
        ) from error


def publishing(flags: LineageFlags, training: BornAgainTrainingArguments) -> BackgroundPublisher | None:
    """The publisher of a lineage, None without --push_to_hub.

    Raises:
        ValueError: see `hub_settings`.
    """
    settings = hub_settings(flags, training)
    return None if settings is None else BackgroundPublisher(settings, training.hub_token, flags.hub_defer)


def of_generation(training: BornAgainTrainingArguments, generation: Generation) -> BornAgainTrainingArguments:
    """The arguments of one generation's trainer, which knows nothing of the Hub and holds no token.

    Answers of its teacher are kept in the lineage's folder, which deletes them with the generation's checkpoints, or
    where the user says, where they stay.
    """
    own = copy.copy(training)
    if own.teacher_cache == "disk" and own.teacher_cache_dir is None:
        own.teacher_cache_dir = str(Path(training.output_dir) / TEACHER_CACHE_NAME)
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
    """Runs a lineage, printing what it is and what came of it.

    Args:
        runner: of the lineage.
        training: of all generations.
        task: the model and its data, for the first line.
        network: see `how_it_computes`.
        tune_process: whether settings of the whole process may be changed for speed: see `keep_freed_memory`, which
            lasts, and `leaving_old_objects_alone`, which ends with the run.

    Returns:
        The exit status: 1 where something could not be published.

    Raises:
        ValueError: another loss_normalization than "step".
    """
    if training.loss_normalization != "step":
        raise ValueError(
            f"loss_normalization: got {training.loss_normalization!r}, expected 'step', since every generation of a "
            "lineage has the same loss of a step, generation 0 too; leave it out."
        )
    is_main, spec = training.process_index == 0, runner.spec
    if is_main:
        first = "teacher" if spec.teacher is None else spec.teacher
        print(
            f"{task}, {first} + {spec.generations} by {spec.objective}, seed {spec.seed}, into {training.output_dir}"
        )
        print(f"Computed in {how_it_computes(training, network)}")
        if runner.is_finished():
            print("Every generation is trained already; nothing is left to do.")
    if tune_process and training.device.type == "cpu":
        keep_freed_memory()
    with leaving_old_objects_alone() if tune_process else contextlib.nullcontext():
        manifest = runner.run()
    if not is_main:
        return 0
    print(results_table(manifest.content))
    for what, why in runner.unpublished.items():
        print(f"Not published: {what}: {why}", file=sys.stderr)
    if runner.unpublished:
        print(
            f"Everything is trained and safe in {runner.output_dir}; to publish what is missing: born-again "
            f"publish {runner.output_dir}",
            file=sys.stderr,
        )
    return 1 if runner.unpublished else 0


def launch(start: Callable[[], Any]) -> None:
    """Runs a script's start, turning errors of ours into one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger(HTTP_LIBRARY.__name__).setLevel(logging.WARNING)  # a line for each request to the Hub
    try:
        status = start()
    except (ValueError, LineageError, HubError, FloatingPointError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(status)
