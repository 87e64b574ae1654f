"""The report of a lineage: its numbers, what it says where something is missing, and that texts have no effect."""

import json
import re
from html.parser import HTMLParser

import compared_lineages as made
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from born_again.cli import main
from born_again.lineage.history import write_history
from born_again.lineage.manifest import Manifest
from born_again.lineage.predictions import SplitMetrics
from born_again.report.lineage import changed_items, changes, class_scores, read_lineage
from born_again.report.page import MOST_EXAMPLES, write_report

VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, headings, and text by element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.headings, self.text, self.open = [], [], "", []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings.append((int(self.open[-1][1]), data))


def page_of(folder, images=None) -> Page:
    written = write_report(folder, images)
    assert [path.name for path in written] == ["report.html", "report.png"][: len(written)]
    return Page((folder / "report.html").read_text())


def said(page: Page) -> str:
    return " ".join(page.text.split())


def predictions(label, predicted, nll=None, confidence=None):
    count = len(label)
    return {
        "label": np.array(label),
        "predicted": np.array(predicted),
        "nll": np.full(count, 0.5) if nll is None else np.array(nll),
        "confidence": np.full(count, 0.75) if confidence is None else np.array(confidence),
    }


def images(right: list[int], classes: int = 2) -> SplitMetrics:
    """Ten items of alternating classes, of which `right` are predicted rightly."""
    label = np.arange(10) % classes
    predicted = np.where(np.isin(np.arange(10), right), label, (label + 1) % classes)
    nll = np.where(np.isin(np.arange(10), right), 0.1, 1.0 + np.arange(10) / 10)
    metrics = {"accuracy": len(right) / 10, "nll": float(nll.mean()), "ece": 0.05}
    return SplitMetrics(metrics, predictions(label, predicted, nll))


def text(shift: float) -> SplitMetrics:
    blocks = {"nll_sum": np.array([2.0, 3.0, 4.0]) + shift, "tokens": np.array([2, 2, 2])}
    tokens = predictions([0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0] if shift else [0] * 6)
    nll = float(blocks["nll_sum"].sum() / 6)
    return SplitMetrics({"nll": nll, "perplexity": float(np.exp(nll))}, {**blocks, **tokens})


HISTORY = [
    {"step": step, "epoch": step / 2, "loss": 2.0 / step, "dark_knowledge_norm": 0.3, "importance_weight_norm": 0.2}
    for step in range(1, 6)
] + [{"step": 5, "epoch": 2.5, "eval_loss": 0.6, "eval_runtime": 1.0}]


def with_histories(folder):
    for record in Manifest.read(folder).generations:
        path = folder / f"gen{record['index']}/history.json"
        path.parent.mkdir(exist_ok=True)
        write_history(path, HISTORY, record["weights_sha256"])
    return folder


def lineage(folder, **options):
    """A teacher and two students of images, with everything that a run keeps."""
    results = [images([*range(7)]), images([*range(1, 9)]), images([*range(2, 9)])]
    options = {"ensembles": {(1, 2): images([*range(9)])}, "data": {"rows": {"train": 5, "test": 10}}, **options}
    return with_histories(made.lineage(folder, results, **options))


def test_gains_have_the_standard_error_of_the_paired_difference(tmp_path):
    facts = read_lineage(lineage(tmp_path / "out"))
    teacher, student, _, ensemble = facts.networks
    assert (teacher.score, teacher.error) == (70.0, pytest.approx(100 * (0.7 * 0.3 / 10) ** 0.5))
    # One item was lost and two were won.
    differences = 100 * np.array([-1, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    assert student.gain == pytest.approx(10)
    assert student.gain_error == pytest.approx(differences.std(ddof=1) / 10**0.5)
    assert (ensemble.parent.name, ensemble.gain) == ("gen2", pytest.approx(20))
    assert facts.missing == []


def test_the_error_of_a_perplexity_is_that_of_its_blocks(tmp_path):
    facts = read_lineage(with_histories(made.lineage(tmp_path / "out", [text(0), text(-0.6)])))
    teacher, student = facts.networks
    assert teacher.score == pytest.approx(np.exp(1.5)) and student.gain == pytest.approx(np.exp(1.5) - np.exp(1.2))
    # Means per token of the three blocks are 1, 1.5 and 2.
    assert teacher.error == pytest.approx(np.exp(1.5) * np.std([1, 1.5, 2], ddof=1) / 3**0.5)
    assert student.gain_error == pytest.approx(0, abs=1e-6)  # every block lost as much


def test_changes_are_counted_and_tested():
    teacher = predictions([0] * 12, [0] * 6 + [1] * 6)
    student = predictions([0] * 12, [0] * 5 + [1, 0, 0, 0, 0, 0, 2], nll=np.arange(12))
    found = changes(student, teacher)
    assert (found.both_right, found.lost, found.won, found.both_wrong, found.items) == (5, 1, 5, 1, 12)
    assert found.agreement == pytest.approx(5 / 12)
    assert found.p == pytest.approx(2 * (1 + 6) / 2**6)  # at most 1 of 6 fair coins, on both sides
    lost, won = changed_items(student, {**teacher, "nll": np.arange(12)}, 3)
    assert lost.tolist() == [5] and won.tolist() == [10, 9, 8]
    assert changes(teacher, teacher).p is None
    assert class_scores(teacher, False)[0] == (50, pytest.approx(100 * (12 / 11 * 0.25 / 12) ** 0.5), 12)
    # Of one item, and where all are right, no error is known.
    few = predictions([0, 1, 1, 2, 2], [0, 1, 1, 2, 0], nll=[0.1, 0.2, 0.4, 0.3, 0.3])
    assert class_scores(few, False) == {0: (100, None, 1), 1: (100, None, 2), 2: (50, pytest.approx(50), 2)}
    assert [own[1] for own in class_scores(few, True).values()] == [None, pytest.approx(0.1), pytest.approx(0)]


def test_every_part_is_there_in_order_and_the_same_lineage_gives_the_same_bytes(tmp_path):
    folder = lineage(tmp_path / "out")
    pixels = lambda items: [Image.new("RGB", (64, 48), (int(item), 0, 0)) for item in items]  # noqa: E731
    page = page_of(folder, pixels)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [name for level, name in page.headings if level == 2] == [
        "Results",
        "Training and evaluation curves",
        "Calibration and confidence",
        "What changed from teacher to student",
        "Recipe",
    ]
    drawings = [own for tag, own in page.elements if own.get("role") == "img"]
    assert len(drawings) == 8 and all(own["aria-label"] for own in drawings)
    assert "gen1: accuracy 80.00 ± 12.65 %, gain +10.00 ± 17.95;" in drawings[0]["aria-label"]
    ids = [own["id"] for _, own in page.elements if "id" in own]
    assert len(ids) == len(set(ids))
    assert "within two standard errors" in said(page) and "What is missing" not in said(page)
    pictures = [own for tag, own in page.elements if tag == "img"]
    assert len(pictures) == 3 + 1 and all(own["alt"] and own["src"].startswith("data:image/png") for own in pictures)
    before = {name: (folder / name).read_bytes() for name in ("report.html", "report.png")}
    page_of(folder)  # the images that were kept
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_of_many_changed_images_a_few_small_ones_are_kept(tmp_path):
    label = np.zeros(100, int)
    half = [SplitMetrics({"accuracy": 0.5}, predictions(label, np.arange(100) < 50)) for _ in range(2)]
    half[1].predictions["predicted"] = (np.arange(100) >= 50).astype(np.int32)
    folder = made.lineage(tmp_path / "out", half)
    asked = []

    def read(items):
        asked.extend(items)
        return np.zeros((len(items), 40, 20, 3), np.uint8)

    page = page_of(folder, read)
    assert len(asked) == len([tag for tag, _ in page.elements if tag == "img"]) == 2 * MOST_EXAMPLES
    assert (folder / "report_images.safetensors").stat().st_size < 60_000
    page_of(folder, read)
    assert len(asked) == 2 * MOST_EXAMPLES  # none is read again


EVIL = "<script>alert(1)</script>\" onload='x' {{ 7 * 7 }} ]]> <!-- $a$ \u202e"


def test_local_folders_are_neither_in_the_page_nor_in_the_picture(tmp_path, monkeypatch):
    folder = lineage(tmp_path / "out", dataset="/home/me/photos", model="/home/me/networks/own")
    drawn, draw = [], Text.__init__

    def note(self, x=0, y=0, text="", *args, **kwargs):
        drawn.append(text)
        draw(self, x, y, text, *args, **kwargs)

    monkeypatch.setattr(Text, "__init__", note)
    page = page_of(folder)
    assert "tiny: own on photos" in drawn
    assert not [text for text in [*drawn, page.text, (folder / "report.html").read_text()] if "/home" in text]


def test_texts_of_users_have_no_effect(tmp_path):
    folder = lineage(
        tmp_path / "out",
        model=EVIL,
        dataset=EVIL,
        data_args={EVIL: EVIL},
        training={"optim_args": EVIL},
        data={"rows": {EVIL: 3, "test": 10}, "source": EVIL},
    )
    (folder / "gen0/config.json").write_text(json.dumps({"label_names": [EVIL, "b"]}))
    content = Manifest.read(folder)
    content.update(1, hardware=EVIL, versions={EVIL: EVIL})
    content.save()
    page = page_of(folder)
    assert not {"script", "iframe", "object", "form", "base"} & {tag for tag, _ in page.elements}
    attributes = {(name, value) for _, own in page.elements for name, value in own.items()}
    assert not [name for name, _ in attributes if name.startswith("on")]
    links = {value for name, value in attributes if name in ("href", "src", "xlink:href", "action")}
    assert all(value.startswith(("#", "data:")) for value in links)
    assert page.text.count("<script>alert(1)") > 6 and page.text.count("{{ 7 * 7 }}") > 6
    assert "\u202e" not in (folder / "report.html").read_text()


def unfinished(folder):
    made.lineage(folder, [images([1]), images([1, 2])], generations=3)
    manifest = Manifest.read(folder)
    manifest.update(1, status="training", metrics={}, weights_sha256=None)
    manifest.save()
    checkpoint = folder / "checkpoints/gen1/checkpoint-5"
    checkpoint.mkdir(parents=True)
    return folder


def begun(folder):
    made.lineage(folder, [images([1])])
    manifest = Manifest.read(folder)
    manifest.update(0, status="training", metrics={}, weights_sha256=None)
    manifest.save()
    return folder


def of_any_model(folder, results=None, unit="texts", **options):
    """As Lineage writes it: the unit of its items is recorded, and no images are kept."""
    data = {"unit": unit, "rows": {"train": 5, "test": 10}}
    made.lineage(folder, results or [images([1]), images([1, 2])], data=data, **options)
    manifest = Manifest.read(folder)
    for record in manifest.generations:
        manifest.update(record["index"], steps=4)
    manifest.save()
    return folder


def many_changes():
    label = np.zeros(40, int)
    none, every = (SplitMetrics({"accuracy": value}, predictions(label, label + 1 - value)) for value in (0.0, 1.0))
    return [none, every]


def without_errors(folder):
    """Text whose perplexity rose and of which no predictions are kept: clearly worse, by a rule without errors."""
    return made.lineage(folder, [made.text(7.0), made.text(8.0)], kept=False)


SHOWN = {
    "fine-tuned": (
        lambda folder: of_any_model(folder, starting_point="someone/bert"),
        [
            "fine-tuned from pretrained weights (someone/bert) and taught by",
            "over the texts of the test split",
            "No texts of changed items are kept. Items are shown by their numbers.",
            "Of gen0 (4 steps) and gen1 (4 steps) no training history is kept (history.json), so no curve is drawn: "
            "nothing was logged in so many steps, which a smaller logging_steps mends, or the file was not copied.",
        ],
    ),
    "images of any model": (
        lambda folder: of_any_model(folder, unit="images"),
        ["trained from scratch", "over the images", "Lineage keeps none, and born_again.report.page.write_report"],
    ),
    "worse without errors": (without_errors, ["No standard error of a gain is known.", "is clearly worse than"]),
    "all right": (lambda folder: of_any_model(folder, many_changes()), ["< 0.001"]),
    "no items": (
        lambda folder: made.lineage(folder, [SplitMetrics({"accuracy": 0.5}, predictions([], []))] * 2),
        ["Of gen0 and gen1 no predictions on single items"],
    ),
    "unfinished": (unfinished, ["Unfinished: 1 of 4 generations are finished", "gen1 (in training)"]),
    "begun": (begun, ["Unfinished: 0 of 1 generations are finished"]),
    "alone": (lambda folder: made.lineage(folder, [images([1])]), ["A teacher: test on made"]),
    "no predictions": (
        lambda folder: made.lineage(folder, [images([1]), images([1, 2])], kept=False),
        ["Of gen0 and gen1 no predictions on single items", "Of gen0 and gen1 no training history is kept"],
    ),
    "no measurement": (
        lambda folder: made.lineage(folder, [SplitMetrics({}, images([1]).predictions)] * 2, kept=False),
        ["gen0", "Recipe"],
    ),
    "external": (
        lambda folder: made.lineage(folder, [images([1]), images([1, 2])], teacher="/home/me/theirs"),
        ["teacher, trained elsewheretheirs", "Of gen1 no training history"],
    ),
    "control": (
        lambda folder: made.lineage(
            folder, [images([1]), images([1, 2])], control="seeds", objective="label", ensembles={(0, 1): images([1])}
        ),
        [
            "2 independent runs of test on made",
            "the seeds control of a born-again lineage",
            "within two standard errors of gen1",
        ],
    ),
    "text": (
        lambda folder: made.lineage(folder, [text(0), text(-0.6)]),
        ["by how much the perplexity fell", "There is no tokenizer", "better than gen0", "token 1"],
    ),
    "text of an earlier version": (
        lambda folder: made.lineage(folder, [made.text(value, has_single_tokens=False) for value in (8.0, 7.0)]),
        ["the losses of blocks are kept, but no predictions of single tokens"],
    ),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_what_is_there_is_shown_and_what_is_missing_is_said(tmp_path, kind):
    make, expected = SHOWN[kind]
    page = page_of(make(tmp_path / "out"))
    for sentence in expected:
        assert sentence in said(page)
    absent = {
        "fine-tuned": ["from scratch", "image"],
        "images of any model": ["a run keeps them"],
        "worse without errors": ["No student differs", "The band is"],
        "all right": ["0.00 ±", "± 0.00", "The band is"],
    }
    assert not [sentence for sentence in absent.get(kind, []) if sentence in said(page)]
    assert "/home" not in page.text and page.headings[-1][1] == "Versions"


def test_the_command_writes_the_reports_of_a_lineage_or_of_several_seeds(tmp_path, capsys):
    for seed in (1, 2):
        lineage(tmp_path / f"many/seed{seed}", seed=seed)
    assert main(["report", str(tmp_path / "many")]) == 0
    written = [tmp_path / f"many/seed{seed}" / name for seed in (1, 2) for name in ("report.html", "report.png")]
    assert capsys.readouterr().out.split() == [str(path) for path in written] and all(map(np.any, written))
    assert main(["report", str(tmp_path)]) == 2 and "lineage.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    from browser import DESKTOP, PHONE, chromium, opened

    folder = lineage(tmp_path / "out", model="a_rather_long_name_of_an_architecture_without_any_space_in_it_cifar")
    write_report(folder, lambda items: np.zeros((len(items), 32, 32, 3), np.uint8))
    with chromium() as browser:
        for size in (DESKTOP, PHONE):
            for dark in (False, True):
                with opened(browser, folder / "report.html", size, dark=dark) as own:
                    page = own.page
                    assert own.problems == [] and not own.scrolls_sideways()
                    assert own.accessibility_violations() == []
                    boxes = [drawing.bounding_box() for drawing in page.locator("[role=img]:visible").all()]
                    assert len(boxes) == 7 and all(box["width"] > 300 and box["height"] > 100 for box in boxes)
                    ink = page.locator("svg text:visible").first.evaluate("own => getComputedStyle(own).fill")
                    assert ink == ("rgb(157, 167, 179)" if dark else "rgb(87, 96, 106)")
                    page.keyboard.press("Tab")
                    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
