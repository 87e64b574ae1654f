"""The table and the card say what the manifest holds, and nothing else."""

import math

import yaml

from born_again.hub.model_card import image_classifier_card
from born_again.lineage.status import results_table


def record(index, accuracy, **changes):
    values = {
        "index": index,
        "status": "finished",
        "seed": 42 + index,
        "parent": index - 1 if index else None,
        "objective": "ban" if index else "label",
        "weights_sha256": "ab" * 32,
        "metrics": {"test": {"accuracy": accuracy, "error": 1 - accuracy, "nll": 0.51234, "ece": 0.021}},
        "seconds": 12.4,
        "versions": {"torch": "2.15.0"},
        "hardware": "CPU",
        "teacher_fit": {"accuracy": 0.9, "samples": 10} if index else None,
    }
    return {**values, **changes}


def manifest(*records, dataset="digits"):
    spec = {"model": "test_wide_resnet_cifar", "dataset": dataset, "training": {"learning_rate": 0.1}}
    return {"name": "wide-resnet-digits", "spec": spec, "data": {"rows": {"train": 3}}, "generations": list(records)}


def test_table_has_a_line_for_each_finished_generation_and_its_gain():
    lines = results_table(
        manifest(record(0, 0.90), record(1, 0.925), record(2, 0.92), record(3, 0, status="training", metrics={}))
    ).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["generation", "objective", "seed", "accuracy", "error", "NLL", "ECE", "seconds", "gain"]
    assert set(lines[1]) == {"|", "-"}
    assert cells[2:] == [
        ["0 (teacher)", "label", "42", "90.00", "10.00", "0.5123", "2.10", "12", ""],
        ["1", "ban", "43", "92.50", "7.50", "0.5123", "2.10", "12", "+2.50"],
        ["2", "ban", "44", "92.00", "8.00", "0.5123", "2.10", "12", "-0.50"],
    ]
    assert len({len(line) for line in lines}) == 1


def text_record(index, perplexity, **changes):
    nll = math.log(perplexity)
    metrics = {
        "validation": {"nll": nll + 0.1, "perplexity": 1.1 * perplexity, "tokens": 7},
        "test": {"nll": nll, "perplexity": perplexity, "tokens": 8},
    }
    return record(index, 0, **{"metrics": metrics, **changes})


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_of_texts_gains_where_the_test_perplexity_falls():
    table = results_table(
        manifest(
            text_record(0, 80.0),
            text_record(1, 76.5, seconds=1234.5),
            text_record(2, 77.5),
            text_record(3, 1.0, status="training"),
        )
    )
    header, rule, *rows = cells(table)
    assert header == ["generation", "objective", "seed", "valid. ppl", "test ppl", "test NLL", "seconds", "gain"]
    assert set("".join(rule)) == {"-"}
    assert rows == [
        ["0 (teacher)", "label", "42", "88.00", "80.00", "4.3820", "12", ""],
        ["1", "ban", "43", "84.15", "76.50", "4.3373", "1234", "+3.50"],
        ["2", "ban", "44", "85.25", "77.50", "4.3503", "12", "-1.00"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_table_of_texts_before_a_generation_has_metrics():
    alone = [text_record(0, 80.0), text_record(1, 1.0, status="training", metrics={})]
    assert results_table(manifest(*alone)) == results_table(manifest(alone[0]))


def test_an_infinite_perplexity_is_a_cell_like_others():
    infinite = {split: {"nll": 800.0, "perplexity": None, "tokens": 7} for split in ("validation", "test")}
    rows = cells(results_table(manifest(text_record(0, 80.0), text_record(1, 1.0, metrics=infinite))))
    assert rows[-1] == ["1", "ban", "43", "inf", "inf", "800.0000", "12", "-inf *"]


def test_card_states_its_facts():
    card = image_classifier_card(manifest(record(0, 0.90), record(1, 0.925)), 1)
    _, header, body = card.split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["born_again"] == {
        "generation": 1,
        "objective": "ban",
        "seed": 43,
        "weights_sha256": "ab" * 32,
        "parent": {"generation": 0, "weights_sha256": "ab" * 32},
        "versions": {"torch": "2.15.0"},
    }
    assert facts["pipeline_tag"] == "image-classification"
    assert "# wide-resnet-digits-gen1" in body
    assert "taught by generation 0" in body and "right on 90.00%" in body
    assert "- test accuracy: 0.9250" in body


def test_card_of_the_teacher_claims_no_teacher():
    card = image_classifier_card(manifest(record(0, 0.90)), 0)
    assert "taught by generation" not in card and "generation 0 of a born-again lineage" in card


def test_names_from_users_do_no_harm_in_a_card():
    card = image_classifier_card(manifest(record(0, 0.90), dataset="</td><script>alert(1)\n---\nlicense: *boom"), 0)
    assert "<script>" not in card
    keys = {"library_name", "pipeline_tag", "tags", "model-index", "born_again"}
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n")).keys() == keys


def test_what_was_not_measured_is_an_empty_cell():
    alone = record(1, 0, metrics={"test": {"accuracy": 0.95, "nll": None, "ece": None}})
    rows = cells(results_table(manifest(record(0, 0.90), alone, record(2, 0, metrics={}), record(3, 0.5))))
    assert rows[3] == ["1", "ban", "43", "95.00", "", "inf", "", "12", "+5.00"]
    assert rows[4] == ["2", "ban", "44", "", "", "", "", "12", ""]
    assert rows[5][-1] == ""


def test_a_teacher_from_elsewhere_took_no_time_that_is_known():
    rows = cells(results_table(manifest(record(0, 0.90, objective="external", seed=None, seconds=0.0))))
    assert rows[2] == ["0 (teacher)", "external", "", "90.00", "10.00", "0.5123", "2.10", "", ""]


def test_where_students_have_another_architecture_a_column_names_it():
    alone = {"members": [1, 2], "metrics": {"test": {"accuracy": 0.95}}}
    held = manifest(record(0, 0.90), record(1, 0.5), record(2, 0.5)) | {"ensembles": [alone]}
    held["spec"]["student_model"] = "test_densenet_cifar"
    rows = cells(results_table(held))
    models = ["model", "test_wide_resnet_cifar", "test_densenet_cifar", "test_densenet_cifar", ""]
    assert [row[1] for row in (rows[0], *rows[2:])] == models
    held["generations"][0] = record(0, 0.90, objective="external", seed=None)  # its architecture is not known
    assert cells(results_table(held))[2][:3] == ["0 (teacher)", "", "external"]
