"""The ensembles that a runner measures once its generations are trained: the paper's Ens*2 and Ens*3."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from born_again.lineage.ensemble import LineageEnsemble
from born_again.lineage.evaluation import finite
from born_again.lineage.manifest import Manifest
from born_again.lineage.processes import on_first_process

logger = logging.getLogger(__name__)

FOLDER = "ensemble"
_AVERAGE = "probabilities"


def missing_ensembles(manifest: Manifest, counts: Sequence[int]) -> list[list[int]]:
    """The newest students, so many of them, that the manifest has no ensemble of.

    Args:
        manifest: of the lineage.
        counts: how many members each ensemble has; one with more than there are students is left out.

    Returns:
        Indices of the members of each.
    """
    students = [record["index"] for record in manifest.generations if record["parent"] is not None]
    known = [(record["members"], record["average"]) for record in manifest.content.get("ensembles", [])]
    wanted = [students[-count:] for count in sorted(set(counts)) if 1 <= count <= len(students)]
    return [members for members in wanted if (members, _AVERAGE) not in known]


def measure_ensemble(
    manifest: Manifest,
    members: Sequence[int],
    evaluate: Callable[[nn.Module], Mapping[str, Mapping[str, float]]],
    write_card: Callable[[Mapping[str, Any], Mapping[str, Any]], str] | None = None,
) -> None:
    """Measures the mean probability of some generations as a generation is measured, and saves it.

    Its record goes into the manifest, which the caller writes; OUTPUT_DIR/ensemble, which holds no weights, becomes
    this ensemble. Networks that `load_generation` does not load are warned of, and recorded without metrics.

    Args:
        manifest: of the lineage, its generations finished.
        members: their indices.
        evaluate: from a network to metrics by split.
        write_card: see `LineageEnsemble.save_pretrained`.

    Raises:
        LineageError: a member's weights are missing or changed.
    """
    folder = Path(manifest.path).parent
    try:
        ensemble = LineageEnsemble.from_lineage(folder, members, _AVERAGE)
    except ValueError as error:
        logger.warning("The ensemble of generations %s is not measured: %s", members, error)
        metrics = {}
    else:
        metrics = {split: finite(values) for split, values in evaluate(ensemble).items()}
        on_first_process(lambda: ensemble.save_pretrained(folder / FOLDER, metrics, write_card))
    record = {
        "members": list(members),
        "average": _AVERAGE,
        "weights_sha256": [manifest.generations[index]["weights_sha256"] for index in members],
        "metrics": metrics,
    }
    with manifest.lock:
        manifest.content.setdefault("ensembles", []).append(record)
