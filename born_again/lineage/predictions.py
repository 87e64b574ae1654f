"""The predictions that a generation or ensemble was evaluated by, kept beside it for statistics over test items.

A few bytes an item, as safetensors; they are never published, and lineages without them are complete. torch is not
imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from born_again._files import write_atomically
from born_again.lineage.manifest import LineageError

PREDICTIONS_NAME = "predictions.safetensors"
# 16 MB of images; of a larger split nothing is kept.
MAX_ITEMS = 1_000_000
# Of a text, from its begin: 260 kB.
MAX_TOKENS = 16_384
_IMAGES = {"label": np.int32, "predicted": np.int32, "nll": np.float32, "confidence": np.float32}
_TEXT = {"nll_sum": np.float64, "tokens": np.int32}

Predictions = dict[str, np.ndarray]


class SplitMetrics(dict[str, float]):
    """Metrics of a split by name, and the predictions that they were computed from.

    Attributes:
        predictions: of images, (items,) each: label and predicted (class numbers), nll (of the label, in nats),
            confidence (probability of the predicted class). Of text, (blocks,) each, in the order of the text: nll_sum
            (in nats) and tokens of a block of consecutive tokens; and the columns of images, (tokens,) each, of no
            more than `MAX_TOKENS` tokens from its begin (earlier versions did not keep them). None for more than
            `MAX_ITEMS`.
    """

    def __init__(self, metrics: Mapping[str, float], predictions: Predictions) -> None:
        super().__init__(metrics)
        parts = [
            {name: predictions[name].astype(kind) for name, kind in layout.items()} for layout in _parts(predictions)
        ]
        self.predictions = {name: values for part in parts for name, values in part.items()}
        if item_count(self.predictions) > MAX_ITEMS:
            self.predictions = None


def item_count(predictions: Predictions) -> int:
    """How many images a split has, or blocks of a text, whose columns of single tokens have another length."""
    return len(_items(predictions))


def are_of_same_split(one: Predictions, other: Predictions) -> bool:
    """Whether two networks were evaluated on the same images, or the same blocks of a text."""
    return ("tokens" in one) == ("tokens" in other) and np.array_equal(_items(one), _items(other))


def _items(predictions: Predictions) -> np.ndarray:
    return predictions["tokens" if "tokens" in predictions else "label"]


def predictions_by_split(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Predictions]:
    """The predictions of every split whose metrics have them."""
    found = {split: getattr(values, "predictions", None) for split, values in metrics.items()}
    return {split: predictions for split, predictions in found.items() if predictions is not None}


def ensemble_predictions_name(members: Sequence[int]) -> str:
    """The file of an ensemble's predictions, in OUTPUT_DIR/ensemble, where every measured ensemble keeps its own."""
    return f"predictions-{'-'.join(map(str, members))}.safetensors"


def write_predictions(path: Path, predictions: Mapping[str, Predictions], weights_sha256: str | Sequence[str]) -> None:
    """Writes predictions by split; nothing where there are none.

    Args:
        path: of the file, replaced atomically.
        predictions: by split.
        weights_sha256: of the network, or of the members of an ensemble in order.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    if not predictions:
        return
    arrays = {f"{split}.{name}": values for split, own in predictions.items() for name, values in own.items()}
    write_atomically(path, save(arrays, metadata={"weights_sha256": _joined(weights_sha256)}))


def read_predictions(path: Path, weights_sha256: str | Sequence[str]) -> dict[str, Predictions]:
    """Reads predictions by split.

    Args:
        path: of the file.
        weights_sha256: as they were written with.

    Returns:
        {} where there is no such file, or where it is of other weights.

    Raises:
        LineageError: the file cannot be read, or does not hold predictions.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file() or path.is_symlink():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("weights_sha256") != _joined(weights_sha256):
                return {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, str(error)) from error
    found: dict[str, Predictions] = {}
    for name, values in arrays.items():
        split, _, column = name.rpartition(".")
        found.setdefault(split, {})[column] = values
    for split, own in found.items():
        if not _is_complete(own):
            raise _unreadable(path, f"the split {split!r} has other columns, types or shapes")
    return found


def _parts(predictions: Predictions) -> list[dict[str, Any]]:
    """The layouts of columns of equal length: of images one, of text that of its blocks and that of its tokens."""
    if "tokens" not in predictions:
        return [_IMAGES]
    return [_TEXT, *([_IMAGES] if predictions.keys() & _IMAGES.keys() else [])]


def _is_complete(own: Predictions) -> bool:
    parts = _parts(own)
    if {name: values.dtype for name, values in own.items()} != {n: kind for part in parts for n, kind in part.items()}:
        return False
    shapes = [{own[name].shape for name in part} for part in parts]
    return all(len(found) == 1 and len(found.pop()) == 1 for found in shapes)


def _joined(weights_sha256: str | Sequence[str]) -> str:
    return weights_sha256 if isinstance(weights_sha256, str) else " ".join(weights_sha256)


def _unreadable(path: Path, why: str) -> LineageError:
    return LineageError(f"{path}: holds no predictions that can be read ({why}); restore the file, or delete it.")
