"""Trains what is missing of a list of lineages, in order, and writes their comparison into OUTPUT_DIR/RESULTS.md.

    python examples/recipes/evidence.py --data FOLDER_WITH_cifar10_AND_ptb --minutes 60

It can be stopped at any time, also by the end of --minutes: the lineage that is being trained saves a checkpoint, and
the next call goes on from there. All lineages run at the lowest priority. The table holds the finished lineages. Flags
that are not listed by --help go to the training scripts. Those that may change what is trained are the same in every
call of an --output_dir, and stand in the title and in the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from born_again._files import write_atomically
from born_again.data.decode import EMBEDDED
from born_again.lineage.manifest import MANIFEST_NAME, Manifest, seed_folder_name
from born_again.lineage.spec import spec_sha256
from born_again.lineage.status import lineage_status
from born_again.report.comparison import compare_lineages
from born_again.report.comparison_table import comparison_markdown

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
# Of the end of --minutes, for the last step, its checkpoint and a stop by force.
GRACE_SECONDS = 120.0
# The ensembles that a lineage of so many generations ends with, as LineageRunner evaluates them.
ENSEMBLES = (2, 3)
# In --output_dir: the passed flags that may change what is trained.
PASSED_NAME = "passed_flags.json"
# Passed flags that change neither data nor schedule, and weights by rounding at most; any other may.
HARMLESS = frozenset(
    "--threads --tune_process --logging_steps --logging_strategy --disable_tqdm --report_to --save_steps "
    "--save_strategy --save_minutes --keep_checkpoints --dataloader_num_workers --teacher_cache --teacher_cache_dir "
    "".split()
)
# What tells the lineages of a suite apart: none of it can be passed to all of them.
OWN = frozenset("--seed --teacher --generations --objective --control --from_generation --name".split())


@dataclass(frozen=True)
class Entry:
    """One experiment, of which there is a lineage for each seed.

    Args:
        name: of its folder.
        flags: of the script, beside those of the suite.
        teacher: entry whose generation 0 is taken as the teacher, of the same seed.
    """

    name: str
    flags: str
    teacher: str | None = None


@dataclass(frozen=True)
class Suite:
    """Experiments on the same data, compared with each other.

    Args:
        title: of its section in RESULTS.md.
        script: of examples/.
        data: folder in --data, or the name of an embedded dataset.
        flags: of every entry.
        seeds: far enough apart that no two lineages share one: generation k of seed s has seed s + k.
        entries: in the order in which they are trained, seed by seed.
        references: networks that the others are also compared with, in words, and as --against of compare takes them.
        note: how the setting was chosen.
    """

    title: str
    script: str
    data: str
    flags: str
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    references: dict[str, str]
    note: str = ""


SEEDS = (0, 10, 20, 30, 40)
# A process a core; the seconds of students are with a teacher cache.
ONE_CORE = "--threads 1 --teacher_cache memory"
LABELS = "--generations 0"
TAUGHT = "--generations 1 --objective"

# What needs a teacher's weights follows them: a later call on another machine has the records alone.
IMAGES = (
    Entry("labels", LABELS),
    Entry("ban", "--generations 3 --objective ban", "labels"),
    Entry("ban+l", f"{TAUGHT} ban+l", "labels"),
    Entry("cwtm", f"{TAUGHT} cwtm", "labels"),
    Entry("dkpp", f"{TAUGHT} dkpp", "labels"),
    Entry("label-smoothing", f"{LABELS} --label_smoothing_factor 0.1"),
    Entry("equal-compute-2", "--generations 1 --control equal-compute"),
    Entry("equal-compute-4", "--generations 3 --control equal-compute"),
    Entry("independent", "--generations 3 --control seeds"),
)
IMAGE_REFERENCES = {
    "twice the epochs": "equal-compute-2",
    "4 x the epochs": "equal-compute-4",
    "label smoothing": "label-smoothing",
    "3 independent runs": "independent/ensemble",
}

SUITES = {
    "digits": Suite(
        title="scikit-learn's digits, 600 training and 1,197 test images, Wide-ResNet-16-1, 40 epochs",
        script="run_cifar.py",
        data="digits",
        flags="",
        seeds=SEEDS,
        entries=IMAGES,
        references=IMAGE_REFERENCES,
        note="The setting is that of the README's first command.",
    ),
    "images": Suite(
        title="CIFAR-10 at 16 x 16 pixels, the first 5,000 training images, Wide-ResNet-16-2, 30 epochs",
        script="run_cifar.py",
        data="cifar10",
        flags="--model wide_resnet16_1_cifar --model_args width=2 --image_size 16 --no_crop --max_train_samples 5000 "
        f"--num_train_epochs 30 --per_device_train_batch_size 64 {ONE_CORE}",
        seeds=SEEDS,
        entries=IMAGES,
        references=IMAGE_REFERENCES,
        note="The setting was chosen for teachers that fit at a cost that allows five seeds, by the training accuracy "
        "of teachers of seed 0 alone. With random crops: 83 % with Wide-ResNet-16-1 at 32 pixels in batches of 128; "
        "90 % with Wide-ResNet-16-4 at 16 pixels in batches of 128; not mirrored, in batches of 64, 92 % in 30 epochs "
        "and at least 98 % in 50, at five times the cost. Without crops: 96.3 % in 20 epochs, 99.9 % in 30.",
    ),
    "text": Suite(
        title="Penn Treebank, lstm-small, 9 epochs",
        script="run_ptb.py",
        data="ptb",
        flags=f"--model lstm-small --num_train_epochs 9 {ONE_CORE}",
        seeds=SEEDS[:2],
        entries=(
            Entry("labels", LABELS),
            Entry("ban+l", f"{TAUGHT} ban+l", "labels"),
            Entry("ban", f"{TAUGHT} ban", "labels"),
            Entry("equal-compute-2", "--generations 1 --control equal-compute"),
        ),
        references={"twice the epochs": "equal-compute-2"},
        note="Half of the script's epochs, so that two seeds and the control could be trained. Of each training the "
        "weights of the epoch with the best validation perplexity count.",
    ),
    "gpu-images": Suite(
        title="CIFAR-100, Wide-ResNet-28-10, 24 epochs",
        script="run_cifar.py",
        data="cifar100",
        flags="--model wide_resnet28_10_cifar --dropout 0 --num_train_epochs 24",
        seeds=SEEDS[1:],
        # The first one trains its teacher too: what is finished on a borrowed machine needs nothing from before.
        entries=(Entry("ban", f"{TAUGHT} ban"), Entry("ban+l", f"{TAUGHT} ban+l", "ban")),
        references={},
    ),
    "gpu-text": Suite(
        title="Penn Treebank, lstm-large",
        script="run_ptb.py",
        data="ptb",
        flags="--model lstm-large",
        seeds=SEEDS[1:],
        entries=(Entry("ban+l", f"{TAUGHT} ban+l"),),
        references={},
    ),
}


@dataclass(frozen=True)
class Task:
    """One lineage of a suite."""

    suite: str
    entry: Entry
    seed: int
    output_dir: Path

    def folder(self, entry: str | None = None) -> Path:
        """Of the lineage, or of that of another entry with the same seed."""
        return self.output_dir / self.suite / (entry or self.entry.name) / seed_folder_name(self.seed)

    def command(self, data: str, output_dir: str | None = None) -> list[str]:
        """The script and its flags.

        Args:
            data: the folder with the data sets.
            output_dir: shown instead of the real one.
        """
        suite = SUITES[self.suite]
        own = Task(self.suite, self.entry, self.seed, Path(output_dir)) if output_dir else self
        where = suite.data if suite.data == EMBEDDED else str(Path(data) / suite.data)
        words = [f"examples/{suite.script}", "--dataset", where, *shlex.split(suite.flags)]
        words += shlex.split(self.entry.flags)
        if self.entry.teacher is not None:
            words += ["--teacher", str(own.folder(self.entry.teacher) / "gen0")]
        return [*words, "--seed", str(self.seed), "--output_dir", str(own.folder())]


def tasks(suites: Sequence[str], output_dir: Path) -> Iterator[Task]:
    """All lineages in the order in which they are trained: every entry of a seed before the next seed."""
    for name in suites:
        for seed in SUITES[name].seeds:
            for entry in SUITES[name].entries:
                yield Task(name, entry, seed, output_dir)


def is_finished(task: Task) -> bool:
    """Whether all generations are trained and all ensembles evaluated."""
    if not (task.folder() / MANIFEST_NAME).is_file():
        return False
    facts = lineage_status(task.folder())
    networks = len(facts["generations"]) - (0 if "seeds" in task.entry.flags.split() else 1)
    wanted = sum(count <= networks for count in ENSEMBLES)
    # Weights may be elsewhere: the table needs the records alone.
    return all(own["status"] == "finished" for own in facts["generations"]) and len(facts["ensembles"]) >= wanted


def run(task: Task, data: str, deadline: float, extra: Sequence[str]) -> int | None:
    """Trains one lineage until it is finished or the deadline has come; the exit status, None after the deadline."""
    command = [sys.executable, *task.command(data), "--disable_tqdm", "True", *extra]
    print(f"+ {shlex.join(command[1:])}", flush=True)
    child = subprocess.Popen(command, cwd=HERE.parents[1], start_new_session=True)
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, child.pid, 19)  # all its threads are started after this
    try:
        return child.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _stop(child)
        return None
    except BaseException:
        _stop(child)
        raise


def _stop(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGTERM)  # it finishes the step and saves a checkpoint
    try:
        child.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def copy_records(suites: Sequence[str], source: Path, target: Path, places: Mapping[str, str] | None = None) -> None:
    """Copies what the table is made of, lineage.json and predictions without weights, of the finished lineages.

    Args:
        suites: that are copied.
        source: an --output_dir, or a copy made of one.
        target: the same folders are made there; lineages that it holds already stay as they are.
        places: folders of this machine, and what is written instead of them.
    """
    for task in filter(is_finished, tasks(suites, source)):
        folder = task.folder()
        copy = target / folder.relative_to(source)
        if (copy / MANIFEST_NAME).is_file():
            continue
        for path in folder.glob("*/predictions*.safetensors"):
            write_atomically(copy / path.relative_to(folder), path.read_bytes())
        content = _renamed(json.loads((folder / MANIFEST_NAME).read_text("utf-8")), places or {})
        content["spec_sha256"] = spec_sha256(content["spec"])
        # Last: it says that the rest is there.
        write_atomically(copy / MANIFEST_NAME, json.dumps(content, indent=2) + "\n")
    if (source / PASSED_NAME).is_file() and not (target / PASSED_NAME).is_file():
        write_atomically(target / PASSED_NAME, (source / PASSED_NAME).read_bytes())


def _renamed(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _renamed(own, places) for name, own in value.items()}
    if isinstance(value, list):
        return [_renamed(own, places) for own in value]
    for place, name in places.items():
        if isinstance(value, str) and Path(value).is_relative_to(place):
            return str(name / Path(value).relative_to(place))
    return value


def lacks_teacher(task: Task) -> bool:
    """Whether the teacher was trained, but only its record is here."""
    if task.entry.teacher is None:
        return False
    folder = task.folder(task.entry.teacher)
    return (folder / MANIFEST_NAME).is_file() and 0 in lineage_status(folder)["missing_weights"]


# ---- Flags for the training scripts ----


def changing(extra: Sequence[str]) -> list[str]:
    """The words of the passed flags that may change what is trained."""
    flags: list[list[str]] = []
    for word in extra:
        if word.startswith("--") or not flags:
            flags.append([])
        flags[-1].append(word)
    return [word for words in flags if words[0].partition("=")[0] not in HARMLESS for word in words]


def passed_flags(output_dir: Path) -> list[str]:
    """Those that the lineages in a folder were trained with."""
    path = output_dir / PASSED_NAME
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def is_begun(output_dir: Path) -> bool:
    """Whether a folder holds a lineage of a suite."""
    return any((task.folder() / MANIFEST_NAME).is_file() for task in tasks(SUITES, output_dir))


def passed_problem(extra: Sequence[str], output_dir: Path, results: Path) -> str | None:
    """Why the passed flags are refused, None where they are not."""
    flags = changing(extra)
    if own := [word for word in flags if word.partition("=")[0] in OWN]:
        return f"{own[0]} differs between the lineages of a suite, so it cannot be passed to all; leave it out."
    if flags and results.resolve() == RESULTS.resolve():
        return (
            f"{shlex.join(flags)} may change what is trained, so it is not the suite that {RESULTS.name} describes; "
            "give another --results, or leave it out."
        )
    if is_begun(output_dir) and flags != passed_flags(output_dir):
        return (
            f"{output_dir} holds lineages that were begun with other flags ({shlex.join(passed_flags(output_dir))}), "
            f"got ({shlex.join(flags)}); give the same ones, or another --output_dir."
        )
    return None


# ---- RESULTS.md ----


def write_results(suites: Sequence[str], output_dir: Path, path: Path) -> None:
    """Replaces the sections of these suites; what else the file holds stays."""
    text = path.read_text("utf-8") if path.is_file() else "# Results\n"
    for name in suites:
        content = section(name, output_dir)
        if content is None:
            continue
        begin, end = f"<!-- {name}: written by evidence.py -->", f"<!-- end of {name} -->"
        block = f"{begin}\n{content}\n{end}"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, block=block: block, text) if begin in text else f"{text.rstrip()}\n\n{block}\n"
    write_atomically(path, text)


def section(name: str, output_dir: Path) -> str | None:
    """The Markdown section of a suite, None where no lineage is finished."""
    suite = SUITES[name]
    every = list(tasks([name], output_dir))
    finished = [task for task in every if is_finished(task)]
    if not finished:
        return None
    folders = [task.folder() for task in finished]
    comparison = compare_lineages(folders)
    passed = passed_flags(output_dir)
    override = f"; these flags override the suite's: `{shlex.join(passed)}`" if passed else ""
    lines = [f"## {suite.title}{override}", "", comparison_markdown(comparison), ""]
    lines += _over_references(suite, comparison, finished, output_dir / name)
    missing = [f"{task.entry.name} of seed {task.seed}" for task in every if task not in finished]
    lines += [f"Finished: {len(finished)} of {len(every)} lineages.", ""]
    if missing:
        lines += [f"Missing: {', '.join(missing)}.", ""]
    lines += [_machine(folders), "", "Commands, of each seed:", "", "```bash"]
    for entry in suite.entries:
        shown = Task(name, entry, suite.seeds[0], output_dir).command("DATA", "OUT") + passed
        text = shlex.join(shown).replace(f"--seed {suite.seeds[0]} ", "--seed SEED ")
        lines.append(f"python {text.replace(seed_folder_name(suite.seeds[0]), 'seedSEED')}")
    seeds = ", ".join(map(str, sorted({task.seed for task in finished})))
    lines += ["```", "", f"Seeds: {seeds}. {suite.note}".rstrip()]
    lines += ["No seed and no generation was selected by what is shown here."]
    return "\n".join(lines)


def _over_references(suite: Suite, comparison: dict[str, Any], finished: list[Task], folder: Path) -> list[str]:
    """A table of the differences from each reference of which a lineage is finished, with their intervals."""
    columns = {"the teacher": comparison}
    for title, network in suite.references.items():
        entry = network.split("/")[0]
        seeds = {task.seed for task in finished if task.entry.name == entry}
        if any(task.seed in seeds for task in finished if task.entry.name != entry):
            columns[title] = compare_lineages([task.folder() for task in finished], against=folder / network)
    if len(columns) == 1:
        return []
    metric = comparison["metrics"][0]
    header = ["trained by", "network", *(f"over {title}" for title in columns)]
    lines = [f"Paired difference of {metric['title']} with its 95 % interval over runs (number of runs):", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for place, row in enumerate(comparison["rows"]):
        cells = [_difference(own["rows"][place]["metrics"][metric["title"]], metric) for own in columns.values()]
        if any(cells):
            lines.append("| " + " | ".join([row["experiment"], row["network"], *cells]) + " |")
    return [*lines, ""]


def _difference(values: dict[str, Any], metric: dict[str, Any]) -> str:
    own, factor, form = values["difference"], metric["factor"], f"+.{metric['decimals']}f"
    if own is None:
        return ""
    interval = "" if own["t"] is None else " [{}, {}]".format(*(format(factor * end, form) for end in own["t"]))
    return f"{factor * own['mean']:{form}}{interval} ({own['runs']})"


def _machine(folders: list[Path]) -> str:
    """Hours, hardware, versions and whether teachers fit, from the records of what was trained."""
    records = [record for folder in folders for record in Manifest.read(folder).generations]
    trained = [record for record in records if record["seed"] is not None]
    hours = sum(record["seconds"] for record in trained) / 3600
    hardware = sorted({record.get("hardware") or "hardware not recorded" for record in trained})
    versions = sorted({f"torch {record['versions'].get('torch', '?')}" for record in trained})
    fits = [
        record["teacher_fit"]["accuracy"] for record in records if (record.get("teacher_fit") or {}).get("accuracy")
    ]
    fit = (
        f" Teachers are right on {100 * min(fits):.1f} to {100 * max(fits):.1f} % of their training images."
        if fits
        else ""
    )
    return f"{hours:.1f} hours of training on {'; '.join(hardware)}; {', '.join(versions)}.{fit}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="Folder with cifar10, cifar100 and ptb.")
    parser.add_argument("--minutes", type=float, required=True, help="Stop after so many minutes; 0 only writes.")
    parser.add_argument(
        "--suites", nargs="+", default=["digits", "images", "text"], choices=SUITES, help="In this order."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evidence"), help="Of all lineages.")
    parser.add_argument(
        "--results", type=Path, help="File that the tables are written into; RESULTS.md in --output_dir if not given."
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="Copy lineage.json and predictions of what is finished there; what it holds is not trained again.",
    )
    parser.add_argument("--only", nargs="+", metavar="ENTRY", help="Train these entries only, such as labels ban.")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="Train these seeds of the list only.")
    arguments, extra = parser.parse_known_args(words)  # what else is given goes to the training scripts
    output_dir = arguments.output_dir.resolve()
    results = arguments.results or output_dir / RESULTS.name
    listed = list(tasks(arguments.suites, output_dir))
    for flag, values, known in (
        ("--only", arguments.only, {task.entry.name: None for task in listed}),
        ("--seeds", arguments.seeds, {task.seed: None for task in listed}),
    ):
        if unknown := [str(value) for value in values or [] if value not in known]:
            parser.error(f"{flag}: got {', '.join(unknown)}, expected some of {', '.join(map(str, known))}.")
    if arguments.records is not None:
        arguments.records = arguments.records.resolve()
        copy_records(arguments.suites, arguments.records, output_dir)
    given = extra if arguments.minutes or extra else passed_flags(output_dir)
    if (problem := passed_problem(given, output_dir, results)) is not None:
        parser.error(problem)
    if arguments.minutes and not is_begun(output_dir):
        (output_dir / PASSED_NAME).unlink(missing_ok=True)  # of a call that began nothing
    if flags := changing(extra):
        write_atomically(output_dir / PASSED_NAME, json.dumps(flags))
    seconds = 60 * arguments.minutes
    deadline = time.monotonic() + seconds - min(GRACE_SECONDS, seconds / 4)
    data = str(Path(arguments.data).resolve())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is stopped too
    status = 0
    try:
        for task in listed:
            is_chosen = not (arguments.only and task.entry.name not in arguments.only)
            is_chosen = is_chosen and not (arguments.seeds and task.seed not in arguments.seeds)
            if not is_chosen or is_finished(task):
                continue
            if time.monotonic() >= deadline:
                break
            if lacks_teacher(task):
                print(
                    f"{task.folder()} is not trained: the weights of its teacher, {task.folder(task.entry.teacher)}, "
                    "are not here, only their record. Bring them, or use another --output_dir without --records.",
                    file=sys.stderr,
                )
                continue
            status = run(task, data, deadline, extra) or 0
            if status:
                print(f"The command above ended with status {status}; nothing else is trained.", file=sys.stderr)
                break
    finally:
        write_results(arguments.suites, output_dir, results)
        if arguments.records is not None:
            copy_records(arguments.suites, output_dir, arguments.records, {str(output_dir): "OUT", data: "DATA"})
    return status


if __name__ == "__main__":
    sys.exit(main())
