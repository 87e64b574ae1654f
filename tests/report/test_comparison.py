"""Lineages compared: the numbers of the table, what is paired with what, and what is refused."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from compared_lineages import DATA, ITEMS, images, lineage, text, weights_of
from PIL import Image
from scipy import stats

from born_again.cli import main
from born_again.lineage.manifest import LineageError, Manifest
from born_again.report.comparison import compare_lineages
from born_again.report.comparison_table import comparison_csv, comparison_markdown
from born_again.report.statistics import ItemBootstrap, t_interval


def row(comparison: dict, experiment: str, network: str = "generation 0") -> dict:
    (found,) = [own for own in comparison["rows"] if (own["experiment"], own["network"]) == (experiment, network)]
    return found


def test_means_deviations_and_paired_differences_over_seeds(tmp_path):
    teachers, students = [0.5, 0.625, 0.25], [0.75, 0.75, 0.5]
    for seed, pair in enumerate(zip(teachers, students, strict=True)):
        both = [images(value, seed) for value in pair]
        lineage(tmp_path / f"out/seed{seed}", both, seed=seed, ensembles={(0, 1): images(0.875, seed)})
    comparison = compare_lineages([tmp_path / "out"])
    assert [(own["experiment"], own["network"], own["runs"]) for own in comparison["rows"]] == [
        ("label", "generation 0", 3),
        ("ban", "generation 1", 3),
        ("ban", "mean of 0, 1", 3),
    ]
    teacher, student = row(comparison, "label"), row(comparison, "ban", "generation 1")
    accuracy = student["metrics"]["accuracy"]
    assert teacher["metrics"]["accuracy"]["difference"] is None and student["seeds"] == [0, 1, 2]
    assert accuracy["mean"] == pytest.approx(np.mean(students))
    assert accuracy["deviation"] == pytest.approx(np.std(students, ddof=1))
    differences = np.subtract(students, teachers)
    expected = stats.t.interval(0.95, 2, loc=differences.mean(), scale=stats.sem(differences))
    assert accuracy["difference"]["mean"] == pytest.approx(differences.mean())
    assert accuracy["difference"]["t"] == pytest.approx(expected)
    assert (teacher["seconds"], student["seconds"]) == (10, 20)
    ensemble = row(comparison, "ban", "mean of 0, 1")["metrics"]["accuracy"]["difference"]
    assert ensemble["values"] == pytest.approx(np.subtract(0.875, teachers))
    # The same items are resampled for all, and the student is right wherever its teacher is.
    low, high = accuracy["difference"]["items"]
    assert 0 <= low < differences.mean() < high
    assert comparison["notes"] == []


def test_the_bootstrap_resamples_the_metrics_of_the_record():
    bootstrap = ItemBootstrap(ITEMS, seed=3)
    counts = np.random.default_rng(3).multinomial(ITEMS, np.full(ITEMS, 1 / ITEMS), size=1000)
    own = images(0.625)
    sampled = bootstrap.metrics(own.predictions)
    right = own.predictions["label"] == own.predictions["predicted"]
    np.testing.assert_allclose(sampled["accuracy"], (counts * right).sum(1) / ITEMS)
    np.testing.assert_allclose(sampled["nll"], (counts * own.predictions["nll"]).sum(1) / ITEMS, rtol=1e-6)
    np.testing.assert_allclose(sampled["ece"], np.abs((counts * right).sum(1) / ITEMS - 0.75), atol=1e-12)
    blocks = {"nll_sum": np.array([1.0, 3.0]), "tokens": np.array([2, 4])}
    sampled = ItemBootstrap(2).metrics(blocks)
    assert set(np.round(sampled["perplexity"], 9)) == set(np.round(np.exp([0.5, 4 / 6, 0.75]), 9))


def test_the_items_interval_covers_the_difference_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        sides = []
        for rate in (0.7, 0.6):
            right = generator.random(400) < rate
            sides.append({"label": np.ones(400), "predicted": right, "nll": right, "confidence": right * 0.5})
        bootstrap = ItemBootstrap(400)
        one, other = (bootstrap.metrics(side)["accuracy"] for side in sides)
        low, high = np.quantile(one - other, [0.025, 0.975])
        hits += low <= 0.1 <= high
    assert 88 <= hits <= 100


def test_objectives_that_share_a_teacher_have_one_row_of_it(tmp_path):
    shared = weights_of("teacher")
    smooth = {"training": {"label_smoothing_factor": 0.1}}
    lineage(tmp_path / "labels", [images(0.5)], weights=[shared])
    for objective, accuracy in (("ban", 0.75), ("cwtm", 0.625)):
        both = [images(0.5), images(accuracy)]
        weights = [shared, weights_of(objective)]
        lineage(tmp_path / objective, both, objective=objective, teacher="labels/gen0", weights=weights)
    lineage(tmp_path / "smooth", [images(0.875)], **smooth)
    folders = [tmp_path / name for name in ("ban", "cwtm", "labels", "smooth")]
    comparison = compare_lineages(folders)
    assert [(own["experiment"], own["runs"], own["seconds"]) for own in comparison["rows"]] == [
        ("label", 1, 10),
        ("label, label_smoothing_factor 0.1", 1, 10),
        ("ban", 1, 20),
        ("cwtm", 1, 20),
    ]
    # A lineage without students is compared with the teacher that the others of its seed have.
    difference = row(comparison, "label, label_smoothing_factor 0.1")["metrics"]["accuracy"]["difference"]
    assert difference["values"] == [0.375] and difference["t"] is None and difference["items"] is not None
    over = compare_lineages(folders, against=tmp_path / "smooth")
    assert row(over, "ban", "generation 1")["metrics"]["accuracy"]["difference"]["values"] == [-0.125]
    assert row(over, "label")["metrics"]["accuracy"]["difference"]["values"] == [-0.375]
    assert row(over, "label, label_smoothing_factor 0.1")["metrics"]["accuracy"]["difference"] is None


def test_the_reference_may_be_an_ensemble_or_another_generation(tmp_path):
    ensembles = {(1, 2): images(0.625), (0, 1, 2): images(0.875)}
    out = lineage(tmp_path / "out", [images(0.5), images(0.25), images(0.75)], ensembles=ensembles)
    for network, expected in (("ensemble", -0.125), ("gen1", 0.5), ("", None)):
        comparison = compare_lineages([out], against=out / network)
        difference = row(comparison, "ban", "generation 2")["metrics"]["accuracy"]["difference"]
        assert (difference and difference["values"]) == (expected and [expected])
    with pytest.raises(LineageError, match="against: .*out has no finished gen7, expected one; give another network"):
        compare_lineages([out], against=out / "gen7")


def test_independent_runs_have_the_same_teacher_as_reference(tmp_path):
    students = lineage(tmp_path / "ban", [images(0.5), images(0.75)], weights=[weights_of("0"), weights_of("s")])
    weights = [weights_of("0"), weights_of("1"), weights_of("2")]
    runs, options = [images(0.5), images(0.625), images(0.375)], {"control": "seeds", "objective": "label"}
    ensembles = {(0, 1, 2): images(0.875)}
    control = lineage(tmp_path / "seeds", runs, weights=weights, ensembles=ensembles, **options)
    comparison = compare_lineages([students, control])
    assert [(own["experiment"], own["network"]) for own in comparison["rows"]] == [
        ("label", "generation 0"),
        ("ban", "generation 1"),
        ("control: seeds", "run 1"),
        ("control: seeds", "run 2"),
        ("control: seeds", "mean of 0, 1, 2"),
    ]
    ensemble = row(comparison, "control: seeds", "mean of 0, 1, 2")["metrics"]["accuracy"]["difference"]
    assert ensemble["values"] == [0.375]


def test_a_text_is_compared_by_its_perplexity(tmp_path):
    better = text(80.0, ((0.5, 2), (1.0, 4)))
    metrics = [{"validation": text(95.0), "test": text(90.0)}, {"validation": better, "test": better}]
    lineage(tmp_path / "out", metrics, data={"sha256": "0", "tokens": {"train": 1200, "test": 6}})
    comparison = compare_lineages([tmp_path / "out"])
    assert "tokens: 1,200 in train, 6 in test." in comparison_markdown(comparison)
    assert [metric["title"] for metric in comparison["metrics"]] == ["test ppl", "NLL", "valid. ppl"]
    difference = row(comparison, "ban", "generation 1")["metrics"]["test ppl"]["difference"]
    assert difference["mean"] == pytest.approx(-10)
    low, high = difference["items"]  # of whichever blocks, the student's sums are lower
    assert low <= high < 0


def test_a_text_in_other_blocks_has_no_interval_over_items(tmp_path):
    """Both are of the same tokens, but resampled blocks of other lengths are not paired."""
    lineage(tmp_path / "out", [text(90.0), text(80.0, ((0.5, 3), (1.0, 3)))])
    comparison = compare_lineages([tmp_path / "out"])
    difference = row(comparison, "ban", "generation 1")["metrics"]["NLL"]["difference"]
    assert difference["items"] is None and difference["mean"] == pytest.approx(np.log(80 / 90))
    said = [note for note in comparison["notes"] if "blocks of other lengths" in note]
    assert len(said) == 1 and "out/gen1/predictions.safetensors beside" in said[0]


def test_predictions_that_are_missing_beside_others_are_named(tmp_path):
    for seed in (1, 2):
        lineage(tmp_path / f"out/seed{seed}", [images(0.5), images(0.5 + seed / 8)], seed=seed)
    (tmp_path / "out/seed2/gen1/predictions.safetensors").unlink()
    comparison = compare_lineages([tmp_path / "out"])
    assert row(comparison, "ban", "generation 1")["metrics"]["accuracy"]["difference"]["items"] is None
    missing = tmp_path / "out/seed2/gen1/predictions.safetensors"
    assert comparison["notes"][0] == f"Left out of the intervals over items, missing or of other weights: {missing}."


def test_lineages_without_predictions_have_the_interval_over_runs_only(tmp_path):
    for seed in (1, 2):
        lineage(tmp_path / f"out/seed{seed}", [images(0.5), images(0.5 + seed / 8)], seed=seed, kept=seed == 1)
    difference = row(compare_lineages([tmp_path / "out"]), "ban", "generation 1")["metrics"]["accuracy"]["difference"]
    assert difference["items"] is None and difference["t"] == pytest.approx(t_interval([0.125, 0.25]))


@pytest.mark.parametrize(
    ("seeds", "note"), [([1], "One run only (ban; label): it has no spread"), ([1, 5], "Fewer than 3 runs")]
)
def test_too_few_runs_are_named(tmp_path, seeds, note):
    folders = [lineage(tmp_path / str(seed), [images(0.5), images(0.75)], seed=seed) for seed in seeds]
    (said,) = compare_lineages(folders)["notes"]
    assert said.startswith(note)


def test_networks_that_two_lineages_share_are_named(tmp_path):
    weights = [weights_of(str(seed)) for seed in range(3)]
    for seed in (0, 1):
        lineage(tmp_path / f"{seed}", [images(0.5)] * 2, seed=seed, weights=weights[seed : seed + 2])
    notes = compare_lineages([tmp_path / "0", tmp_path / "1"])["notes"]
    assert notes[-1].startswith("Networks that are in more than one lineage of the same experiment: 1;")


def test_one_teacher_of_all_seeds_is_one_network(tmp_path):
    for seed in (0, 10, 20):
        both, weights = [images(0.5), images(0.75)], [weights_of("teacher"), weights_of(f"student {seed}")]
        lineage(tmp_path / f"out/seed{seed}", both, seed=seed, teacher="elsewhere", weights=weights)
    comparison = compare_lineages([tmp_path / "out"])
    assert row(comparison, "external")["runs"] == 1 and row(comparison, "ban", "generation 1")["runs"] == 3
    assert comparison["notes"][-1].startswith("Lineages of the same experiment have the same teacher, so the interval")


def test_external_teachers_are_one_experiment_where_their_lineages_are(tmp_path):
    """Found beside the teacher's folder or among those compared; otherwise only equal weights are one teacher."""
    students = []
    for seed in (0, 10):
        for name, options in (("labels", {}), ("smooth", {"training": {"label_smoothing_factor": 0.1}})):
            weights = [weights_of(f"{name} {seed}")]
            labels = lineage(tmp_path / f"{name}/seed{seed}", [images(0.5)], seed=seed, weights=weights, **options)
            weights.append(weights_of(f"{name} {seed} student"))
            folder, both = tmp_path / f"ban {name}/seed{seed}", [images(0.5), images(0.75)]
            students.append(lineage(folder, both, seed=seed, weights=weights, teacher=str(labels / "gen0")))
    comparison = compare_lineages(students)  # the same seeds twice, of two teachers
    expected = [
        (f"ban, teacher {tmp_path / name / 'seed0/gen0'}", network, [0, 10])
        for network in ("generation 0", "generation 1")
        for name in ("labels", "smooth")
    ]
    assert [(own["experiment"], own["network"], own["seeds"]) for own in comparison["rows"]] == expected
    assert len(comparison["notes"]) == 1  # fewer than 3 runs
    one = students[::2]
    for name in ("labels", "smooth"):
        (tmp_path / name).rename(tmp_path / f"moved {name}")
    assert [own["runs"] for own in compare_lineages([*one, tmp_path / "moved labels"])["rows"]] == [2, 2]
    alone = compare_lineages(one)
    assert [own["seeds"] for own in alone["rows"]] == [[0], [10], [0], [10]]
    assert "ban labels/seed10 are not found, so it is not known" in " ".join(alone["notes"])


def test_two_teachers_of_one_seed_are_two_experiments(tmp_path):
    teachers = [lineage(tmp_path / f"labels/seed{seed}", [images(0.5)], seed=seed) for seed in (0, 10)]
    for place, teacher in enumerate(teachers):
        weights = [weights_of(f"{teacher} 0"), weights_of(f"student {place}")]
        folder, both = tmp_path / f"ban{place}", [images(0.5), images(0.75)]
        lineage(folder, both, seed=0, weights=weights, teacher=str(teacher / "gen0"))
    rows = compare_lineages([tmp_path / "ban0", tmp_path / "ban1"])["rows"]
    assert [own["experiment"] for own in rows[2:]] == [f"ban, teacher {teacher / 'gen0'}" for teacher in teachers]


def test_one_teacher_of_all_seeds_stays_apart_from_a_teacher_of_each_seed(tmp_path):
    for seed in (0, 10, 20):
        lineage(tmp_path / f"own/seed{seed}", [images(0.5), images(0.75)], seed=seed)
    teacher = tmp_path / "own/seed0"
    longer = {
        "objective": "label",
        "control": "equal-compute",
        "control_generations": 1,
        "training": {"x": 1, "num_train_epochs": 2.0},
    }
    first = weights_of(f"{teacher} 0")
    for seed in (10, 20):
        options = {"seed": seed, "weights": [first, weights_of(f"one {seed}")], "teacher": str(teacher / "gen0")}
        lineage(tmp_path / f"one/seed{seed}", [images(0.5), images(0.625)], **options)
    rows = compare_lineages([tmp_path / "one/seed10", tmp_path / "own", tmp_path / "one/seed20"])["rows"]
    assert [(own["experiment"], own["seeds"]) for own in rows] == [
        ("external", [10]),
        ("label", [0, 10, 20]),
        (f"ban, teacher {teacher / 'gen0'}", [10, 20]),
        ("ban", [0, 10, 20]),
    ]
    # A control that teaches keeps its name.
    control = lineage(tmp_path / "control/seed3", [images(0.5)], seed=3, **longer)
    options = {"weights": [weights_of(f"{control} 0"), weights_of("taught")], "teacher": str(control / "gen0")}
    taught = lineage(tmp_path / "taught/seed3", [images(0.5), images(0.75)], seed=3, **options)
    names = [own["experiment"] for own in compare_lineages([taught, control, teacher])["rows"]]
    assert names == ["control: equal-compute, x 1", "label", f"ban, teacher {control / 'gen0'}", "ban"]


def test_a_teacher_trained_in_one_lineage_and_taken_by_another_is_named(tmp_path):
    shared, both = weights_of("teacher"), [images(0.5), images(0.75)]
    one = lineage(tmp_path / "one", both, seed=0, weights=[shared, weights_of("a")])
    options = {"seed": 10, "weights": [shared, weights_of("b")], "teacher": str(one / "gen0")}
    comparison = compare_lineages([one, lineage(tmp_path / "other", both, **options)])
    assert row(comparison, "ban", "generation 1")["runs"] == 2 and row(comparison, "label")["runs"] == 1
    assert comparison["notes"][-1].startswith("Lineages of the same experiment have the same teacher")


def test_a_reference_of_other_seeds_is_refused_and_the_pairs_are_counted(tmp_path):
    for seed in (0, 10, 20):
        lineage(tmp_path / f"out/seed{seed}", [images(0.5), images(0.75)], seed=seed)
    smooth = {"training": {"label_smoothing_factor": 0.1}}
    reference = lineage(tmp_path / "smooth/seed0", [images(0.625)], seed=0, **smooth).parent
    comparison = compare_lineages([tmp_path / "out"], against=reference)
    student = row(comparison, "ban", "generation 1")["metrics"]["accuracy"]["difference"]
    assert student["runs"] == 1 and student["values"] == [0.125]
    assert "| +12.50 (1 pair) " in comparison_markdown(comparison)
    assert next(csv.DictReader(comparison_csv(comparison).splitlines()))["accuracy pairs"] == "1"
    assert row(comparison, "label, label_smoothing_factor 0.1")["metrics"]["accuracy"]["difference"] is None
    (note,) = [note for note in comparison["notes"] if "in no difference" in note]
    assert "out/seed10 (seed 10)" in note and "seed20" in note and note.endswith("the reference has seeds 0.")
    with pytest.raises(
        LineageError, match=r"against: .*smooth has no lineage of the same seed as .*seed10 \(seed 10\)"
    ):
        compare_lineages([tmp_path / "out/seed10"], against=reference)


def test_a_control_of_other_compute_is_named(tmp_path):
    def steps(folder, *counts):
        manifest = Manifest.read(folder)
        for index, count in enumerate(counts):
            manifest.update(index, steps=count)
        manifest.save()
        return folder

    epochs = {"training": {"num_train_epochs": 5.0}, "model_args": {"depth": 10}}
    ban = steps(lineage(tmp_path / "ban", [images(0.5), images(0.75)], **epochs), 100, 100)
    options = {"objective": "label", "control": "equal-compute", "control_generations": 1}
    control = lineage(tmp_path / "control", [images(0.625)], training={"num_train_epochs": 10.0}, **options)
    names = [own["experiment"] for own in compare_lineages([ban, control])["rows"]]
    # The value that only one has is shown there, and the lengths are what equal compute means.
    assert names == ["label", "control: equal-compute", "ban, depth 10"]
    for count, is_said in ((200, False), (150, True)):
        steps(control, count)
        notes = " ".join(compare_lineages([ban, control])["notes"])
        assert ("Not of equal compute: steps of the controls 150 (as long as 2 gener" in notes) == is_said
    longer = {**options, "control_generations": 3, "training": {"num_train_epochs": 20.0}}
    third = lineage(tmp_path / "longer", [images(0.625)], **longer)
    names = [own["experiment"] for own in compare_lineages([ban, control, third])["rows"]]
    assert names[1:3] == [f"control: equal-compute of {count} generations" for count in (2, 4)]


def test_damaged_predictions_are_named_and_the_other_intervals_stay(tmp_path):
    out = lineage(tmp_path / "out", [images(0.5), images(0.25), images(0.75)])
    (out / "gen1/predictions.safetensors").write_bytes(b"damaged")
    comparison = compare_lineages([out])
    items = [row(comparison, "ban", f"generation {k}")["metrics"]["accuracy"]["difference"]["items"] for k in (1, 2)]
    assert items[0] is None and items[1] is not None
    (note,) = [note for note in comparison["notes"] if "gen1/predictions.safetensors" in note]
    assert note.startswith("Left out of the intervals over items: ")


def test_a_student_is_selected_by_validation_alone_and_when_asked(tmp_path):
    def splits(validation, test):
        return {"validation": images(validation), "test": images(test)}

    out = lineage(tmp_path / "out", [splits(0.5, 0.5), splits(0.75, 0.25), splits(0.625, 0.875)])
    assert "best on validation" not in [own["network"] for own in compare_lineages([out])["rows"]]
    comparison = compare_lineages([out], select_on_validation=True)
    assert row(comparison, "ban", "best on validation")["metrics"]["accuracy"]["values"] == [0.25]
    plain = lineage(tmp_path / "plain", [images(0.5), images(0.75)])
    with pytest.raises(ValueError, match="select_on_validation: .*plain has no metrics on a validation split"):
        compare_lineages([plain], select_on_validation=True)


# ---- What is refused ----


def test_lineages_that_ended_early_are_named(tmp_path):
    lineage(tmp_path / "out/seed0", [images(0.5), images(0.75), images(0.75)], seed=0)
    lineage(tmp_path / "out/seed10", [images(0.5), images(0.25)], seed=10)
    path = tmp_path / "out/seed10/lineage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stopped_when_worse": {"generations": 2}}))
    (note,) = [note for note in compare_lineages([tmp_path / "out"])["notes"] if "--stop_when_worse" in note]
    assert "out/seed10 early" in note and "seed0 " not in note


def test_unfinished_lineages_are_named(tmp_path):
    done = lineage(tmp_path / "done", [images(0.5), images(0.75)])
    begun = lineage(tmp_path / "begun", [images(0.5)], seed=2, generations=2)
    with pytest.raises(LineageError, match=r"folders: not finished: .*begun \(1 of 3 generations\); .*--allow_unfin"):
        compare_lineages([done, begun])
    comparison = compare_lineages([done, begun], allow_unfinished=True)
    assert row(comparison, "label")["runs"] == 2 and "begun (1 of 3 generations)" in comparison["notes"][0]


def test_other_data_is_refused(tmp_path):
    one = lineage(tmp_path / "one", [images(0.5)])
    other = lineage(tmp_path / "other", [images(0.5)], seed=2, data={**DATA, "sha256": "b"})
    with pytest.raises(LineageError, match="other and .*one were not trained and tested on the same data"):
        compare_lineages([one, other])


def test_a_seed_given_twice_is_refused(tmp_path):
    lineage(tmp_path / "out/seed1", [images(0.5), images(0.75)])
    with pytest.raises(LineageError, match="are the same experiment with the same seed 1, expected each seed once"):
        compare_lineages([tmp_path / "out", tmp_path / "out/seed1"])


def test_a_folder_without_lineages_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folders: .* has no lineage.json, expected the folder of a lineage"):
        compare_lineages([tmp_path])
    with pytest.raises(ValueError, match="folders: got none"):
        compare_lineages([])


# ---- The command ----


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    for seed in (1, 2, 3):
        lineage(tmp_path / f"out/seed{seed}", [images(0.5), images(0.5 + seed / 8, seed)], seed=seed)
    files = ["--csv", str(tmp_path / "table.csv"), "--figure", str(tmp_path / "table.png")]
    assert main(["compare", str(tmp_path / "out"), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0][:7] == ["trained by", "network", "runs", "accuracy", "NLL", "ECE", "seconds"]
    assert cells[3][:4] == ["ban", "generation 1", "3", "75.00 ± 12.50"]
    low, high = t_interval([0.125, 0.25, 0.375])
    assert cells[3][7:9] == ["+25.00", f"[{100 * low:+.2f}, {100 * high:+.2f}]"]
    with open(tmp_path / "table.csv") as file:
        (_, student) = csv.DictReader(file)
    assert float(student["accuracy difference"]) == 0.25 and float(student["accuracy t_low"]) == pytest.approx(low)
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.size[0] == 1200
    assert main(["compare", str(tmp_path / "out"), "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison_markdown(comparison).splitlines() == lines
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert "nowhere has no lineage.json" in capsys.readouterr().err
    for suffix, begin in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        assert main(["compare", str(tmp_path / "out"), "--figure", str(tmp_path / f"table{suffix}")]) == 0
        assert (tmp_path / f"table{suffix}").read_bytes().startswith(begin)
    capsys.readouterr()
    for words, message in (
        (["--figure", "table.jpg"], "figure: got 'table.jpg', expected a file that ends in .png, .svg, .pdf; rename"),
        (["--csv", str(tmp_path)], f"csv: got '{tmp_path}', which is a folder, expected a file"),
    ):
        assert main(["compare", str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err


def test_the_comparison_does_not_import_torch(tmp_path):
    lineage(tmp_path / "out", [images(0.5), images(0.75)])
    code = "import sys; from born_again.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "compare", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
