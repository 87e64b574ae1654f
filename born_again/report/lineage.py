"""What the report of a lineage shows, read from its folder: lineage.json, kept predictions, histories and names.

torch is not imported. Everything but lineage.json may be missing; what is, is said.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from born_again.lineage.checkpoints import last_checkpoint
from born_again.lineage.history import HISTORY_NAME, History, kept_history, read_history
from born_again.lineage.manifest import LineageError, Manifest
from born_again.lineage.plain_text import one_line
from born_again.lineage.predictions import (
    PREDICTIONS_NAME,
    Predictions,
    ensemble_predictions_name,
    read_predictions,
)
from born_again.lineage.worse import nll_difference

_LONGEST_NAME = 40


@dataclass(frozen=True)
class Score:
    """The metric that the networks of a lineage are compared by.

    Args:
        name: in the metrics of lineage.json.
        title: as it is shown.
        unit: after a number.
        factor: that it is shown times.
        is_higher_better: whether a larger value is better.
    """

    name: str
    title: str
    unit: str = ""
    factor: float = 1
    is_higher_better: bool = False


# The first that is there.
_SCORES = (
    Score("accuracy", "accuracy", "%", 100, True),
    Score("perplexity", "perplexity"),
    Score("nll", "NLL"),
    Score("loss", "loss"),
)


@dataclass
class Network:
    """A generation or an ensemble, as it is shown; scores are in the unit of the lineage's `Score`.

    Attributes:
        name: "gen1", or "mean of 1, 2, 3".
        record: of lineage.json.
        index: of a generation; None for an ensemble.
        parent: the network that it is compared with: its teacher; of an ensemble its newest member.
        predictions: of the split that is shown; None where they are not kept.
        history: of its training.
        score, error: the score and its standard error over the items of the split; None where it is not known.
        gain, gain_error: how much better than `parent`, above 0 where better, and its standard error, that of the
            paired difference where both have predictions.
    """

    name: str
    record: Mapping[str, Any]
    index: int | None = None
    parent: Network | None = None
    predictions: Predictions | None = None
    history: History = field(default_factory=list)
    score: float | None = None
    error: float | None = None
    gain: float | None = None
    gain_error: float | None = None

    @property
    def members(self) -> list[int]:
        return list(self.record.get("members", []))

    @property
    def is_finished(self) -> bool:
        return self.index is None or self.record["status"] == "finished"


@dataclass
class LineageFacts:
    """A lineage as it is shown.

    Attributes:
        content: of lineage.json.
        split: that is shown, "test" where it was measured.
        score: None where no known metric was measured.
        networks: generations in order, then ensembles.
        is_text: whether items are tokens.
        class_name: from the number of a class or token to its name.
        text: from token numbers to their text; None for images and where there is no tokenizer.
        missing: sentences on what cannot be shown, and why.
    """

    content: Mapping[str, Any]
    split: str
    score: Score | None
    networks: list[Network]
    is_text: bool
    class_name: Callable[[int], str]
    text: Callable[[list[int]], str] | None
    missing: list[str]

    @property
    def generations(self) -> list[Network]:
        return [own for own in self.networks if own.index is not None]

    @property
    def ensembles(self) -> list[Network]:
        return [own for own in self.networks if own.index is None]

    @property
    def measured(self) -> list[Network]:
        return [own for own in self.networks if own.score is not None]

    @property
    def pairs(self) -> list[tuple[Network, Network]]:
        """Each student with its teacher, where the predictions of both are kept for the same items."""
        return [
            (own, own.parent)
            for own in self.generations
            if own.parent is not None and are_of_same_items(own.predictions, own.parent.predictions)
        ]


def read_lineage(output_dir: str | Path) -> LineageFacts:
    """Reads what is shown of a lineage; a snapshot where a run is going on.

    Raises:
        FileNotFoundError: there is no lineage.json.
        LineageError: it is wrong; names the field.
    """
    folder = Path(output_dir)
    content = Manifest.read(folder).content
    finished = [record for record in content["generations"] if record["status"] == "finished"]
    splits = [split for record in finished for split, values in record["metrics"].items() if values]
    split = "test" if "test" in splits or not splits else splits[0]
    values = [record["metrics"].get(split, {}) for record in finished]
    score = next((own for own in _SCORES if any(own.name in one for one in values)), None)
    networks, unreadable = _networks(folder, content, split)
    is_text = any("perplexity" in one for one in values) or any(
        "tokens" in (own.predictions or {}) for own in networks
    )
    for own in networks:
        _set_score(own, split, score, _items(content, own, split))
    facts = LineageFacts(content, split, score, networks, is_text, *_names(folder, is_text), missing=unreadable)
    facts.missing += _missing(facts)
    return facts


def _networks(folder: Path, content: Mapping[str, Any], split: str) -> tuple[list[Network], list[str]]:
    generations: list[Network] = []
    problems = []

    def predictions_of(path: Path, weights: Any) -> Predictions | None:
        try:
            own = read_predictions(path, weights).get(split, {})
            # Of no items, nothing can be said.
            return {name: values for name, values in own.items() if len(values)} or None
        except LineageError as error:
            problems.append(str(error))
            return None

    for index, record in enumerate(content["generations"]):
        own, weights = folder / f"gen{index}", record["weights_sha256"]
        parent = None if record["parent"] is None else generations[record["parent"]]
        network = Network(f"gen{index}", record, index, parent)
        if network.is_finished:
            network.predictions = predictions_of(own / PREDICTIONS_NAME, weights)
            network.history = read_history(own / HISTORY_NAME, weights)
        else:
            network.history = _checkpoint_history(folder / "checkpoints" / f"gen{index}")
        generations.append(network)
    ensembles = []
    for record in content.get("ensembles", []):
        members = record["members"]
        network = Network(f"mean of {', '.join(map(str, members))}", record, parent=generations[max(members)])
        path = folder / "ensemble" / ensemble_predictions_name(members)
        network.predictions = predictions_of(path, record["weights_sha256"])
        ensembles.append(network)
    return [*generations, *ensembles], problems


def _checkpoint_history(folder: Path) -> History:
    """Of a generation in training, up to its last checkpoint, which the run may delete meanwhile."""
    if folder.is_dir() and (checkpoint := last_checkpoint(folder)) is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
            return kept_history(state["log_history"])
    return []


def _names(folder: Path, is_text: bool) -> tuple[Callable[[int], str], Callable[[list[int]], str] | None]:
    if is_text:
        from tokenizers import Tokenizer

        for path in sorted(folder.glob("gen*/tokenizer.json")):
            with contextlib.suppress(Exception):  # tokenizers raises nothing more special
                tokenizer = Tokenizer.from_file(str(path))

                def text(numbers: list[int], tokenizer: Any = tokenizer) -> str:
                    return tokenizer.decode(numbers, skip_special_tokens=False)

                return lambda number: one_line(text([number]), _LONGEST_NAME) or f"token {number}", text
        return lambda number: f"token {number}", None
    for path in sorted(folder.glob("gen*/config.json")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            settings = json.loads(path.read_text("utf-8"))
            names = settings.get("label_names") or settings.get("id2label") or {}
            named = (
                dict(enumerate(names)) if isinstance(names, list) else {int(key): own for key, own in names.items()}
            )
            if named:
                return functools.partial(_named, named), None
    return lambda number: f"class {number}", None


def _named(names: Mapping[int, Any], number: int) -> str:
    return one_line(names.get(number, f"class {number}"), _LONGEST_NAME)


def _missing(facts: LineageFacts) -> list[str]:
    found = []
    finished = [own for own in facts.networks if own.is_finished and own.record["metrics"]]
    without = [own.name for own in finished if own.predictions is None]
    if without:
        found.append(
            f"Of {_listed(without)} no predictions on single {'tokens' if facts.is_text else 'items'} of the "
            f"{facts.split} split are kept (predictions.safetensors): what needs them is not shown. Earlier versions, "
            "and lineages that were restored from the Hub, have none."
        )
    blocks_alone = [own.name for own in finished if own.predictions is not None and "label" not in own.predictions]
    if blocks_alone:
        found.append(
            f"Of {_listed(blocks_alone)} the losses of blocks are kept, but no predictions of single tokens, which "
            "earlier versions did not keep: what needs them is not shown."
        )
    trained = [own for own in facts.generations if own.record["objective"] != "external" and own.is_finished]
    without_history = [own for own in trained if not own.history]
    # A restored lineage has neither predictions nor histories; one with predictions logged nothing.
    silent = [own for own in without_history if own.predictions is not None and own.record.get("steps")]
    if silent:
        listed = _listed([f"{own.name} ({own.record['steps']:,} steps)" for own in silent])
        found.append(
            f"Of {listed} no training history is kept (history.json), so no curve is drawn: nothing was logged in so "
            "many steps, which a smaller logging_steps mends, or the file was not copied."
        )
    if without := [own.name for own in without_history if own not in silent]:
        found.append(f"Of {_listed(without)} no training history is kept (history.json), so no curve is drawn.")
    if facts.is_text and facts.text is None:
        found.append("There is no tokenizer (tokenizer.json): tokens are shown by their numbers.")
    return found


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- Scores and their standard errors ----


def are_of_same_items(one: Predictions | None, other: Predictions | None) -> bool:
    """Whether two networks have predictions of single items, of the same ones."""
    return (
        one is not None
        and other is not None
        and "label" in one
        and "label" in other
        and np.array_equal(one["label"], other["label"])
    )


def right(predictions: Predictions) -> np.ndarray:
    """Which items are predicted rightly, (items,) bool."""
    return predictions["label"] == predictions["predicted"]


def _items(content: Mapping[str, Any], network: Network, split: str) -> int | None:
    if network.predictions is not None and "tokens" not in network.predictions:
        return len(network.predictions["label"])
    rows = (content["data"].get("rows") or {}).get(split)
    return rows if isinstance(rows, int) and rows > 0 else None


def _set_score(network: Network, split: str, score: Score | None, items: int | None) -> None:
    """Sets the scores of a network; those of its parent are set before."""
    values = network.record["metrics"].get(split, {}) if network.is_finished else {}
    raw = None if score is None else values.get(score.name)
    if score is None or raw is None:
        return
    value, parent, own = score.factor * raw, network.parent, network.predictions
    network.score = value
    if score.name == "accuracy":
        # With every item right, or none, the estimate would be 0; that the score is exact is not known.
        network.error = None if items is None or not 0 < raw < 1 else 100 * math.sqrt(raw * (1 - raw) / items)
    elif own is not None and "tokens" in own:
        network.error = _scaled(block_error(own), score, value)
    elif own is not None and score.name == "nll" and len(own["nll"]) > 1:
        network.error = float(own["nll"].std(ddof=1)) / math.sqrt(len(own["nll"]))
    if parent is None or parent.score is None:
        return
    network.gain = (value - parent.score) * (1 if score.is_higher_better else -1)
    network.gain_error = _paired_error(network, parent, score)
    is_paired = are_of_same_items(own, parent.predictions)
    if network.gain_error is None and not is_paired and network.error is not None and parent.error is not None:
        network.gain_error = math.hypot(network.error, parent.error)


def _paired_error(network: Network, parent: Network, score: Score) -> float | None:
    own, other = network.predictions, parent.predictions
    if own is None or other is None or network.score is None:
        return None
    if "tokens" in own:
        difference = nll_difference(own, other)
        return None if difference is None else _scaled(difference["standard_error"], score, network.score)
    if not are_of_same_items(own, other) or len(own["label"]) < 2:
        return None
    if score.name == "accuracy":
        differences = 100 * (right(own).astype(float) - right(other))
        if differences.min() == differences.max():  # 0 is no more known than that of one score
            return None
    elif score.name == "nll":
        differences = own["nll"].astype(float) - other["nll"]
    else:
        return None
    return float(differences.std(ddof=1)) / math.sqrt(len(differences))


def block_error(predictions: Predictions) -> float | None:
    """The standard error of the mean loss of a text, in nats per token, over its blocks; None for fewer than two."""
    zero = {"nll_sum": np.zeros_like(predictions["nll_sum"]), "tokens": predictions["tokens"]}
    difference = nll_difference(predictions, zero)
    return None if difference is None else difference["standard_error"]


def _scaled(error: float | None, score: Score, value: float) -> float | None:
    """The error of a perplexity from that of its logarithm."""
    return None if error is None else error * value if score.name == "perplexity" else error


# ---- What changed ----


@dataclass(frozen=True)
class Changes:
    """How the predictions of a student differ from its teacher's.

    Attributes:
        items: compared.
        both_right, both_wrong, lost, won: numbers of items; lost are those that only the teacher, won those that only
            the student predicts rightly.
        agreement: share of items with the same prediction.
        p: two-sided exact test of McNemar (1947): how likely counts at least as uneven are where neither is better;
            None where nothing changed.
    """

    items: int
    both_right: int
    both_wrong: int
    lost: int
    won: int
    agreement: float
    p: float | None


def changes(student: Predictions, teacher: Predictions) -> Changes:
    """Compares predictions of the same items."""
    from scipy.special import bdtr

    ours, theirs = right(student), right(teacher)
    lost, won = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    return Changes(
        items=len(ours),
        both_right=int((ours & theirs).sum()),
        both_wrong=int((~ours & ~theirs).sum()),
        lost=lost,
        won=won,
        agreement=float((student["predicted"] == teacher["predicted"]).mean()),
        p=min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5))) if won + lost else None,
    )


def changed_items(student: Predictions, teacher: Predictions, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that only the teacher, and that only the student predicts rightly, at most `most` of each.

    Those come first of which the wrong network gives the label the least probability.

    Returns:
        Two arrays of item numbers, int64.
    """
    ours, theirs = right(student), right(teacher)
    lost, won = np.flatnonzero(theirs & ~ours), np.flatnonzero(ours & ~theirs)
    return (
        lost[np.argsort(-student["nll"][lost], kind="stable")][:most],
        won[np.argsort(-teacher["nll"][won], kind="stable")][:most],
    )


def class_scores(predictions: Predictions, is_text: bool) -> dict[int, tuple[float, float | None, int]]:
    """By class: accuracy in percent, or mean loss in nats of a token; its standard error; the number of items.

    The standard error is None of one item, and where all items of a class are right, or all wrong.
    """
    labels = predictions["label"]
    values = predictions["nll"].astype(np.float64) if is_text else 100.0 * right(predictions)
    found = {}
    for number in np.unique(labels):
        own = values[labels == number]
        is_known = len(own) > 1 and (is_text or own.min() < own.max())
        error = float(own.std(ddof=1)) / math.sqrt(len(own)) if is_known else None
        found[int(number)] = (float(own.mean()), error, len(own))
    return found


def shown_classes(first: Predictions, last: Predictions, is_text: bool, most: int) -> list[int]:
    """The classes that are shown; of many those whose items together changed most from `first` to `last`."""
    before, after = class_scores(first, is_text), class_scores(last, is_text)
    if len(before) <= most:
        return sorted(before)
    weight = {number: abs(after[number][0] - own[0]) * own[2] for number, own in before.items()}
    return sorted(weight, key=lambda number: (-weight[number], number))[:most]
