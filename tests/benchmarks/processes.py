"""Throughput of a taught step on one process and on two side by side, each with one thread, and what all-reduce takes.

    python -m tests.benchmarks.processes [--tasks wide_resnet gpt2] [--repeats 5]
    python -m tests.benchmarks.processes --smoke    # tiny networks, to its end

The batch of a step is the same: two processes take half of it each. bf16 autocast, images by BAN in channels_last,
text by BAN+L; DDP over gloo; each process on a core of its own where the system lets it choose. `no all-reduce` is the
same two processes without the reduction of gradients: the share is what that takes, with the waiting for each other.
Both launches stay alive and take turns; the first repeat is a warm-up that is not counted. Medians; ratios are of
repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from born_again.lineage.machine import keep_freed_memory, release_memory
from born_again.models.language_models import create_language_model
from tests.benchmarks.training import ImageTask, Stopwatch, TextTask, run, words


@dataclass(frozen=True)
class GPT2Task(TextTask):
    """A `TextTask` of a GPT-2 of any size, without dropout."""

    model_args: dict[str, Any] = field(default_factory=dict)

    def network(self) -> nn.Module:
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return create_language_model(self.model, words(self.vocabulary), **none, **self.model_args)


TASKS = {
    "wide_resnet": ImageTask("wide_resnet16_1_cifar", 128, 20, warm_up=2),
    "gpt2": GPT2Task(
        "gpt2-small", 16, 64, 12, 2_000, warm_up=2, model_args={"n_layer": 4, "n_embd": 256, "n_head": 4}
    ),
}
SMOKE = {
    "wide_resnet": ImageTask("test_wide_resnet_cifar", 8, 2, warm_up=1),
    "gpt2": GPT2Task("gpt2-small", 4, 8, 2, 50, warm_up=1, model_args={"n_layer": 1, "n_embd": 16, "n_head": 2}),
}
# Processes, and whether they reduce gradients.
VARIANTS = {"1 process": (1, True), "2 processes": (2, True), "no all-reduce": (2, False)}


class WithoutAllReduce(TrainerCallback):
    """Leaves the gradients of each process as they are, as DistributedDataParallel.no_sync does."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.model_wrapped.require_backward_grad_sync = False


def seconds(task: ImageTask | TextTask, processes: int, reduces: bool) -> float:
    """Seconds of the steps of one training, in each process of it."""
    is_text = isinstance(task, TextTask)
    changes: dict[str, Any] = {"accelerator_config": {"split_batches": is_text}, "use_cpu": True}
    if processes > 1:
        changes["ddp_backend"] = "gloo"
        changes |= {} if is_text else {"per_device_train_batch_size": task.batch // processes}
    with tempfile.TemporaryDirectory() as folder:
        trainer = task.trainer(folder, True, **changes)
        assert trainer.args.world_size == processes
        if not reduces:
            trainer.add_callback(WithoutAllReduce(trainer))
        taken = run(trainer, Stopwatch(task.warm_up))
        # Of two processes with their own rows.
        weights = trainer.accelerator.gather(next(trainer.model.parameters()).detach().double().sum().view(1))
        assert len(weights) == processes and (len(weights.unique()) == 1) == reduces
        release_memory(trainer)
    return taken


def serve() -> None:
    """What each process does: trains what it reads from the standard input, and answers in seconds."""
    disable_progress_bar()
    keep_freed_memory()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    for line in sys.stdin:
        name, smoke, variant = json.loads(line)
        answers.write(f"{seconds((SMOKE if smoke else TASKS)[name], *VARIANTS[variant])}\n")
        answers.flush()


@contextmanager
def launched(processes: int):
    """So many processes that serve, joined in one group; their standard input and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    found = []
    for rank in range(processes):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **({key: str(value) for key, value in group.items()} if processes > 1 else {})}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.benchmarks.processes", "--serve"]
        found.append(
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
            )
        )
        if len(cores) >= processes:
            os.sched_setaffinity(found[-1].pid, {cores[rank]})
    try:
        yield found
    finally:
        for process in found:
            process.stdin.close()
            process.wait(timeout=60)


def measured(group: list[subprocess.Popen], name: str, smoke: bool, variant: str) -> float:
    """Seconds of the slowest process."""
    for process in group:
        process.stdin.write(json.dumps([name, smoke, variant]) + "\n")
        process.stdin.flush()
    return max(float(process.stdout.readline()) for process in group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny networks")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    repeats = 1 if options.smoke else options.repeats
    print(f"1 thread each, bf16, {repeats} repeats")
    print("| task | on | items/s, median | min | max | to 1 process | share of all-reduce |")
    print("|---|---|---|---|---|---|---|")
    with ExitStack() as stack:
        groups = {processes: stack.enter_context(launched(processes)) for processes in (1, 2)}
        for name in options.tasks:
            task = (SMOKE if options.smoke else TASKS)[name]
            times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            for repeat in range(repeats + 1):
                for variant, (processes, _) in VARIANTS.items():
                    taken = measured(groups[processes], name, options.smoke, variant)
                    if repeat:
                        times[variant].append(taken)
            for variant, found in times.items():
                rates = [task.items / taken for taken in found]
                gain = statistics.median(a / b for a, b in zip(times["1 process"], found, strict=True))
                shares = [1 - less / whole for less, whole in zip(times["no all-reduce"], found, strict=True)]
                share = f"{statistics.median(shares):.0%}" if variant == "2 processes" else ""
                print(
                    f"| {task} | {variant} | {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} "
                    f"| {gain:.2f} | {share} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
