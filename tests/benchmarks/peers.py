"""Peers in one table: items a second, memory, and whether what they computed was right, in one run on one machine.

    python -m tests.benchmarks.peers --cifar10 FOLDER --ptb FOLDER
    python -m tests.benchmarks.peers --images 512 --tokens 20000 --repeats 1       (a quick try, on made-up data)

Images: wide_resnet16_1_cifar taught by another, batch 128. Text: a GPT-2 of 4 layers, 128 wide, 10,000 words, taught
by another, batch 16 x 64 words. Every peer trains the same student under the same teacher with SGD on the same items,
in two modes: as it runs by default, and at equal precision; see `peers_images` and `peers_text` for what that means
for each. Every training has a process of its own (`peers_run`), which loads the data, warms up, times the steps after
that and tells its peak memory; repeats alternate between the peers, and the first of each is not counted. Gradient and
teacher are looked at in one more process, in float64, with the teacher handed over in training mode, as weights just
loaded leave it: the gradient of the first step against the float64 twin of the paper's loss, as "exact" (within 1e-6),
as a plain factor, or as how far it is off beside such a factor; the same over two accumulated micro-batches.

Ratios are the time of born_again over that of the row, by the wall and by the CPU time of the process; a worker of a
loader (timm's has one by default) is in neither the CPU time nor the memory. Memory is the peak of the process,
imports included, and what it grew by from the moment the networks stood; on a GPU both are what was allocated there.

The peers are no dependency of this project, and most of them require other versions of our dependencies. Install them
without their dependencies:

    pip install --no-deps torchdistill==1.1.5 KD_Lib==0.0.32 textbrewer==0.2.1.post1 trl==1.16.0

KD_Lib brings a package called `tests`, which shadows this folder: delete that. A peer that is missing or
fails stands in the table with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from born_again.data.images import load_images
from born_again.data.text import load_text
from born_again.lineage.machine import hardware, has_fast_bf16, versions
from tests.benchmarks import peers_images, peers_text
from tests.benchmarks.peers_run import CHECK_STEPS, EXACT, Run, check, measure

TASKS = {"images": peers_images, "text": peers_text}
MODES = {"default": "as it runs by default", "equal": "at equal precision"}
OURS, FLOOR = "born_again", "bare loop"
PACKAGES = {"torchdistill": "torchdistill", "KD_Lib": "KD-Lib", "TextBrewer": "textbrewer", "timm": "timm"}
PACKAGES |= {"TRL GKD": "trl", "HF docs pattern": "transformers", "born_again": "born-again"}
QUIET = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
TIMEOUT = 3600
Results = dict[tuple[str, str], list[dict[str, Any]]]


def prepare_images(folder: Path, source: Path | None, count: int) -> str:
    """Writes `count` images as arrays and as a dataset of encoded images; returns what they are."""
    if source is None:
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = generator.integers(0, 10, count)
    else:
        split = load_images(str(source), max_train_samples=count, max_eval_samples=1).train
        pixels, labels = split.pixels.numpy(), split.labels.numpy()
    _expect(count, len(labels), "images")
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "labels.npy", labels)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(10)})
    rows = {"img": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder / "hub")
    return "synthetic images" if source is None else f"{source.name} images"


def prepare_text(folder: Path, source: Path | None, count: int) -> str:
    """Writes `count` windows of words; returns what they are."""
    words = count * peers_text.WINDOW
    if source is None:
        tokens = np.random.default_rng(0).integers(0, peers_text.WORDS, words)
    else:
        tokens = load_text(source, max_train_samples=words, max_eval_samples=1).train.numpy()
    _expect(words, len(tokens), "words")
    if tokens.max() >= peers_text.WORDS:
        raise ValueError(f"--ptb {source} has more than {peers_text.WORDS:,} words; expected Penn Treebank")
    np.save(folder / "windows.npy", tokens.reshape(count, peers_text.WINDOW))
    return "synthetic words" if source is None else f"{source.name} words"


def _expect(needed: int, found: int, what: str) -> None:
    if found < needed:
        raise ValueError(f"the data has {found:,} {what}; expected {needed:,}, warm-up included: ask for fewer")


def run_child(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one training in a process of its own and returns its figures, or {"failed": reason}."""
    command = [sys.executable, "-m", "tests.benchmarks.peers", "--child", json.dumps(request)]
    quiet = {"text": True, "capture_output": True, "cwd": _root(), "env": {**os.environ, **QUIET}}
    try:
        child = subprocess.run(command, timeout=TIMEOUT, **quiet)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {TIMEOUT} seconds"}
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        return {"failed": f"exit status {child.returncode}: {child.stderr.strip()[-200:]}"}
    return json.loads(lines[-1])


def be_child(request: dict[str, Any]) -> dict[str, Any]:
    """What a child does; anything it raises is its result."""
    task = TASKS[request.pop("task")]
    variant, mode, settings = task.VARIANTS[request.pop("variant")], request.pop("mode"), request
    settings["folder"] = Path(settings["folder"])
    try:
        if mode != "check":
            return measure(Run(**settings, equal=mode == "equal"), variant, task.networks)
        settings |= {"checked": True, "batch": task.CHECK_BATCH, "warm_up": 1, "steps": CHECK_STEPS - 2}
        found = check(Run(**settings), variant, task.networks, task.logits)
        try:
            found["accumulated"] = check(Run(**settings, accumulate=2), variant, task.networks, task.logits)
        except NotImplementedError as reason:
            found["accumulated"] = {"failed": str(reason)}
        return found
    except Exception as error:  # whatever a peer raises is what the table has to say of it
        traceback.print_exc()
        name = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
        return {"failed": name + " ".join(str(error).split())[:160]}


def run_task(name: str, folder: Path, options: argparse.Namespace, steps: int) -> tuple[Results, dict[str, Any]]:
    """Figures of every repeat by (variant, mode), and what the check of every variant found."""
    task = TASKS[name]
    variants = [variant for variant in task.VARIANTS if options.only is None or variant in options.only]
    request = {"task": name, "folder": str(folder), "warm_up": options.warm_up, "steps": steps}
    request |= {"batch": _batch(name, options), "model": options.model}
    checks = {}
    for variant in variants:
        _say(f"{name}: check of {variant}")
        checks[variant] = run_child({**request, "variant": variant, "mode": "check"})
    results: Results = {(variant, mode): [] for mode in options.modes for variant in variants}
    for repeat in range(options.repeats + 1):
        for (variant, mode), found in results.items():
            if found and "failed" in found[-1]:
                continue
            _say(f"{name}: {'warm-up' if repeat == 0 else f'repeat {repeat}'} of {variant}, {MODES[mode]}")
            figures = run_child({**request, "variant": variant, "mode": mode})
            if repeat or "failed" in figures:
                found.append(figures)
    return results, checks


def table(results: Results, checks: dict[str, Any], mode: str, items: int) -> Iterator[str]:
    """The lines of one table; `items` are those of the timed steps."""
    yield "| variant | items/s, median | min | max | ratio to born_again | by CPU time | peak MiB | training MiB \
| teacher | gradient | accumulated |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for (variant, its_mode), found in results.items():
        if its_mode != mode:
            continue
        if "failed" in found[-1]:
            yield f"| {_title(variant)} | does not run: {found[-1]['failed']} |" + " |" * 9
            continue
        rates = [items / figures["seconds"] for figures in found]
        cells = [f"{value:,.0f}" for value in (statistics.median(rates), min(rates), max(rates))]
        cells += [_ratio(results, variant, mode, clock) for clock in ("seconds", "cpu_seconds")]
        cells += [f"{statistics.median(part[name] for part in found):,.0f}" for name in ("peak_mib", "training_mib")]
        yield f"| {_title(variant)} | {' | '.join([*cells, *verdict(checks[variant])])} |"


def verdict(found: dict[str, Any]) -> tuple[str, str, str]:
    """What was found of the teacher, the gradient and the accumulated gradient, in words."""
    if "failed" in found:
        return f"not checked: {found['failed']}", "", ""
    teacher = "eval" if found["teacher_eval"] else "IN TRAINING MODE"
    if not found["teacher_unchanged"]:
        teacher += ", its statistics moved"
    return teacher, _exactness(found), _exactness(found["accumulated"])


def _exactness(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"none: {found['failed']}"
    factor, error = found["factor"], found["error"]
    if error > EXACT:
        return f"x {factor:.3g} and off by {error:.2g}"
    return "exact" if abs(factor - 1) <= EXACT else f"x {factor:.3g}"


def _ratio(results: Results, variant: str, mode: str, clock: str) -> str:
    ours = results.get((OURS, mode), [])
    if not ours or "failed" in ours[-1]:
        return "no born_again"
    return f"{_speed_ratio(ours, results[variant, mode], clock):.3f}"


def _speed_ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], clock: str) -> float:
    """Speed relative to born_again: the median over the pairs of a repeat."""
    return statistics.median(mine[clock] / its[clock] for mine, its in zip(ours, theirs, strict=True))


def goals(results: Results, mode: str) -> str:
    """Ours against the fastest peer, which the bare loop is not, and against the smallest."""
    done = {variant: found for (variant, its), found in results.items() if its == mode and "failed" not in found[-1]}
    peers = [variant for variant in done if variant not in (OURS, FLOOR)]
    if OURS not in done or not peers:
        return "no comparison: born_again or every peer is missing"
    speed = {variant: _speed_ratio(done[OURS], done[variant], "seconds") for variant in peers}
    memory = {variant: statistics.median(part["peak_mib"] for part in done[variant]) for variant in done}
    fastest, smallest = max(peers, key=speed.get), min(peers, key=memory.get)
    return (
        f"{MODES[mode]}: born_again is {1 / speed[fastest]:.2f} x the fastest peer ({fastest}) and takes "
        f"{memory[OURS] / memory[smallest]:.2f} x the memory of the smallest ({smallest})"
    )


def _title(variant: str) -> str:
    try:
        return f"{variant} {importlib.metadata.version(PACKAGES[variant])}"
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return variant


def _batch(task: str, options: argparse.Namespace) -> int:
    return options.batch if task == "images" else options.text_batch


def _root() -> Path:
    return Path(__file__).parents[2]


def _say(line: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


def parse(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", metavar="WAY", help="These rows only, such as 'bare loop' born_again.")
    parser.add_argument("--cifar10", type=Path, help="Folder in the Hub's layout; without it images are made up.")
    parser.add_argument("--ptb", type=Path, help="Folder with ptb.train.txt and so on; without it words are made up.")
    parser.add_argument("--images", type=int, default=5120, help="How many are timed.")
    parser.add_argument("--tokens", type=int, default=200_000, help="How many are timed.")
    parser.add_argument("--batch", type=int, default=128, help="Images of a step.")
    parser.add_argument("--text-batch", type=int, default=16, help="Windows of a step.")
    parser.add_argument("--warm-up", type=int, default=5, help="Steps before the clock starts.")
    parser.add_argument("--repeats", type=int, default=5, help="After one that is not counted.")
    parser.add_argument("--model", default="wide_resnet16_1_cifar", help="Of the images.")
    parser.add_argument("--json", type=Path, help="Write every figure there as well.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> None:
    options = parse(command_line)
    if options.child:
        with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
            os.chdir(scratch)  # some peers write folders where they are started
            found = be_child(json.loads(options.child))
            os.chdir(_root())
        print(json.dumps(found))
        return
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    precision = "bfloat16 autocast" if has_fast_bf16() else "float32: this machine has no fast bfloat16"
    print(f"{datetime.date.today()}, {hardware()}; equal precision is {precision}\n{known}")
    record = {}
    for name in options.tasks:
        per_item = 1 if name == "images" else peers_text.WINDOW
        requested, source = (options.images, options.cifar10) if name == "images" else (options.tokens, options.ptb)
        steps = max(1, requested // (_batch(name, options) * per_item))
        source = source.resolve() if source is not None and source.is_dir() else None
        # The check accumulates two micro-batches in each of its steps.
        count = max((steps + options.warm_up + 1) * _batch(name, options), CHECK_STEPS * TASKS[name].CHECK_BATCH * 2)
        with tempfile.TemporaryDirectory() as folder:
            prepare = prepare_images if name == "images" else prepare_text
            what = prepare(Path(folder), source, count)
            results, checks = run_task(name, Path(folder), options, steps)
        items = steps * _batch(name, options) * per_item
        for mode in options.modes:
            print(f"\n{name}, {MODES[mode]}: {items:,} {what}, {options.repeats} repeats\n")
            print("\n".join(table(results, checks, mode, items)))
            print(f"\n{goals(results, mode)}", flush=True)
        record[name] = {"checks": checks, "results": {" / ".join(key): found for key, found in results.items()}}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
