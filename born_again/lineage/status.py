"""The state of a lineage, read from its folder alone: results, progress, the running process and the next action.

Nothing is written and no network is loaded; torch is not imported.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from born_again.lineage.checkpoints import last_checkpoint
from born_again.lineage.lock import LOCK_NAME, lock_holder
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256, seed_folders
from born_again.lineage.spec import EXTERNAL
from born_again.lineage.worse import is_clearly_worse, worse_than_teacher

Metrics = Mapping[str, Mapping[str, float | None]]
# Column -> split, metric, factor and format; empty where a record does not have the metric.
_IMAGES = {
    "accuracy": ("test", "accuracy", 100, ".2f"),
    "error": ("test", "error", 100, ".2f"),
    "NLL": ("test", "nll", 1, ".4f"),
    "ECE": ("test", "ece", 100, ".2f"),
}
_TEXT = {
    "valid. ppl": ("validation", "perplexity", 1, ".2f"),
    "test ppl": ("test", "perplexity", 1, ".2f"),
    "test NLL": ("test", "nll", 1, ".4f"),
}
_UNBOUNDED = ("nll", "perplexity")
# As in born_again.lineage.folders, which is not imported since the command line should start fast.
WEIGHTS_NAME = "model.safetensors"
CHECKPOINTS_NAME = "checkpoints"
_SET_ASIDE = re.compile(r".+\.replaced-[0-9]+(\.json)?")
_ATTEMPTS = 3


def lineages_in(folder: str | Path) -> list[Path]:
    """The folders of lineages that a folder stands for: itself, or its seedN in the order of seeds.

    Args:
        folder: of a lineage, or with those of several seeds.

    Returns:
        One path or more; the folder itself where it holds neither.
    """
    folder = Path(folder)
    return [folder] if (folder / MANIFEST_NAME).is_file() else seed_folders(folder) or [folder]


def lineage_status(output_dir: str | Path, verify: bool = False) -> dict[str, Any]:
    """The state of a lineage, as JSON values; a snapshot where a run is going on.

    Nothing is written and no run is disturbed, so it can be called while a run is going on.

    Args:
        output_dir: the lineage's folder; one that a run has just made is a lineage without generations.
        verify: also hashes the weights of the finished generations, which takes as long as reading them.

    Returns:
        output_dir: as given.
        name, model, student_model, dataset, objective, seed: of the spec; None where there is no lineage.json yet.
        control: of the spec, "equal-compute" or "seeds"; None for a lineage.
        students: their number in the spec, without the teacher; None likewise.
        stopped_when_worse: None, or generations, the number of students that were asked for before the last was found
            clearly worse than its teacher.
        running: None, or the process that holds the folder: pid, host, since (ISO 8601, UTC), command, each None where
            it is not known, and certain (False where the system has no locks, so the run may have ended).
        generations: a list of all that the spec asks for:
            index, parent, objective, seed: the last is None where it is not known.
            status: "finished"; "training", while the folder is held; "interrupted"; or "waiting".
            metrics: by split, {} until it is finished; a number that was not finite is None.
            gain: over its own teacher, in percentage points of test accuracy, or by how much the test perplexity is
                lower; None where there is no such pair of numbers.
            worse: sentences on a student that is clearly worse than its teacher, with the likely reason; else None.
            seconds: of training so far. steps: of the optimiser, None until it is finished.
            weights: "present", "missing", "changed" (only seen with `verify`), None until it is finished.
            hub: the record's, an object or None. published: whether the generation is on the Hub.
            checkpoint: the last complete one of an unfinished generation: name, step, max_steps (None where it is
                not known); else None.
        ensembles: a list of members, average, metrics, weights_sha256, published.
        unpublished: indices of finished generations that are not on the Hub.
        missing_weights, changed_weights: indices of finished generations.
        set_aside: names of files and folders that a restart replaced or that were moved out of the way.
        next: what the same command would do once no run holds the folder: action ("nothing", "train", "resume",
            "refuse"), generation, checkpoint (each None where there is none), and text, the same as a sentence.

    Raises:
        FileNotFoundError: there is no such folder.
        LineageError: it is no folder of a lineage, or its lineage.json is wrong; names the field.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"output_dir: {folder} is no folder, expected that of a lineage; check the spelling.")
    # The lock before the manifest: a run writes the manifest before it releases the lock.
    running = lock_holder(folder)
    try:
        manifest = Manifest.read(folder)
    except FileNotFoundError:
        _check_new_folder(folder)
        manifest = None
    spec = None if manifest is None else manifest.spec
    generations = [] if manifest is None else _generations(manifest, folder, running is not None, verify)
    finished = [facts for facts in generations if facts["status"] == "finished"]
    return {
        "output_dir": str(output_dir),
        "name": spec and spec.name,
        "model": spec and spec.model,
        "student_model": spec and spec.student_model,
        "dataset": spec and spec.dataset,
        "objective": spec and spec.objective,
        "seed": spec and spec.seed,
        "control": spec and spec.control,
        "students": spec and spec.generations,
        "stopped_when_worse": None if manifest is None else manifest.content.get("stopped_when_worse"),
        "running": running,
        "generations": generations,
        "ensembles": []
        if manifest is None
        else [_ensemble(entry, manifest) for entry in manifest.content.get("ensembles", [])],
        "unpublished": [facts["index"] for facts in finished if not facts["published"]],
        "missing_weights": [facts["index"] for facts in finished if facts["weights"] == "missing"],
        "changed_weights": [facts["index"] for facts in finished if facts["weights"] == "changed"],
        "set_aside": _set_aside(folder),
        "next": _next_action(generations, manifest),
    }


def _check_new_folder(folder: Path) -> None:
    # A new run writes its lock first, then the manifest under a temporary name.
    others = [path for path in folder.iterdir() if path.name not in (LOCK_NAME, MANIFEST_NAME)]
    if any(not path.name.startswith(f".{MANIFEST_NAME}.") for path in others):
        raise LineageError(
            f"output_dir: {folder} has no {MANIFEST_NAME}, expected the folder of a lineage; give the output_dir that "
            "the lineage was trained into."
        )


def _generations(manifest: Manifest, folder: Path, is_running: bool, verify: bool) -> list[dict[str, Any]]:
    spec, found = manifest.spec, []
    for index in range(max(spec.generations + 1, len(manifest.generations))):
        record = manifest.record(index)
        facts: dict[str, Any] = {
            "index": index,
            "status": "waiting",
            "objective": spec.objective_of(index),
            "seed": spec.seed_of(index),
            "parent": spec.parent_of(index),
            "metrics": {},
            "gain": None,
            "worse": None,
            "seconds": 0.0,
            "steps": None,
            "weights": None,
            "hub": None,
            "published": False,
            "checkpoint": None,
        }
        if record is not None:
            known = ("status", "objective", "seed", "parent", "metrics", "seconds", "steps", "hub")
            facts |= {name: record[name] for name in known if name in record}
            facts["published"] = _is_published(record)
            if facts["status"] == "finished":
                facts["weights"] = _weights(folder / f"gen{index}" / WEIGHTS_NAME, record["weights_sha256"], verify)
                facts["gain"] = _gain_over(record, found)
                facts["worse"] = " ".join(worse_than_teacher(manifest.content, index)) or None
            else:
                facts["status"] = "training" if is_running else "interrupted"
                facts["checkpoint"] = _checkpoint(folder / CHECKPOINTS_NAME / f"gen{index}")
        found.append(facts)
    return found


def _is_published(record: Mapping[str, Any]) -> bool:
    hub = record.get("hub")
    return isinstance(hub, Mapping) and hub.get("status") == "published"


def _weights(path: Path, expected: str, verify: bool) -> str:
    if not path.is_file():
        return "missing"
    return "present" if not verify or file_sha256(path) == expected else "changed"


def _gain_over(record: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> float | None:
    if record["parent"] is None:
        return None
    ours, theirs = (own["metrics"].get("test", {}) for own in (record, earlier[record["parent"]]))
    # In the order of results_table.
    for name, points in (("perplexity", -1), ("accuracy", 100)):
        if ours.get(name) is not None and theirs.get(name) is not None:
            return points * (ours[name] - theirs[name])
    return None


def _checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last complete checkpoint; a running training may delete it meanwhile, hence several attempts."""
    if not folder.is_dir():
        return None
    for _ in range(_ATTEMPTS):
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            steps = state.get("max_steps") if isinstance(state, dict) else None
            step = int(checkpoint.name.rpartition("-")[2])
            return {"name": checkpoint.name, "step": step, "max_steps": steps if type(steps) is int else None}
    return None


def _set_aside(folder: Path) -> list[str]:
    paths = [*folder.iterdir(), *(folder / CHECKPOINTS_NAME).glob("*")]
    return sorted(path.relative_to(folder).as_posix() for path in paths if _SET_ASIDE.fullmatch(path.name))


def _ensemble(entry: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    known = ("members", "average", "metrics", "weights_sha256")
    state = manifest.content.get("hub", {}).get("ensemble", {})
    published = state.get("status") == "published" and state.get("weights_sha256") == entry.get("weights_sha256")
    return {**{name: entry.get(name) for name in known}, "published": published}


def _next_action(generations: Sequence[Mapping[str, Any]], manifest: Manifest | None) -> dict[str, Any]:
    action, index, checkpoint = "nothing", None, None
    spec = None if manifest is None else manifest.spec
    if manifest is None:
        action, index = "train", 0
        text = "train generation 0 from its start"
    elif "stopped_when_worse" in manifest.content:
        text = (
            f"nothing: stopped after generation {len(generations) - 1} of "
            f"{manifest.content['stopped_when_worse']['generations']}, which is clearly worse than its teacher "
            "(--stop_when_worse); without that flag the same command goes on"
        )
    else:
        count = len(generations)
        text = f"nothing: all {count} generations are trained" if count > 1 else "nothing: the teacher is trained"
    for facts in generations:
        place = f"gen{facts['index']}/{WEIGHTS_NAME}"
        if facts["status"] == "finished" and facts["weights"] == "present":
            continue
        index = facts["index"]
        if facts["status"] == "finished":
            wrong = "is missing" if facts["weights"] == "missing" else f"does not hash to what {MANIFEST_NAME} holds"
            action, text = "refuse", f"refuse: {place} {wrong}; put the file back"
        elif facts["checkpoint"] is not None:
            action, checkpoint = "resume", facts["checkpoint"]["name"]
            text = f"resume generation {index} from {checkpoint}"
        elif index == 0 and spec is not None and spec.teacher is not None:
            action, text = "train", f"take {spec.teacher} as generation 0"
        else:
            action, text = "train", f"train generation {index} from its start"
        break
    return {"action": action, "generation": index, "checkpoint": checkpoint, "text": text}


# ---- The table of results ----


def results_table(manifest: Mapping[str, Any]) -> str:
    """A Markdown table, a line for each finished generation.

    Images: accuracy, error and calibration error are in percent, NLL in nats per item, and the gain is in percentage
    points of accuracy over the generation's own teacher. Text: perplexities are per word, NLL in nats per word, and
    the gain is by how much the test perplexity fell below the teacher's. Seconds are of training. Evaluated
    ensembles follow; their gain is over their newest member. The cell of a metric that was not measured is empty. A
    star beside the gain means clearly worse than the teacher, see `born_again.lineage.worse`.

    Args:
        manifest: the content of lineage.json.
    """
    finished = [record for record in manifest["generations"] if record["status"] == "finished"]
    is_text = any("perplexity" in values for record in finished for values in record["metrics"].values())
    columns = _TEXT if is_text else _IMAGES
    # Where students have another architecture than the first teacher, a column names it.
    spec = manifest.get("spec") or {}
    student_model = spec.get("student_model")

    def model_cell(text: str) -> tuple[str, ...]:
        return () if student_model is None else (text,)

    rows = [("generation", *model_cell("model"), "objective", "seed", *columns, "seconds", "gain")]
    scores: dict[int | None, float | None] = {}
    control = spec.get("control")
    for record in finished:
        score = scores[record["index"]] = _score(record["metrics"])
        rows.append(
            (
                str(record["index"]) + (" (teacher)" if record["parent"] is None and not control else ""),
                *model_cell(_architecture(record, spec)),
                record["objective"],
                "" if record["seed"] is None else str(record["seed"]),
                *_cells(record["metrics"], columns),
                "" if record["objective"] == EXTERNAL else f"{record['seconds']:.0f}",
                _gain(score, scores.get(record["parent"]))
                + (" *" if is_clearly_worse(manifest, record["index"]) else ""),
            )
        )
    for ensemble in manifest.get("ensembles", []):
        if not ensemble["metrics"]:
            continue
        rows.append(
            (
                f"mean of {', '.join(map(str, ensemble['members']))}",
                *model_cell(""),
                "ensemble",
                "",
                *_cells(ensemble["metrics"], columns),
                "",
                _gain(_score(ensemble["metrics"]), scores.get(ensemble["members"][-1])),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _architecture(record: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """Empty for a network trained elsewhere, whose architecture is not known."""
    if record["objective"] == EXTERNAL:
        return ""
    return str(spec.get("model" if record["parent"] is None else "student_model"))


def _cells(metrics: Metrics, columns: Mapping[str, tuple[str, str, int, str]]) -> list[str]:
    values = [(_number(metrics, split, name), factor, form) for split, name, factor, form in columns.values()]
    return ["" if value is None else f"{factor * value:{form}}" for value, factor, form in values]


def _number(metrics: Metrics, split: str, name: str) -> float | None:
    """None where it was not measured; a null of the manifest is infinity, which JSON does not have."""
    values = metrics.get(split, {})
    value = values.get(name)
    return math.inf if value is None and name in values and name in _UNBOUNDED else value


def _score(metrics: Metrics) -> float | None:
    """A number that is higher for a better generation."""
    perplexity, accuracy = _number(metrics, "test", "perplexity"), _number(metrics, "test", "accuracy")
    if perplexity is not None:
        return -perplexity
    return None if accuracy is None else 100 * accuracy


def _gain(score: float | None, teacher: float | None) -> str:
    if score is None or teacher is None or math.isnan(score - teacher):  # nan: neither is finite
        return ""
    return f"{score - teacher:+.2f}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
