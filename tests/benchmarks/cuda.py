"""Everything that a GPU has to tell, in one call: the tests marked gpu, steps, a whole lineage, the large loss.

    python -m tests.benchmarks.cuda [--minutes 8] [--parts gpu_tests loss ...] [--cifar100 FOLDER] [--output cuda.json]
    python -m tests.benchmarks.cuda --smoke    # tiny networks, to its end, also on a CPU

Each part is a process of its own with a time limit of its own, the most important first; what no time is left for is
named. What a part measured before it failed or ran out of time is kept. A table is printed as it grows, and all is
written to --output as JSON after each part.

Steps: bf16, channels_last, data on the device, fused SGD. "loop" is a bare PyTorch loop, see
tests/benchmarks/training.py, "compiled" the same by torch.compile with CUDA graphs; "trainer" is ours with the teacher
in inference precision and replayed as a CUDA graph, as the examples choose on CUDA, "trainer, compiled" with
torch_compile_mode reduce-overhead.
`of peak` is the share of the card's dense bf16 peak: three times the forward's operations for the student and once for
the teacher. Of text 2 operations are counted for each weight and word. Memory is the most that was allocated.

Whole lineage: a teacher and a student by examples/run_cifar.py, its time against its steady state. `--cifar100` is a
folder as run_cifar.py takes it, or one with train.bin and test.bin (the binary version of CIFAR-100, which needs no
library); without it images are random.

It runs with PYTHONPATH alone, the lowest versions in pyproject.toml, and without datasets and evaluate. Liger's loss
is measured beside ours where liger-kernel is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BATCH, WARM_UP, STEPS = 128, 20, 60
# Of a part: seconds that it may take within 8 minutes; more minutes stretch all.
LIMITS = {
    "gpu_tests": 100,
    "wide_resnet28_10_cifar": 45,
    "wide_resnet28_10_cifar, compiled": 110,
    "wide_resnet28_2_cifar": 40,
    "lstm-large": 40,
    "lineage": 110,
    "loss": 50,
    "wide_resnet28_2_cifar, compiled": 90,
    "lstm-large, compiled": 70,
    "gpt2-small": 50,
    "gpt2-small, compiled": 90,
    "densenet90_60_cifar": 60,
    "char-cnn-lstm": 40,
    "densenet90_60_cifar, compiled": 150,
    "char-cnn-lstm, compiled": 70,
}
SMOKE = ("gpu_tests", "test_wide_resnet_cifar", "test_wide_resnet_cifar, compiled", "lstm-small", "lineage", "loss")
_START = 20  # seconds without which a part need not begin
# Dense bf16 operations a second, by what the card's name has; NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
_MARK = "measured: "


# ---- Parts, each in a process of its own ----


def gpu_tests(options: Namespace) -> Iterator[dict[str, Any]]:
    """`pytest -m gpu`, of the files that have such tests: others need libraries that may be missing."""
    import pytest

    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    counts: Counter[str] = Counter()

    class Count:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1

    status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *files], plugins=[Count()])
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or f"exit status {int(status)}"
    yield {"what": "pytest -m gpu", "value": text}


def task_of(name: str, options: Namespace) -> Any:
    from tests.benchmarks.training import ImageTask, TextTask

    if options.smoke:
        small = {"warm_up": 1}
        return ImageTask(name, 4, 2, **small) if "cifar" in name else TextTask(name, 2, 5, 2, vocabulary=50, **small)
    if "cifar" in name:
        return ImageTask(name, BATCH, STEPS, warm_up=WARM_UP)
    rows, window = (16, 256) if name == "gpt2-small" else (32, 35)
    return TextTask(name, rows, window, STEPS, warm_up=WARM_UP)


def steps(options: Namespace) -> Iterator[dict[str, Any]]:
    """Items a second of one network, by loop and trainer, eager or compiled."""
    import torch

    name, _, compiled = options.part.partition(", ")
    task = task_of(name, options)
    mode = {"backend": "eager"} if options.smoke else {"mode": "reduce-overhead"}
    trainer = {"teacher_precision": "inference", "fused_optimizer": torch.cuda.is_available()}
    if compiled:
        trainer |= {"torch_compile": True, "torch_compile_mode": "reduce-overhead"}
        trainer |= {"torch_compile_backend": "eager"} if options.smoke else {}
    operations = operations_of(task)
    peak = peak_of_the_card()
    for taught in (True, False):
        for variant in ("trainer", "loop"):
            torch.compiler.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            loop = {"compile_args": mode} if compiled else {}
            seconds = (
                task.with_trainer(taught, **trainer) if variant == "trainer" else task.with_bare_loop(taught, **loop)
            )
            rate = task.items / seconds
            row = {"what": f"{task}, {variant}{', compiled' * bool(compiled)}, {'taught' if taught else 'labels'}"}
            row |= {"value": rate, "unit": f"{task.unit}/s"}
            if peak is not None:
                row["of peak"] = rate * operations * (4 if taught else 3) / peak
            if torch.cuda.is_available():
                row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
            yield row


def operations_of(task: Any) -> float:
    """Floating point operations of a forward, per item."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = task.network()
    if task.unit == "words":
        layers = [part.weight for part in network.modules() if isinstance(part, torch.nn.Embedding)]
        words = sum(weight.numel() for weight in layers)
        decoder = network.get_output_embeddings().weight
        tied = any(decoder is weight for weight in layers)
        return 2.0 * (sum(part.numel() for part in network.parameters()) - words + tied * decoder.numel())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(pixel_values=torch.zeros(1, 3, 32, 32))
    return float(counter.get_total_flops())


def peak_of_the_card() -> float | None:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAKS.items() if all(word in name for word in part.split())), None)


def loss(options: Namespace) -> Iterator[dict[str, Any]]:
    """The loss over a large vocabulary from hidden states in bf16, forward and backward."""
    import torch

    from tests.benchmarks import chunked
    from tests.benchmarks.alternated import medians
    from tests.benchmarks.training import device, synchronize

    tokens, hidden, words = (16, 8, 100) if options.smoke else (2_048, 2_048, 128_256)
    backend = {"backend": "eager"} if options.smoke else {}
    others: dict[str, Callable[..., Any]] = {"torch, compiled": torch.compile(chunked.with_torch, **backend)}
    if importlib.util.find_spec("liger_kernel") is not None:
        others["liger, fused linear JSD with beta 0"] = liger_loss
    failed: dict[str, str] = {}
    with torch.device(device()):
        works = chunked.works(tokens, hidden, words, "ban", torch.bfloat16, others)
        for name, work in list(works.items()):
            try:
                work()
                synchronize()
            except Exception as error:  # one that does not run here must not hide the others
                failed[name] = str(error)[:200]
                del works[name]
        timed = {name: lambda work=work: (work(), synchronize()) for name, work in works.items()}
        seconds = medians(timed, 2 if options.smoke else 7)
        for name, work in works.items():
            row = {"what": f"loss, {tokens:,} x {words:,}, {name}", "value": seconds[name] * 1e3, "unit": "ms"}
            if torch.cuda.is_available():
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                work()
                row["GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            yield row
    for name, error in failed.items():
        yield {"what": f"loss, {name}", "value": f"failed: {error}"}


def liger_loss(student: Any, teacher: Any) -> Any:
    """Liger's fused linear JSD, with beta 0 the KL divergence from teacher to student, with ours' gradient."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(student.hidden, student.weight, teacher.hidden, teacher.weight)


def lineage(options: Namespace) -> Iterator[dict[str, Any]]:
    """A teacher and a student, against the steady state of their own steps."""
    import transformers

    from tests.benchmarks import lineage as whole

    transformers.utils.logging.set_verbosity_error()
    settings = Namespace(dataset=None, model="wide_resnet28_10_cifar", images=50_000, epochs=3, students=1)
    settings.rest = ["--dropout", "0", "--seed", "1"]
    if options.smoke:
        settings = Namespace(dataset=None, model="test_wide_resnet_cifar", images=256, epochs=1, students=1, rest=[])
        settings.rest = ["--per_device_train_batch_size", "64"]
    if options.cifar100 is not None:
        if (options.cifar100 / "train.bin").is_file():
            whole.random_images = lambda count, test: binary_cifar100(options.cifar100, count, test)
        else:
            settings.dataset = str(options.cifar100)
    found = whole.measure(settings)
    data = "random images" if options.cifar100 is None else "CIFAR-100"
    ratio = found["steady"] / found["wall"]
    yield {
        "what": f"lineage, {settings.model}, 2 x {settings.epochs} epochs of {settings.images:,} {data}",
        "value": ratio,
        "unit": "of steady state",
        **found,
    }


def binary_cifar100(folder: Path, count: int, test: int) -> Any:
    """CIFAR-100 of train.bin and test.bin: a coarse label, a fine label and 3 x 32 x 32 bytes for each image."""
    import numpy as np
    import torch

    from born_again.data import images
    from born_again.data.images import ImageData, ImageSplit

    def split(name: str, rows: int) -> ImageSplit:
        raw = np.fromfile(folder / name, np.uint8).reshape(-1, 2 + 3 * 32 * 32)[:rows]
        pixels = raw[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return ImageSplit(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(raw[:, 1].astype(np.int64)))

    train, names = split("train.bin", count), tuple(str(label) for label in range(100))
    facts = {"source": "cifar100", "rows": {"train": count, "test": test}}
    return ImageData(train, split("test.bin", test), names, *images.channel_statistics(train.pixels), facts, flip=True)


PARTS: dict[str, Callable[[Namespace], Iterator[dict[str, Any]]]] = {
    "gpu_tests": gpu_tests,
    "lineage": lineage,
    "loss": loss,
}


# ---- The whole ----


def run_part(name: str, options: Namespace, limit: float) -> dict[str, Any]:
    """One part in a process of its own, ended with all that it started when its time is over."""
    command = [sys.executable, "-m", "tests.benchmarks.cuda", "--part", name]
    command += ["--smoke"] * options.smoke
    command += [] if options.cifar100 is None else ["--cifar100", str(options.cifar100.resolve())]
    begun, status = time.monotonic(), "done"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if child.wait(limit):
                status = f"failed with exit status {child.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        output.seek(0)
        lines = output.read().splitlines()
    rows = [json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)]
    part = {"part": name, "status": status, "seconds": round(time.monotonic() - begun, 1), "rows": rows}
    if status != "done" or name == "gpu_tests":
        part["output"] = [line for line in lines if not line.startswith(_MARK)][-60:]
    return part


def print_part(part: dict[str, Any]) -> None:
    for row in part["rows"]:
        value = row["value"] if isinstance(row["value"], str) else f"{row['value']:,.4g} {row['unit']}"
        if not isinstance(row["value"], str) and row["value"] >= 1_000:
            value = f"{row['value']:,.0f} {row['unit']}"
        peak = f"{row['of peak']:.1%}" if "of peak" in row else ""
        memory = f"{row['GiB']:.2f}" if "GiB" in row else ""
        print(f"| {row['what']:72} | {value:>22} | {peak:>7} | {memory:>6} |", flush=True)
    if part["status"] != "done":
        print(f"| {part['part']:72} | {part['status']:>22} | {'':>7} | {'':>6} |", flush=True)
        print("\n".join(f"    {line}" for line in part.get("output", [])[-15:]), flush=True)


def about_the_machine() -> dict[str, Any]:
    import torch
    import transformers

    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu"}
    if torch.cuda.is_available():
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=[*LIMITS, *SMOKE], metavar="PART", help=", ".join(LIMITS))
    parser.add_argument("--cifar100", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("cuda.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny networks")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        from tests.benchmarks.standins import stand_in_for_missing_libraries

        if missing := stand_in_for_missing_libraries():
            print("stand-ins for", *missing)
        for row in PARTS.get(options.part, steps)(options):
            print(_MARK + json.dumps(row), flush=True)
        return
    end = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"machine": about_the_machine(), "parts": []}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    print(f"| {'':72} | {'median or ratio':>22} | of peak | {'GiB':>6} |")
    print(f"|{'-' * 74}|{'-' * 24}|{'-' * 9}|{'-' * 8}|")
    for name in options.parts or (SMOKE if options.smoke else LIMITS):
        left = end - time.monotonic()
        if left < _START:
            part: dict[str, Any] = {"part": name, "status": "no time left", "seconds": 0.0, "rows": []}
        else:
            limit = LIMITS.get(name, 200.0) * max(1.0, options.minutes / 8)
            part = run_part(name, options, min(limit, left))
        found["parts"].append(part)
        print_part(part)
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
