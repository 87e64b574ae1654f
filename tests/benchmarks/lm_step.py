"""Tokens a second of BornAgainLMTrainer against a bare PyTorch loop, with and without a teacher, in one run.

    python -m tests.benchmarks.lm_step [--model lstm-small] [--streams 20] [--window 35] [--steps 40] [--repeats 5]

All four train the same network on the same random words of a vocabulary of 10,000, read by `TokenStreams` with the
state carried: bf16 autocast, clipping at 0.25, SGD; with a teacher by BAN+L. The bare loop is what one would write
with torch.nn.functional; the trainer also logs, checks for NaN and, with a teacher, sums the distillation terms.
Repeats alternate; the first of each is a warm-up that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.logging import disable_progress_bar

from born_again import BornAgainLMTrainer, BornAgainTrainingArguments
from born_again.data.streams import TokenStreams, collate_windows
from born_again.models.language_models import create_language_model
from tests.benchmarks.step import Stopwatch

WORDS = [f"word{index}" for index in range(10_000)]


def with_trainer(name: str, data: TokenStreams, taught: bool) -> float:
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = BornAgainTrainingArguments(
            folder,
            objective="ban+l",
            max_steps=data.windows,
            per_device_train_batch_size=data.streams,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.25,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = BornAgainLMTrainer(
            create_language_model(name, WORDS),
            args,
            teacher=create_language_model(name, WORDS) if taught else None,
            train_dataset=data,
            data_collator=collate_windows,
            callbacks=[watch],
        )
        trainer.log = lambda *args, **kwargs: None  # printing is no work of a step
        trainer.train()
    return watch.seconds


def with_bare_loop(name: str, data: TokenStreams, taught: bool) -> float:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    student = create_language_model(name, WORDS).to(device).train()
    teacher = create_language_model(name, WORDS).to(device).eval().requires_grad_(False) if taught else None
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    ours = theirs = None
    start = time.perf_counter()
    for window in range(data.windows):
        batch = data.__getitems__(range(window * data.streams, (window + 1) * data.streams))
        words, labels = batch["input_ids"].to(device), batch["labels"].to(device).flatten()
        with torch.autocast(device.type, torch.bfloat16):
            output = student(words, state=ours)
            if taught:
                with torch.no_grad():
                    answer = teacher(words, state=theirs)
                theirs = answer.state
        ours = tuple(part.detach() for part in output.state)
        logits = output.logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, labels, ignore_index=-100)
        if taught:
            loss = loss + F.cross_entropy(logits, answer.logits.flatten(0, 1).float().softmax(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lstm-small")
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--window", type=int, default=35)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bar()
    tokens = options.streams * options.window * options.steps
    data = TokenStreams(torch.randint(len(WORDS), (tokens,)), options.streams, options.window, before=0)
    ways = {"bare loop": with_bare_loop, "BornAgainLMTrainer": with_trainer}
    rates: dict[tuple[str, bool], list[float]] = {(way, taught): [] for taught in (False, True) for way in ways}
    for repeat in range(options.repeats + 1):
        for (way, taught), measured in rates.items():
            seconds = ways[way](options.model, data, taught)
            if repeat:
                measured.append(tokens / seconds)
    print(f"{options.model}, {options.streams} x {options.window}, {torch.get_num_threads()} threads, bf16")
    print("| way                | teacher | tokens/s, median | min    | max    | ratio to the bare loop |")
    print("|--------------------|---------|------------------|--------|--------|------------------------|")
    for (way, taught), measured in rates.items():
        pairs = zip(measured, rates["bare loop", taught], strict=True)
        ratio = statistics.median(ours / bare for ours, bare in pairs)
        low, middle, high = min(measured), statistics.median(measured), max(measured)
        print(
            f"| {way:18} | {'yes' if taught else 'no':7} | {middle:16,.0f} | {low:6,.0f} | {high:6,.0f} "
            f"| {ratio:22.3f} |"
        )


if __name__ == "__main__":
    main()
