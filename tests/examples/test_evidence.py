"""examples/recipes/evidence.py: what is trained, in which order, what it writes, and that it can be stopped."""

import dataclasses
import re
import time
from pathlib import Path

import pytest
from compared_lineages import images, lineage, weights_of
from example_scripts import EXAMPLES, load_example

from born_again.lineage.manifest import Manifest
from born_again.lineage.status import lineage_status

ACCURACIES = {"labels": 0.5, "label-smoothing": 0.625, "equal-compute-2": 0.625, "equal-compute-4": 0.75}


@pytest.fixture
def evidence():
    return load_example("recipes/evidence")


def finish(task) -> None:
    """A lineage as the command of a task leaves it, as far as the table reads it."""
    seed, name = task.seed, task.entry.name
    teacher = weights_of(f"labels {seed}")
    if name == "labels":
        lineage(task.folder(), [images(0.5)], seed=seed, weights=[teacher])
        (task.folder() / "gen0/model.safetensors").write_text("weights")
    elif task.entry.teacher:
        count = 4 if name == "ban" else 2
        weights = [teacher, *(weights_of(f"{name} {seed} {index}") for index in range(1, count))]
        ensembles = {(2, 3): images(0.75), (1, 2, 3): images(0.875)} if name == "ban" else {}
        options = {
            "objective": name,
            "teacher": str(task.folder("labels") / "gen0"),
            "weights": weights,
            "ensembles": ensembles,
        }
        lineage(task.folder(), [images(0.5)] + [images(0.625)] * (count - 1), seed=seed, **options)
        manifest = Manifest.read(task.folder())
        manifest.update(1, teacher_fit={"accuracy": 0.9 + seed / 1000, "samples": 10})
        manifest.save()
    elif name == "independent":
        weights = [teacher, weights_of(f"one {seed}"), weights_of(f"two {seed}")]
        ensembles = {(1, 2): images(0.625), (0, 1, 2): images(0.75)}
        options = {"control": "seeds", "objective": "label", "weights": weights, "ensembles": ensembles}
        lineage(task.folder(), [images(0.5)] * 3, seed=seed, **options)
    elif name == "label-smoothing":
        training = {"label_smoothing_factor": 0.1}
        lineage(task.folder(), [images(ACCURACIES[name])], seed=seed, training=training)
    else:
        factor = int(name[-1])
        options = {"control": "equal-compute", "control_generations": factor - 1, "objective": "label"}
        training = {"num_train_epochs": 30.0 * factor}
        lineage(task.folder(), [images(ACCURACIES[name])], seed=seed, training=training, **options)


def test_what_is_missing_is_trained_in_order_and_the_table_holds_what_is_finished(evidence, tmp_path, monkeypatch):
    commands, out, results = [], tmp_path / "out", tmp_path / "RESULTS.md"
    results.write_text("# Results\n\nBy hand.\n")
    stop_after = 12

    def run(task, data, deadline, extra):
        commands.append(task.command(data))
        if len(commands) == stop_after:
            return None  # the deadline
        finish(task)
        return 0

    monkeypatch.setattr(evidence, "run", run)
    words = ["--data", str(tmp_path), "--suites", "images", "--output_dir", str(out), "--results", str(results)]
    monkeypatch.setattr(evidence.time, "monotonic", lambda: 1e9 if len(commands) == stop_after else 0.0)
    assert evidence.main([*words, "--minutes", "9"]) == 0
    names = [entry.name for entry in evidence.SUITES["images"].entries]
    folders = [Path(command[command.index("--output_dir") + 1]) for command in commands]
    expected = [out / "images" / name / f"seed{seed}" for seed in (0, 10) for name in names]
    assert folders == expected[:stop_after]
    # The teacher is that of the same seed.
    ban = commands[folders.index(out / "images/ban/seed10")]
    assert ban[ban.index("--teacher") + 1] == str(out / "images/labels/seed10/gen0")

    text = results.read_text()
    assert "By hand." in text and text.count("## CIFAR-10") == 1
    assert "Teachers are right on 90.0 to 91.0 % of their training images." in text
    assert "Finished: 11 of 45 lineages." in text
    assert "Missing: ban+l of seed 10, cwtm of seed 10, dkpp of seed 10, label-smoothing of seed 10" in text
    rows = {tuple(cells[:2]): cells[2:] for cells in map(split_row, text.splitlines()) if len(cells) == 7}
    assert rows["ban", "generation 3"][0].endswith("(2)") and "over 4 x the epochs" in rows["trained by", "network"][2]
    assert rows["ban", "mean of 1, 2, 3"][2:] == ["+12.50 (1)", "+25.00 (1)", "+12.50 (1)"]
    assert "--seed SEED --output_dir OUT/images/ban/seedSEED" in text and str(tmp_path) not in text

    # The next call goes on where this one stopped, and replaces its own section only.
    stop_after = 13
    commands.clear()
    assert evidence.main([*words, "--minutes", "9"]) == 0
    assert commands[0][-1] == str(expected[11])
    assert results.read_text().count("## CIFAR-10") == 1 and "By hand." in results.read_text()

    # The table can be written from the records alone.
    evidence.copy_records(["images"], out, tmp_path / "records")
    assert not list((tmp_path / "records").rglob("model.safetensors"))
    assert evidence.section("images", tmp_path / "records") == evidence.section("images", out)


def test_another_machine_goes_on_from_the_records(evidence, tmp_path, monkeypatch, capsys):
    """All but what was taught by a teacher whose weights it has not."""
    trained, missing = [], {("labels", 10), ("cwtm", 0), ("dkpp", 0), ("equal-compute-2", 0)}
    for task in evidence.tasks(["images"], tmp_path / "first"):
        if task.seed == 0 and (task.entry.name, task.seed) not in missing:
            finish(task)
    evidence.copy_records(["images"], tmp_path / "first", tmp_path / "records")
    kept = (tmp_path / "records/images/labels/seed0/lineage.json").read_bytes()

    def run(task, *_):
        trained.append((task.entry.name, task.seed))
        finish(task)
        return 0

    monkeypatch.setattr(evidence, "run", run)
    out, results = tmp_path / "out", tmp_path / "RESULTS.md"
    words = ["--data", str(tmp_path), "--suites", "images", "--output_dir", str(out), "--results", str(results)]
    words += ["--records", str(tmp_path / "records"), "--minutes", "9"]
    assert evidence.main([*words, "--seeds", "0"]) == 0
    assert trained == [("equal-compute-2", 0)]
    errors = capsys.readouterr().err
    for name in ("cwtm", "dkpp"):
        assert f"{out / 'images' / name / 'seed0'} is not trained: the weights of its teacher" in errors
    assert evidence.main([*words, "--seeds", "10", "--only", "labels"]) == 0
    assert trained[1:] == [("labels", 10)] and "Finished: 8 of 45 lineages." in results.read_text()
    assert (tmp_path / "records/images/labels/seed0/lineage.json").read_bytes() == kept
    # Both machines' lineages are in the records now.
    assert evidence.section("images", tmp_path / "records") == evidence.section("images", out)
    # A teacher that was trained here teaches.
    assert evidence.main([*words, "--seeds", "10", "--only", "cwtm"]) == 0
    assert trained[2:] == [("cwtm", 10)]
    # Records hold no folders of a machine, and are whole.
    record = Manifest.read(tmp_path / "records/images/cwtm/seed10")
    assert record.spec.teacher == "OUT/images/labels/seed10/gen0"
    assert str(tmp_path) not in (tmp_path / "records/images/cwtm/seed10/lineage.json").read_text()


RECORDS = EXAMPLES / "recipes/records"


@pytest.mark.parametrize("suite", sorted(folder.name for folder in RECORDS.iterdir()))
def test_the_published_tables_are_those_of_the_published_records(evidence, suite):
    """But for the intervals over items: predictions are not published."""
    published = evidence.RESULTS.read_text("utf-8")
    begin, end = f"<!-- {suite}: written by evidence.py -->\n", f"<!-- end of {suite} -->"
    published = published[published.index(begin) + len(begin) : published.index(end)]
    assert without_items(evidence.section(suite, RECORDS)) == without_items(published)


def without_items(text: str) -> list[list[str]]:
    """Cells and lines, but for the intervals over items and what is said of them."""
    found, kept = [], range(0)
    for line in text.splitlines():
        cells = split_row(line)
        if cells and cells[0] == "trained by":
            kept = [place for place, cell in enumerate(cells) if cell != "95 % over items"]
        if not set("".join(cells)) <= {"-"}:
            found.append([cells[place] for place in kept])
        elif not cells and not line.startswith(("95 % over ", "Left out of the intervals over items")):
            found.append([line])
    return found


def split_row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def test_passed_flags_are_shown_and_those_that_change_the_suite_need_their_own_results(
    evidence, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evidence, "run", lambda task, *_: finish(task) or 0)
    out = tmp_path / "out"
    results = out / "RESULTS.md"
    words = ["--data", str(tmp_path), "--suites", "images", "--only", "labels", "--seeds", "0", "--minutes", "9"]
    words += ["--output_dir", str(out)]
    passed = ["--num_train_epochs", "1"]
    for more, message in (
        ([*passed, "--results", str(evidence.RESULTS)], "--num_train_epochs 1 may change what is trained"),
        (["--seed", "3"], "--seed differs between the lineages of a suite"),
        (["--seeds", "0", "1"], "--seeds: got 1, expected some of 0, 10, 20, 30, 40."),
        (["--only", "lables"], "--only: got lables, expected some of labels, ban, ban+l,"),
    ):
        with pytest.raises(SystemExit):
            evidence.main([*words, *more])
        assert message in capsys.readouterr().err and not out.exists()
    # Flags of a call that trained nothing are forgotten.
    monkeypatch.setattr(evidence, "run", lambda *_: 2)
    assert evidence.main([*words, "--num_train_epoch", "3"]) == 2
    assert evidence.main(words) == 2 and not (out / evidence.PASSED_NAME).exists()
    monkeypatch.setattr(evidence, "run", lambda task, *_: finish(task) or 0)
    assert evidence.main([*words, *passed, "--threads", "1"]) == 0
    title = "Wide-ResNet-16-2, 30 epochs; these flags override the suite's: `--num_train_epochs 1`"
    assert title in results.read_text() and "seedSEED --num_train_epochs 1\n" in results.read_text()
    evidence.copy_records(["images"], out, tmp_path / "records")
    assert evidence.section("images", tmp_path / "records") == evidence.section("images", out)
    with pytest.raises(SystemExit):
        evidence.main(words)
    assert "begun with other flags (--num_train_epochs 1), got ()" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evidence.main([*words, "--minutes", "0", "--results", str(evidence.RESULTS)])
    assert "it is not the suite that RESULTS.md describes" in capsys.readouterr().err


def test_every_flag_of_the_list_is_one_of_its_script(evidence, tmp_path):
    for suite in evidence.SUITES:
        script = load_example(evidence.SUITES[suite].script.removesuffix(".py"))
        for task in evidence.tasks([suite], tmp_path):
            if task.seed != evidence.SUITES[suite].seeds[0]:
                continue
            lineage_flags, training = script.parse_arguments(
                (script.LineageArguments, script.BornAgainTrainingArguments), script.recipe, task.command("data")[1:]
            )
            assert training.output_dir == str(task.folder()) and training.seed == task.seed
            assert lineage_flags.generations + 1 <= 10  # the distance of the seeds
        assert (EXAMPLES / evidence.SUITES[suite].script).is_file()


@pytest.mark.slow
def test_a_stopped_training_goes_on_in_the_next_call(evidence, tmp_path, monkeypatch):
    tiny = "--smoke --max_train_samples 512 --max_eval_samples 48 --threads 1 --logging_steps 999"
    suite = evidence.SUITES["images"]
    entries = (evidence.Entry("labels", f"{evidence.LABELS} --num_train_epochs 400"),)
    changed = dataclasses.replace(suite, data="", flags=f"{tiny} --dataset digits", seeds=(0,), entries=entries)
    monkeypatch.setitem(evidence.SUITES, "images", changed)
    (task,) = evidence.tasks(["images"], tmp_path)
    folder, begun = task.folder(), time.monotonic()
    while not list(folder.glob("checkpoints/gen0/checkpoint-*")):
        assert evidence.run(task, "digits", time.monotonic() + 15, ()) is None  # stopped
        assert time.monotonic() < begun + 200
    assert lineage_status(folder)["next"]["action"] == "resume" and not evidence.is_finished(task)
    shorter = dataclasses.replace(task, entry=evidence.Entry("labels", evidence.LABELS), output_dir=tmp_path / "2")
    assert evidence.run(shorter, "digits", time.monotonic() + 200, ()) == 0 and evidence.is_finished(shorter)
    assert Manifest.read(shorter.folder()).generations[0]["status"] == "finished"
    results = tmp_path / "RESULTS.md"
    evidence.write_results(["images"], tmp_path / "2", results)
    assert re.search("Finished: 1 of 1 lineages", results.read_text())
