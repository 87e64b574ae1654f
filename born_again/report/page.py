"""The report of a lineage: report.html, one file that needs nothing else, and the picture report.png.

The page has no scripts and a policy that forbids them; every text from users is escaped. It says what it cannot show.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from born_again._files import write_atomically
from born_again.lineage.folders import REPORT_IMAGES_NAME, REPORT_NAME, REPORT_PICTURE_NAME
from born_again.lineage.plain_text import last_part, local_name, one_line, without_folders
from born_again.lineage.worse import worse_than_teacher
from born_again.report import lineage_figures as figures
from born_again.report.lineage import (
    LineageFacts,
    Network,
    changed_items,
    changes,
    class_scores,
    read_lineage,
    shown_classes,
)

if TYPE_CHECKING:
    from jinja2 import Environment

# Of a generation at most 12 that only its teacher, and 12 that only it predicts rightly.
MOST_EXAMPLES = 12
IMAGE_SIDE = 32  # pixels; larger images are shrunk
_LONGEST = 1_000  # letters of a text
_CONTEXT = 12  # tokens before a predicted one

# From item numbers of the test split, (n,) int64, to as many images, each a PIL image or (height, width, 3) uint8.
Images = Callable[[np.ndarray], Sequence[Any]]


def write_report(output_dir: str | Path, images: Images | None = None) -> list[Path]:
    """Writes report.html and report.png of a lineage, finished or not.

    The same lineage gives the same bytes with the same versions of matplotlib and pillow.

    Args:
        output_dir: of the lineage.
        images: gives images of the test split, of which small ones are kept in report_images.safetensors: at most 24
            a generation, 32 pixels wide and high. Without it those kept before are shown.

    Returns:
        The paths that were written; without report.png where nothing was measured.

    Raises:
        FileNotFoundError: there is no lineage.json.
        LineageError: it is wrong; names the field.
        OSError: the folder cannot be written; what was there is intact.
    """
    folder = Path(output_dir)
    facts = read_lineage(folder)
    thumbnails = _thumbnails(folder / REPORT_IMAGES_NAME, facts, images)
    written = [folder / REPORT_NAME]
    write_atomically(written[0], render_report(facts, thumbnails))
    drawn = figures.picture(facts)
    if drawn is not None:
        write_atomically(folder / REPORT_PICTURE_NAME, drawn)
        written.append(folder / REPORT_PICTURE_NAME)
    return written


def render_report(facts: LineageFacts, thumbnails: Mapping[str, Mapping[int, np.ndarray]] | None = None) -> str:
    """The page.

    Args:
        facts: of the lineage.
        thumbnails: by the name of a student, images of items, (height, width, 3) uint8 each.
    """
    content, spec = facts.content, facts.content["spec"]
    missing = list(facts.missing)
    pairs = facts.pairs
    examples = [_examples(facts, student, teacher, thumbnails or {}) for student, teacher in pairs]
    if pairs and not facts.is_text and not any(one["image"] for own in examples for one in own["lost"] + own["won"]):
        if any(own["lost"] or own["won"] for own in examples):
            missing.append(_without_images(content["data"].get("unit")))
    drawn = {
        "wide": figures.svg(lambda: figures.draw_tree(facts, figures.WIDE), "wide"),
        "narrow": figures.svg(lambda: figures.draw_tree(facts, figures.NARROW), "narrow"),
        "curves": figures.svg(lambda: figures.draw_curves(facts), "curves"),
        "reliability": figures.svg(lambda: figures.draw_reliability(facts), "reliability"),
        "confidence": figures.svg(lambda: figures.draw_confidence(facts), "confidence"),
        "changes": figures.svg(lambda: figures.draw_changes(facts), "changes"),
        "classes": figures.svg(lambda: figures.draw_classes(facts), "classes"),
        "norms": figures.svg(lambda: figures.draw_norms(facts), "norms"),
    }
    text = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            content=content,
            spec=spec,
            figures=drawn,
            rows=[_row(facts, own) for own in facts.networks],
            worse=[
                " ".join(worse_than_teacher(content, index))
                for index, own in enumerate(facts.generations)
                if own.is_finished
            ],
            clear=[own for own in facts.networks if own.index is not None and _is_clear(own)],
            students=[own for own in facts.generations if own.gain is not None],
            changes=[(student, teacher, _changes(student, teacher)) for student, teacher in pairs],
            examples=examples,
            classes=_classes(facts),
            calibration=[(own, figures.ece(own)) for own in facts.networks if "label" in (own.predictions or {})],
            missing=missing,
            versions=_versions(facts),
            item="token" if facts.is_text else _item(content["data"]),
        )
    )
    return text.rstrip() + "\n"


# ---- What the template shows ----


def _row(facts: LineageFacts, network: Network) -> dict[str, Any]:
    record = network.record
    metrics = record["metrics"] if network.is_finished else {}
    return {
        "network": network,
        "status": "" if network.is_finished else "in training",
        "objective": "" if network.index is None else record["objective"],
        "seed": "" if network.index is None or record["seed"] is None else str(record["seed"]),
        "score": figures.with_error(network.score, network.error),
        "nll": figures.number(metrics.get(facts.split, {}).get("nll"), 4),
        "ece": figures.number(_times(100, metrics.get(facts.split, {}).get("ece"))),
        "validation": figures.number(_validation(facts, metrics)),
        "gain": figures.with_error(network.gain, network.gain_error, "+"),
        "verdict": _verdict(network),
    }


def _item(data: Mapping[str, Any]) -> str:
    known = {"images": "image", "texts": "text"}
    return known.get(str(data.get("unit")), "image" if "image_column" in data else "item")


def _without_images(unit: Any) -> str:
    by_number = "Items are shown by their numbers."
    if unit is None:
        return (
            "No images of changed items are kept (report_images.safetensors): a run keeps them, and they are "
            f"neither published nor read again by born-again report. {by_number}"
        )
    if unit == "images":  # of Lineage, which gives the report none
        return (
            "No images of changed items are kept (report_images.safetensors): Lineage keeps none, and "
            f"born_again.report.page.write_report(output_dir, images) does. {by_number}"
        )
    return f"No {'texts' if unit == 'texts' else 'contents'} of changed items are kept. {by_number}"


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _validation(facts: LineageFacts, metrics: Mapping[str, Mapping[str, float | None]]) -> float | None:
    if facts.score is None or facts.split == "validation":
        return None
    return _times(facts.score.factor, metrics.get("validation", {}).get(facts.score.name))


def _is_clear(network: Network) -> bool:
    gain, error = network.gain, network.gain_error
    return gain is not None and error is not None and gain != 0 and abs(gain) > 2 * error


def _verdict(network: Network) -> str:
    if network.gain is None or network.parent is None:
        return ""
    over = network.parent.name
    if network.gain_error is None:
        return f"compared with {over}; no standard error is known"
    if not _is_clear(network):
        return f"within two standard errors of {over}"
    return f"{'better' if network.gain > 0 else 'worse'} than {over} by more than two standard errors"


def _changes(student: Network, teacher: Network) -> Any:
    assert student.predictions is not None and teacher.predictions is not None
    return changes(student.predictions, teacher.predictions)


def _classes(facts: LineageFacts) -> dict[str, Any] | None:
    pair = figures.class_pair(facts)
    if pair is None:
        return None
    first, last = pair
    assert first.predictions is not None and last.predictions is not None
    known = [own for own in facts.generations if own.predictions is not None and "label" in own.predictions]
    known = [*known[:1], *known[1:][-5:]]
    numbers = shown_classes(first.predictions, last.predictions, facts.is_text, figures.MOST_CLASSES)
    scores = [class_scores(own.predictions, facts.is_text) for own in known if own.predictions is not None]
    return {
        "first": first,
        "last": last,
        "networks": known,
        "count": len(np.unique(first.predictions["label"])),
        "rows": [
            {
                "name": facts.class_name(of_class),
                "items": scores[0][of_class][2],
                "cells": [figures.with_error(*own[of_class][:2]) if of_class in own else "" for own in scores],
            }
            for of_class in numbers
        ],
    }


def _versions(facts: LineageFacts) -> list[tuple[str, list[str]]]:
    """Versions by library, one text where all generations have the same."""
    records = [own.record["versions"] for own in facts.generations]
    names = dict.fromkeys(name for versions in records for name in versions)
    found = []
    for name in names:
        own = [str(versions.get(name, "")) for versions in records]
        found.append((name, own[:1] if len(set(own)) == 1 else own))
    return found


# ---- Examples of what changed ----


def _examples(
    facts: LineageFacts, student: Network, teacher: Network, thumbnails: Mapping[str, Mapping[int, np.ndarray]]
) -> dict[str, Any]:
    assert student.predictions is not None and teacher.predictions is not None
    lost, won = changed_items(student.predictions, teacher.predictions, MOST_EXAMPLES)
    images = thumbnails.get(student.name, {})

    def described(item: int) -> dict[str, Any]:
        ours, theirs = student.predictions, teacher.predictions
        assert ours is not None and theirs is not None
        found = {
            "item": item,
            "label": facts.class_name(int(ours["label"][item])),
            "student": facts.class_name(int(ours["predicted"][item])),
            "student_confidence": f"{100 * ours['confidence'][item]:.0f} %",
            "teacher": facts.class_name(int(theirs["predicted"][item])),
            "teacher_confidence": f"{100 * theirs['confidence'][item]:.0f} %",
            "image": _data_uri(images[item]) if item in images else None,
            "context": None,
        }
        if facts.is_text:
            before = [int(token) for token in ours["label"][max(0, item - _CONTEXT) : item]]
            found["context"] = (
                one_line(facts.text(before)) if facts.text else " ".join(facts.class_name(token) for token in before)
            )
        return found

    return {
        "student": student,
        "teacher": teacher,
        "lost": [described(int(item)) for item in lost],
        "won": [described(int(item)) for item in won],
    }


def _data_uri(pixels: np.ndarray) -> str:
    from PIL import Image

    content = BytesIO()
    Image.fromarray(pixels).save(content, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _thumbnails(path: Path, facts: LineageFacts, images: Images | None) -> dict[str, dict[int, np.ndarray]]:
    """Images of the changed items of every student: kept ones, and new ones, which are kept."""
    if facts.is_text:
        return {}
    kept = _read_thumbnails(path)
    found: dict[str, dict[int, np.ndarray]] = {}
    for student, teacher in facts.pairs:
        assert student.predictions is not None and teacher.predictions is not None
        wanted = np.concatenate(changed_items(student.predictions, teacher.predictions, MOST_EXAMPLES))
        known = kept.get(_weights(student, teacher), {})
        new = [int(item) for item in wanted if int(item) not in known]
        if images is not None and new:
            known = {**known, **dict(zip(new, map(_small, images(np.array(new))), strict=True))}
        found[student.name] = {int(item): known[int(item)] for item in wanted if int(item) in known}
    by_weights = {_weights(student, teacher): found[student.name] for student, teacher in facts.pairs}
    if images is not None and any(by_weights.values()):
        _write_thumbnails(path, by_weights)
    return found


def _weights(student: Network, teacher: Network) -> str:
    return f"{student.record['weights_sha256'][:16]}-{teacher.record['weights_sha256'][:16]}"


def _small(image: Any) -> np.ndarray:
    """(height, width, 3) uint8, neither above `IMAGE_SIDE`."""
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    picture = picture.convert("RGB")
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return np.asarray(picture)


def _read_thumbnails(path: Path) -> dict[str, dict[int, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, dict[int, np.ndarray]] = {}
    if not path.is_file() or path.is_symlink():
        return found
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                weights, _, item = name.rpartition(".")
                pixels = file.get_tensor(name)
                if item.isdecimal() and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3:
                    found.setdefault(weights, {})[int(item)] = pixels[:IMAGE_SIDE, :IMAGE_SIDE]
    except (OSError, SafetensorError):
        return {}
    return found


def _write_thumbnails(path: Path, images: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    from safetensors.numpy import save

    arrays = {
        f"{weights}.{item}": np.ascontiguousarray(own)
        for weights, some in images.items()
        for item, own in some.items()
    }
    write_atomically(path, save(dict(sorted(arrays.items()))))


# ---- The template ----


@cache
def _environment() -> Environment:
    from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined, UndefinedError
    from markupsafe import Markup

    def cleaned(value: Any) -> Any:
        if isinstance(value, Undefined):
            raise UndefinedError(f"the report's template uses a value that is not there: {value._undefined_name}")
        return value if isinstance(value, Markup | int | float) else one_line(value, _LONGEST)

    environment = Environment(
        loader=PackageLoader("born_again.report"),
        autoescape=True,
        finalize=cleaned,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "local_name": local_name,
        "last_part": last_part,
        "setting": _setting,
        "drawn": Markup,  # of our own figures, whose texts matplotlib has escaped
    }
    return environment


def _setting(value: Any) -> str:
    value = without_folders(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
