"""Kills lineages with SIGKILL at seeded random moments, starts them again, and holds the end against one never killed.

    python tests/kill_harness.py --kills 60 --seed 3

Every lineage is killed and started again by the same command until it is finished. Then its folder must be that of the
reference to the byte, but for the times in lineage.json and in the cards, and hold no file more. Exit status: 0 where
all are equal; 1 where one is not, which tells what differs and keeps the folders.

A start is killed in one of three ways. "event": the child counts what it does (files opened for writing, made, renamed
and deleted; steps, batches of evaluation and other callbacks) and kills itself at a number drawn from those of the
reference. "place": the same, at the n-th event of one category, so that the rare ones are met too. Both follow from
the seed, and may leave the file that is being written empty or half written. "time": the parent kills after a random
delay, which no seed repeats. After some kills a file of the newest checkpoint is cut, as a loss of power leaves it:
where no checkpoint is whole then, they are moved aside, which a kill alone must never lead to.
"""

from __future__ import annotations

import os

# Before torch is imported: a process that is forked must have one thread.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
os.environ.update(JE_ARROW_MALLOC_CONF="background_thread:false")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import argparse  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import mmap  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from kill_events import Events, Plan, told  # noqa: E402

from born_again import BornAgainTrainingArguments, LineageRunner  # noqa: E402
from born_again.data.images import load_images  # noqa: E402
from born_again.data.text import load_text  # noqa: E402
from born_again.hub.files import generation_card  # noqa: E402
from born_again.hub.model_card import ensemble_card  # noqa: E402
from born_again.lineage.arguments import parse_arguments  # noqa: E402
from born_again.lineage.folders import CURVE_NAME, REPORT_NAME, REPORT_PICTURE_NAME  # noqa: E402
from born_again.lineage.history import HISTORY_NAME  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
run_cifar, run_ptb = (importlib.import_module(name) for name in ("run_cifar", "run_ptb"))

# What may differ in a record of lineage.json.
REPORT_NAMES = (REPORT_NAME, REPORT_PICTURE_NAME)  # which show the curves and the times
TIMES = ("seconds", "peak_memory_mib")
MODES = ("event", "place", "place", "time")
TORN = 0.5  # of the kills are followed by a cut file
PATIENCE = 120.0  # seconds, of a start that takes two
MOST_KILLS = 12  # of one lineage

SHARED = "--disable_tqdm True --bf16 False --threads 1 --logging_steps 3 --generations 2"
IMAGES = f"{SHARED} --dataset digits --model test_wide_resnet_cifar --max_train_samples 64 --max_eval_samples 32"
TEXT = f"{SHARED} --dataset grammar --model test-lstm --max_train_samples 480 --max_eval_samples 120 --window 10"
BEST = "--load_best_model_at_end True --metric_for_best_model"
OFTEN = "--save_minutes 0.001"
# An epoch has 4 steps in the image lineages and 6 in those of text (3 where two batches are accumulated), so that
# save_steps 2 saves in the middle of epochs and at their ends. max_steps 10 ends a training in the middle of one.
RECIPES = {
    "images-epoch": f"{IMAGES} --num_train_epochs 3 --per_device_train_batch_size 16 --objective dkpp --dropout 0.3 "
    "--generations 3 --save_strategy epoch",
    "images-steps": f"{IMAGES} --max_steps 10 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 "
    "--objective cwtm --save_strategy steps --save_steps 2 --save_total_limit 1 --eval_strategy epoch",
    "images-best": f"{IMAGES} --num_train_epochs 4 --per_device_train_batch_size 16 --objective ban --dropout 0.2 "
    f"--eval_strategy epoch --save_total_limit 1 {BEST} accuracy --greater_is_better True {OFTEN}",
    "text-epoch": f"{TEXT} --num_train_epochs 4 --per_device_train_batch_size 8 --dropout 0.4 --save_strategy epoch",
    "text-minutes": f"{TEXT} --num_train_epochs 4 --per_device_train_batch_size 8 --dropout 0.4 {OFTEN}",
    "text-steps": f"{TEXT} --num_train_epochs 3 --per_device_train_batch_size 8 --dropout 0.4 --objective ban "
    "--save_strategy steps --save_steps 2 --load_best_model_at_end False",
    "text-best": f"{TEXT} --num_train_epochs 4 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 "
    f"--dropout 0.2 --save_strategy steps --save_steps 2 --eval_strategy steps --eval_steps 2 {BEST} perplexity",
}


@dataclass(frozen=True)
class Reference:
    """A lineage that nothing killed: its folder, the categories of its events in order, and how long it took."""

    folder: Path
    events: list[str]
    seconds: float


def make_runner(recipe: str, folder: Path, data: dict[str, Any]) -> LineageRunner:
    kind = recipe.partition("-")[0]
    script = {"images": run_cifar, "text": run_ptb}[kind]
    words = [*RECIPES[recipe].split(), "--output_dir", str(folder)]
    lineage, training = parse_arguments((script.LineageArguments, BornAgainTrainingArguments), script.recipe, words)
    spec = script.lineage_spec(lineage, training)
    return script.build_runner(spec, data[kind], training, lineage)


def watched_runner(recipe: str, folder: Path, data: dict[str, Any], events: Events) -> LineageRunner:
    runner = make_runner(recipe, folder, data)
    build_trainer, evaluate = runner.build_trainer, runner.evaluate

    def build_watched(student: Any, teacher: Any, generation: Any) -> Any:
        events.generation = f"gen{generation.index}"
        trainer = build_trainer(student, teacher, generation)
        trainer.add_callback(told(events))
        return trainer

    def evaluate_watched(model: torch.nn.Module) -> Any:
        model.register_forward_pre_hook(lambda *_: events.reach("measuring the generation", "evaluation"))
        return evaluate(model)

    runner.build_trainer, runner.evaluate = build_watched, evaluate_watched
    return runner


class Harness:
    """Forks a child for every start of a lineage, so that nothing is imported twice."""

    def __init__(self, workdir: Path, kinds: list[str], verbose: bool = False) -> None:
        self.workdir, self.verbose = workdir, verbose
        self.board = mmap.mmap(-1, 512)
        loaders = {
            "images": lambda: load_images("digits", max_train_samples=64, max_eval_samples=32),
            "text": lambda: load_text("grammar", max_train_samples=480, max_eval_samples=120),
        }
        self.data = {kind: loaders[kind]() for kind in kinds}
        self.table: list[tuple[str, ...]] = []
        self.kills: Counter[str] = Counter()
        gc.collect()
        gc.freeze()

    def start(self, recipe: str, folder: Path, plan: Plan) -> tuple[int, str, float]:
        """Runs the command of a recipe; its wait status, its last event, and its seconds."""
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise RuntimeError(
                f"threads: the parent has {threads}, expected 1: a fork would copy locks of the others."
            )
        self.board[:1] = b"\0"
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            self._child(recipe, folder, plan)
        until = began + (plan.seconds if plan.mode == "time" else PATIENCE)
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            if time.monotonic() >= until:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        last = self.board[:].split(b"\0")[0].decode(errors="replace")
        seconds = time.monotonic() - began
        if os.WIFSIGNALED(status) and plan.mode != "time" and seconds >= PATIENCE:
            raise RuntimeError(f"{folder}: a start took over {PATIENCE:.0f} seconds; see {log_of(folder)}.")
        return status, last, seconds

    def _child(self, recipe: str, folder: Path, plan: Plan) -> None:
        code = 1
        try:
            descriptor = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            torch.set_num_threads(1)
            logging.basicConfig(level=logging.INFO, format="%(message)s")
            print(f"---- {plan}", flush=True)
            events = Events(folder, plan, self.board)
            runner = watched_runner(recipe, folder, self.data, events)
            events.watch()
            runner.run()
            if plan.mode == "never":
                folder.with_suffix(".events").write_text(json.dumps(events.seen))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def reference(self, recipe: str) -> Reference:
        folder = self.workdir / f"{recipe}.reference"
        status, last, seconds = self.start(recipe, folder, Plan())
        if status != 0:
            raise RuntimeError(f"{folder}: the reference failed after {last!r}:\n{tail(log_of(folder))}")
        return Reference(folder, json.loads(folder.with_suffix(".events").read_text()), seconds)

    def lineage(self, recipe: str, run: int, reference: Reference, seed: int, kills: int) -> list[str]:
        """Trains one lineage with at most so many kills; what is wrong with it."""
        dice = random.Random(f"{seed} {recipe} {run}")
        folder = self.workdir / f"{recipe}.{run}"
        killed, was_cut = 0, False
        while True:
            plan = draw(dice, reference, again=killed > 0) if killed < min(kills, MOST_KILLS) else Plan("last")
            torn = dice.random() < TORN, dice.random(), dice.random()
            status, last, _ = self.start(recipe, folder, plan)
            if not os.WIFSIGNALED(status):
                break
            killed += 1
            category, generation, what = (last or "start\t\tnothing yet").split("\t")
            cut = cut_newest(folder, *torn[1:]) if torn[0] else None
            was_cut = was_cut or cut is not None
            half = plan.half and plan.mode != "time" and what.startswith(("open", "torch.save", "safetensors"))
            what += " (half)" * half
            self.table.append((recipe, str(run), generation, plan.mode, category, what, cut or ""))
            self.kills[category] += 1
            if self.verbose:
                print("  ".join(self.table[-1]), file=sys.stderr, flush=True)
        if status != 0:
            return [f"exit status {os.waitstatus_to_exitcode(status)} after {killed} kills:\n{tail(log_of(folder))}"]
        if was_cut:
            remove_what_was_moved_aside(folder / "checkpoints")
        return differences(reference.folder, folder)


def remove_what_was_moved_aside(checkpoints: Path) -> None:
    for path in checkpoints.glob("gen*.replaced-*"):
        shutil.rmtree(path)
    with contextlib.suppress(OSError):  # it holds something else, or is not there
        checkpoints.rmdir()


def draw(dice: random.Random, reference: Reference, again: bool) -> Plan:
    """When the next start is killed; sooner where less is left to do. Beyond the end it is not killed."""
    mode, half, left = dice.choice(MODES), dice.random() < 0.5, dice.random() if again else 1.0
    category = dice.choice(sorted(set(reference.events)))
    if mode == "time":
        return Plan(mode, seconds=dice.uniform(0.0, reference.seconds * left))
    category = category if mode == "place" else None
    count = reference.events.count(category) if category else len(reference.events)
    return Plan(mode, dice.randint(1, max(1, round(count * left))), category, half=half)


def cut_newest(folder: Path, which: float, how: float) -> str | None:
    """Cuts a file of the newest checkpoint to its half or to nothing: the last one written, or any other."""
    of_generations = (path for path in folder.glob("checkpoints/gen*/checkpoint-*") if not path.parent.suffix)
    found = sorted(of_generations, key=lambda path: int(path.name.split("-")[1]))
    files = [path for path in found[-1].iterdir() if path.stat().st_size] if found else []
    if not files:
        return None
    files.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    path = files[-1] if which < 0.3 else files[int((which - 0.3) / 0.7 * len(files))]
    os.truncate(path, path.stat().st_size // 2 if how < 0.7 else 0)
    return f"cut {path.relative_to(folder / 'checkpoints')}"


def differences(reference: Path, folder: Path) -> list[str]:
    """Where a folder is not what the reference is."""
    expected, found = ({str(path.relative_to(top)) for path in top.rglob("*")} for top in (reference, folder))
    wrong = [f"left behind: {name}" for name in sorted(found - expected)]
    wrong += [f"missing: {name}" for name in sorted(expected - found)]
    for name in sorted(expected & found):
        if (reference / name).is_file():
            wrong += file_differences(name, reference / name, folder / name)
    return wrong


def file_differences(name: str, expected: Path, found: Path) -> list[str]:
    if name == "lineage.json":
        contents = [json.loads(path.read_text()) for path in (expected, found)]
        flat = [dict(flattened(content)) for content in contents]
        keys = sorted(key for key in {**flat[0], **flat[1]} if key.rpartition(".")[2] not in TIMES)
        changed = [key for key in keys if flat[0].get(key) != flat[1].get(key)]
        return [f"{name}: {key} is {flat[1].get(key)!r}, not {flat[0].get(key)!r}" for key in changed]
    if name.endswith("README.md"):
        # Times are in it, so that it is held against its own lineage.json, which is held against the other one.
        return [] if found.read_text() == card_of(found) else [f"{name}: is not what lineage.json gives"]
    if name.endswith((CURVE_NAME, HISTORY_NAME, *REPORT_NAMES)):
        return []  # the loss is logged as a mean since the start of the process
    return [] if expected.read_bytes() == found.read_bytes() else [f"{name}: other bytes"]


def card_of(path: Path) -> str:
    content = json.loads((path.parents[1] / "lineage.json").read_text())
    if path.parent.name == "ensemble":
        links = {"report": f"../{REPORT_NAME}", "picture": f"../{REPORT_PICTURE_NAME}"}
        return ensemble_card(content, content["ensembles"][-1], **links)
    return generation_card(content, path.parent, int(path.parent.name.removeprefix("gen")))


def flattened(content: Any, place: str = "") -> list[tuple[str, Any]]:
    if isinstance(content, dict | list) and content:
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return [pair for key, value in items for pair in flattened(value, f"{place}.{key}")]
    return [(place, content)]


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-8:])


def show(rows: list[tuple[str, ...]]) -> None:
    rows = [("lineage", "run", "generation", "mode", "in the middle of", "last event", "afterwards"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many in all, over all lineages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["images", "text"], choices=["images", "text"])
    parser.add_argument("--workdir", type=Path, default=None, help="kept; a temporary folder when not given")
    parser.add_argument("--verbose", action="store_true", help="tell of every kill when it happens")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    workdir = Path(asked.workdir or tempfile.mkdtemp(prefix="born-again-kills-")).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    harness = Harness(workdir, asked.kinds, asked.verbose)
    recipes = [recipe for recipe in RECIPES if recipe.partition("-")[0] in asked.kinds]
    references = {recipe: harness.reference(recipe) for recipe in recipes}
    lineages, failed = 0, {}
    # Every recipe at least once; the last lineages may need fewer kills.
    while sum(harness.kills.values()) < asked.kills or lineages < len(recipes):
        recipe, run = recipes[lineages % len(recipes)], lineages // len(recipes)
        left = asked.kills - sum(harness.kills.values())
        wrong = harness.lineage(recipe, run, references[recipe], asked.seed, max(left, 1))
        lineages += 1
        if wrong:
            failed[f"{recipe}.{run}"] = wrong
        else:
            shutil.rmtree(workdir / f"{recipe}.{run}")
    show(harness.table)
    for name, wrong in failed.items():
        print(f"\n{name} is not its reference:", *(f"  {line}" for line in wrong), sep="\n")
    categories = ", ".join(f"{count} {category}" for category, count in harness.kills.most_common())
    print(
        f"\n{sum(harness.kills.values())} kills of {lineages} lineages in {time.monotonic() - began:.0f} seconds "
        f"({categories}): {len(failed) or 'none'} not equal to the lineage that was never killed."
    )
    if failed:
        again = f"--kills {asked.kills} --seed {asked.seed} --kinds {' '.join(asked.kinds)}"
        print(f"To see it again: python tests/kill_harness.py {again}; folders and logs are in {workdir}.")
        return 1
    if asked.workdir is None:
        shutil.rmtree(workdir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
