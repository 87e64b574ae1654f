"""What a training logged, kept beside its generation for the report: losses, learning rate, metrics by step.

It is never published, and lineages without it are complete. torch is not imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from born_again._files import write_atomically

HISTORY_NAME = "history.json"
MAX_ENTRIES = 1_000
# Times and what Trainer sums up at the end, which are other after a training was resumed.
_LEFT_OUT = ("runtime", "per_second", "preparation_time", "total_flos", "train_loss")

History = list[dict[str, float | None]]


def kept_history(log_history: Sequence[Mapping[str, Any]]) -> History:
    """The numbers of a log history without times, and at most `MAX_ENTRIES` entries beside those of evaluations.

    Args:
        log_history: of a trainer's state.

    Returns:
        Entries with "step"; None for what is not finite. Of more entries every second is kept, or every third ...
    """
    kept: History = []
    for entry in log_history:
        numbers = {name: _number(value) for name, value in entry.items() if _is_kept(name, value)}
        if "step" in numbers and numbers.keys() - {"step", "epoch"}:
            kept.append(numbers)
    every = math.ceil(sum(not _is_evaluation(entry) for entry in kept) / MAX_ENTRIES)
    places = iter(range(len(kept)))
    return [entry for entry in kept if _is_evaluation(entry) or next(places) % every == 0]


def write_history(path: Path, log_history: Sequence[Mapping[str, Any]], weights_sha256: str) -> None:
    """Writes the history of a generation; nothing where there is none.

    Args:
        path: of the file, replaced atomically.
        log_history: see `kept_history`.
        weights_sha256: of the network.

    Raises:
        OSError: the file cannot be written.
    """
    if kept := kept_history(log_history):
        text = json.dumps({"weights_sha256": weights_sha256, "log_history": kept}, allow_nan=False)
        write_atomically(path, text + "\n")


def read_history(path: Path, weights_sha256: str) -> History:
    """Reads the history of a generation.

    Returns:
        [] where there is none, where it is of other weights, or where it cannot be read.
    """
    if not path.is_file() or path.is_symlink():
        return []
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["weights_sha256"] != weights_sha256:
            return []
        return kept_history(content["log_history"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _is_kept(name: str, value: Any) -> bool:
    is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return isinstance(name, str) and is_number and not name.endswith(_LEFT_OUT)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _is_evaluation(entry: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in entry)
