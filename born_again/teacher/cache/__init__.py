"""The teacher cache: outputs in memory or on disk, each under the cache key of the view it belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from born_again.teacher import FrozenTeacher
from born_again.teacher.cache.cached_teacher import CachedTeacher, has_view_keys
from born_again.teacher.cache.outputs import CachedOutputs, cache_identity
from born_again.teacher.cache.samples import CachedRows
from born_again.teacher.cache.windows import CachedWindows

if TYPE_CHECKING:
    from born_again.training.arguments import BornAgainTrainingArguments


FOLDER_NAME = "teacher_cache"


def check_cache_keys(args: Any, dataset: Any) -> None:
    """Checks that the samples of a training set have the keys that a teacher cache needs.

    Args:
        args: of the training; without a teacher_cache nothing is asked of the dataset.
        dataset: the training set.

    Raises:
        ValueError: they have none.
    """
    if getattr(args, "teacher_cache", "off") != "off" and not has_view_keys(dataset):
        raise ValueError(
            f"teacher_cache: got {args.teacher_cache!r} beside a training set ({type(dataset).__name__}) whose "
            "samples have no keys, expected born_again.data's ImageDataset or TokenStreams, or a dataset with "
            "emit_view_keys, view_count and cache_fingerprint (see born_again.teacher.cache.cached_teacher); "
            "or use 'off'."
        )


def with_teacher_cache(
    teacher: FrozenTeacher, args: BornAgainTrainingArguments, dataset: Any
) -> FrozenTeacher | CachedTeacher:
    """The teacher, with a cache where the arguments ask for one.

    Args:
        teacher: on its device.
        args: of the training.
        dataset: the training set; None where nothing is trained.

    Raises:
        ValueError: a training set without cache keys; a folder that cannot be made.
    """
    if args.teacher_cache == "off" or dataset is None:
        return teacher
    check_cache_keys(args, dataset)
    folder = None
    if args.teacher_cache == "disk":
        folder = Path(args.teacher_cache_dir or Path(args.output_dir) / FOLDER_NAME)
    rows = args.train_batch_size // (args.world_size if args.accelerator_config.split_batches else 1)
    rows = max(1, min(rows, -(-len(dataset) // args.world_size)))

    networks = list(teacher.modules)  # as given: folded copies are made from them, and `facts` says how

    def identify() -> dict[str, Any]:
        return cache_identity(
            networks,
            dataset.cache_fingerprint,
            teacher.device,
            batch_rows=rows,
            channels_last=args.channels_last,
            teacher=teacher.facts,
        )

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    outputs = CachedOutputs(folder, dataset.view_count, args.teacher_cache_limit_gib, processes, identify)
    if hasattr(dataset, "streams"):
        return CachedWindows(teacher, outputs, rows, dataset.streams, dataset.window)
    return CachedRows(teacher, outputs, rows)
