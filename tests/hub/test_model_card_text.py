"""What people read on a card: what was measured and how, and nothing more; its examples run."""

import ast
import difflib
import itertools
import re

import pytest
import torch
from card_manifests import (
    HUB,
    IMAGE_METRICS,
    TEXT_METRICS,
    codes,
    data_of,
    ensemble,
    external,
    manifest,
    record,
    section,
)
from lineage_folders import WORDS, lineage, network
from lineage_folders import inputs as inputs_for

from born_again.hub.model_card import ensemble_card, image_classifier_card, language_model_card
from born_again.lineage.manifest import Manifest
from born_again.lineage.status import results_table

CITATION = "@inproceedings{furlanello2018born"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---- What people read ----


def test_two_cards_differ_only_where_their_facts_do():
    generations = [record(index) for index in range(3)]
    cards = [image_classifier_card(manifest(*generations), index).splitlines() for index in (1, 2)]
    changed = [line for line in difflib.ndiff(*cards) if line[0] in "+-"]
    expected = [
        r"name: wide-resnet-digits-gen\d",
        r"generation: \d",
        r"seed: \d+",
        r'weights_sha256: "\w+"',
        r"# wide-resnet-digits-gen\d",
        r"A wide.* taught by generation \d .*",
        r"\| 2 .*",
        r"- seed: \d+",
        r"- gen2: .*",
    ]
    lines = [line[2:].strip().removeprefix("- ") if "name:" in line else line[2:].strip() for line in changed]
    assert [line for line in lines if not any(re.fullmatch(form, line) for form in expected)] == []
    # Equal facts give equal cards; one more generation changes no earlier card.
    again = image_classifier_card(manifest(*generations[:2]), 1)
    assert again.splitlines() == cards[0] and again == image_classifier_card(manifest(*generations), 1)


def test_one_fact_changes_its_own_lines_only():
    old = image_classifier_card(manifest(record(0)), 0).splitlines()
    new = image_classifier_card(manifest(record(0, hardware="1 x H200")), 0).splitlines()
    changed = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
    rest = "; 1,234 seconds of training; 460 steps; peak memory 900 MiB"
    assert changed == [f"- - gen0: CPU, 2 threads{rest}", f"+ - gen0: 1 x H200{rest}"]


def test_results_show_every_value():
    assert section(language_model_card(manifest(kind="text"), 1), "Results").splitlines()[2:] == [
        "- validation nll: 4.4500",
        "- validation perplexity: 85.6269",
        "- validation tokens: 73,760",
        "- test nll: 4.4000",
        "- test perplexity: 81.4509",
        "- test tokens: 82,430",
    ]


@pytest.mark.parametrize(
    ("training", "metrics", "said"),
    [
        ({}, TEXT_METRICS, "after the last step"),
        ({"load_best_model_at_end": True}, TEXT_METRICS, "that was best on validation"),
        ({"load_best_model_at_end": True}, IMAGE_METRICS, "that was best in the evaluations during training"),
    ],
)
def test_which_weights_were_measured(training, metrics, said):
    card = image_classifier_card(manifest(record(0, metrics=metrics), training=training), 0)
    assert f"{said}; one run, one seed." in section(card, "Results")


def test_the_table_is_that_of_the_terminal_up_to_this_generation():
    content = manifest(record(0), record(1, metrics={"test": {"accuracy": 0.95}}), record(2))
    for index in range(3):
        table, legend = section(image_classifier_card(content, index), "The lineage so far").split("\n\n")
        assert table == results_table({**content, "generations": content["generations"][: index + 1]})
        assert "percentage points of accuracy" in legend and "One run, one seed for each generation." in legend
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[3] == ["1", "ban+l", "43", "95.00", "", "", "", "1234", "+2.50"]
    assert cells[4][-1] == "-2.50"


def test_a_student_names_its_teacher_and_how_well_that_one_fits():
    fit = {"nll": 3.0, "perplexity": 20.0855, "tokens": 9}
    content = manifest(record(0, "text"), record(1, "text"), record(2, "text", teacher_fit=fit), kind="text")
    cards = [language_model_card(content, index) for index in range(3)]
    assert "taught by generation" not in cards[0] and "on a sample" not in cards[0]
    assert "generation 0 of a born-again lineage, the teacher of generation 1" in cards[0]
    said = "of the same architecture, whose perplexity on a sample of the training text is"
    assert f"taught by generation 0 {said} 40.45. Objective: ban+l (" in cards[1]
    assert f"taught by generation 1 {said} 20.09. Objective: ban+l (" in cards[2]


@pytest.mark.parametrize("fit", [None, {}, {"accuracy": None, "samples": 3}])
def test_a_teacher_whose_fit_is_not_known_has_none(fit):
    card = image_classifier_card(manifest(record(0), record(1, teacher_fit=fit)), 1)
    assert "taught by generation 0 of the same architecture. Objective: ban+l" in card


def test_how_it_was_trained():
    content = manifest(
        record(0), model_args={"proj_drop_rate": 0.3}, training={"lr_milestones": [0.3, 0.6], "optim_args": "a=1"}
    )
    assert section(image_classifier_card(content, 0), "Training").splitlines() == [
        "- objective: label (the cross-entropy with the labels)",
        "- seed: 42",
        r"- architecture: wide\_resnet16\_1\_cifar (proj\_drop\_rate 0.3); 175,066 parameters",
        "- data: digits; images: train 1,438, test 359",
        r"- lr\_milestones: \[0.3, 0.6\]",
        r"- optim\_args: a=1",
        "- versions: python 3.11.2, torch 2.15.0",
    ]
    text = section(language_model_card(manifest(kind="text"), 0), "Training")
    assert "- data: ptb; words: train 929,589, validation 73,760, test 82,430\n" in text


def test_a_curve_is_shown_where_there_is_one():
    content = manifest()
    assert "![Training curve](training.png)" in image_classifier_card(content, 1, curve="training.png")
    assert "![" not in image_classifier_card(content, 1)
    for wrong in ("../x.png", "a b.png", "x.png) <script>", ""):
        with pytest.raises(ValueError, match="curve: got .* expected the name of a file beside the card"):
            language_model_card(manifest(kind="text"), 1, curve=wrong)


def test_calibration_and_limits_are_of_what_was_measured():
    card = image_classifier_card(manifest(), 1)
    assert "off the accuracy by 2.10 percentage points" in section(card, "Calibration")
    limits = section(card, "Limits")
    assert "The test split has 359 images" in limits and "standard error of 1.39 percentage points" in limits
    assert "32x32 pixels" in limits and "With one seed" in limits
    other = section(image_classifier_card(manifest(model="resnet18", data={}), 1), "Limits")
    assert "32x32" not in other and "test split" not in other
    read = {"data_args": {"image_size": 64}, "data": {"image_column": "image"}}
    larger = section(image_classifier_card(manifest(model="resnet18", **read), 1), "Limits")
    assert "trained on images of 64x64 pixels, to which others were squashed" in larger
    text = language_model_card(manifest(kind="text"), 1)
    assert section(text, "Calibration") == "Not measured."
    assert "The test split has 82,430 words." in section(text, "Limits")
    assert "the 10,000 words of its vocabulary" in section(text, "Limits") and "<unk>" not in text
    content = manifest(kind="text")
    for share, said in (
        (0.0421, "tokens of the test split 4.21% are not among them"),
        (0.0, ""),
        ("<b>", ""),
        (7, ""),
    ):
        content["data"]["coverage"] = {"test": {"unknown": share}}
        limits = section(language_model_card(content, 1), "Limits")
        assert said in limits and ("<unk>" in limits) is bool(said)


def test_a_validation_split_is_not_passed_off_as_a_test_split():
    data = {"rows": {"train": 1438, "test": 359}, "test_split": "validation"}
    card = image_classifier_card(manifest(data=data), 1)
    assert "no test split: what is called test here is its split validation." in section(card, "Limits")
    (result,) = data_of(card)["model-index"][0]["results"]
    assert result["dataset"]["split"] == "validation"
    assert "no test split" not in image_classifier_card(manifest(), 1)


def test_what_a_manifest_need_not_hold_is_not_said():
    bare = record(0)
    for name in ("hardware", "hub", "parameters", "steps", "peak_memory_mib"):
        del bare[name]
    content = manifest(bare, data={})
    for name in ("model_args", "data_args", "teacher", "generations"):
        del content["spec"][name]
    card = image_classifier_card(content, 0)
    assert "- gen0: hardware not recorded; 1,234 seconds of training\n" in card
    assert "- data: digits\n" in card and "None" not in card and "null" not in card


# ---- A teacher from elsewhere ----


def test_of_a_network_trained_elsewhere_nothing_is_claimed():
    asked = {"teacher": "someone/their-net", "teacher_revision": "v1", "data_args": {"max_train_samples": 512}}
    content = manifest(external(), record(1), dataset="cifar10", **asked)
    card, student = (image_classifier_card(content, index) for index in range(2))
    held = data_of(card)
    assert held["base_model"] == "someone/their-net" and "datasets" not in held
    assert {"seed", "versions"}.isdisjoint(held["born_again"]) and held["born_again"]["objective"] == "external"
    assert "A copy of someone/their-net at v1, which was trained elsewhere" in card
    assert section(card, "Training") == "Elsewhere; how is not known here."
    assert section(card, "Hardware and time") == "- gen0: trained elsewhere"
    for claim in (
        "learning",
        "from scratch",
        "One run",
        "wide\\_resnet16",
        "last step",
        "one seed",
        "for training",
        "32x32",
        "CPU",
    ):
        assert claim not in card
    assert "| 0 (teacher) | external  |      | 92.50    | 7.50  | 0.5123 | 2.10 |         |" in card
    for text in (card, student):
        assert "What generation 0 was trained on is not known here" in section(text, "Limits")
    assert "taught by generation 0, which is right on" in student and "of the same architecture" not in student
    assert data_of(student)["datasets"] == ["uoft-cs/cifar10"]


def test_the_folder_of_a_teacher_is_not_published(tmp_path):
    source = {"path_or_repo": str(tmp_path / "theirs"), "revision": None}
    generations = [{**external(), "source": source}, record(1)]
    content = manifest(*generations, teacher=str(tmp_path / "theirs"), hub=HUB)
    for index in range(2):
        card = image_classifier_card(content, index)
        assert str(tmp_path) not in card and tmp_path.name not in card
    assert "A copy of theirs, which was trained elsewhere" in image_classifier_card(content, 0)
    assert "base_model" not in data_of(image_classifier_card(content, 0))


# ---- Examples ----


@pytest.mark.parametrize("hub", [None, HUB, {**HUB, "branch": "dev", "private": True}])
def test_every_example_is_python(hub):
    cards = [image_classifier_card(manifest(hub=hub), 1), language_model_card(manifest(kind="text", hub=hub), 1)]
    cards.append(ensemble_card(manifest(hub=hub), ensemble(1, 2)))
    found = list(itertools.chain.from_iterable(codes(card) for card in cards))
    assert len(found) == (6 if hub is None else 8)
    for code in found:
        ast.parse(code)
    assert all(CITATION in card for card in cards)


@pytest.mark.parametrize("kind", ["image", "lstm", "gpt2"])
def test_the_examples_of_a_card_run(kind, tmp_path):
    words = None if kind == "image" else [WORDS, WORDS]
    folder = lineage(tmp_path, [network(kind, seed) for seed in (1, 2)], words=words)
    content = Manifest.read(folder).content
    write = image_classifier_card if kind == "image" else language_model_card
    expected = network(kind, 2)(inputs_for(kind)).logits
    for code in codes(write(content, 1)):
        names = {}
        # The tiny transformer has 8 positions.
        exec(code.replace("FOLDER", str(folder / "gen1")).replace("tokens=20", "tokens=5"), names)
        answer = names["model"](inputs_for(kind))
        assert torch.allclose(getattr(answer, "logits", answer), expected, rtol=1e-4, atol=1e-5)


def test_a_card_says_whose_labels_are_smoothed_and_that_the_teacher_is_annealed():
    smoothed = r"- label\_smoothing\_factor: 0.1"
    alone = f"{smoothed} (in generation 0 alone: this objective has no term with the labels)"
    for objective, annealing, line in (("ban+l", False, smoothed), ("ban", False, alone), ("ban", True, smoothed)):
        training = {"label_smoothing_factor": 0.1, **({"teacher_annealing": True} if annealing else {})}
        records = [record(0), record(1, objective=objective)]
        content = manifest(*records, objective=objective, training=training, generations=1)
        cards = [image_classifier_card(content, index) for index in range(2)]
        assert smoothed in section(cards[0], "Training").splitlines()
        assert line in section(cards[1], "Training").splitlines()
        assert ("teacher annealing, arXiv 1907.04829" in cards[1]) == annealing and "annealing," not in cards[0]
