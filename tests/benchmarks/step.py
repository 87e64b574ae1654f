"""Training throughput of BornAgainTrainer against a bare PyTorch loop that does the same work, in one run.

    python -m tests.benchmarks.step [--model wide_resnet16_1_cifar] [--batch 128] [--steps 40] [--repeats 5]

Both train the same student under the same teacher on the same synthetic images through `ImageDataset`: bf16 autocast
and channels_last, teacher forward, student forward and backward, SGD with Nesterov momentum. The trainer also logs,
checks for NaN and sums the distillation terms. Repeats alternate; the first of each is a warm-up that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from born_again import BornAgainTrainer, BornAgainTrainingArguments, create_image_classifier
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.objectives import dark_knowledge_loss

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def classifier(name: str) -> torch.nn.Module:
    return create_image_classifier(name, [str(label) for label in range(10)], *STATISTICS)


def images(count: int) -> ImageDataset:
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    split = ImageSplit(pixels, torch.randint(0, 10, (count,)))
    return ImageDataset(split, *STATISTICS, augment=True, flip=True, seed=0)


class Stopwatch(TrainerCallback):
    """Seconds from the first step's beginning to the last one's end: start-up is not a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.start


def with_trainer(name: str, dataset: ImageDataset, batch: int, steps: int) -> float:
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = BornAgainTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            optim="sgd",
            optim_args="momentum=0.9,nesterov=True",
            learning_rate=0.01,
            max_grad_norm=0.0,
            bf16=True,
            channels_last=True,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        student, teacher = classifier(name), classifier(name)
        trainer = BornAgainTrainer(
            student, args, teacher=teacher, train_dataset=dataset, data_collator=collate_batch, callbacks=[watch]
        )
        trainer.log = lambda *args, **kwargs: None  # printing is no work of a step
        trainer._warn_of_an_unfitted_teacher = lambda: None
        trainer.train()
    return watch.seconds


def with_bare_loop(name: str, dataset: ImageDataset, batch: int, steps: int) -> float:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    student = classifier(name).to(device, memory_format=torch.channels_last).train()
    teacher = classifier(name).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    start = time.perf_counter()
    for step in range(steps):
        if step * batch % len(dataset) == 0:
            order = torch.randperm(len(dataset)).tolist()
        first = step * batch % len(dataset)
        pixels = dataset.__getitems__(order[first : first + batch])["pixel_values"].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                teacher_logits = teacher(pixel_values=pixels).logits
            student_logits = student(pixel_values=pixels).logits
        loss = dark_knowledge_loss(student_logits, teacher_logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wide_resnet16_1_cifar")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bar()
    dataset = images(options.batch * options.steps)
    ways = {"bare loop": with_bare_loop, "BornAgainTrainer": with_trainer}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(options.repeats + 1):
        for way, train in ways.items():
            seconds = train(options.model, dataset, options.batch, options.steps)
            if repeat:
                rates[way].append(options.batch * options.steps / seconds)
    ratios = [ours / bare for ours, bare in zip(rates["BornAgainTrainer"], rates["bare loop"], strict=True)]
    print(f"{options.model}, batch {options.batch}, {options.steps} steps, {torch.get_num_threads()} threads, bf16")
    print("| way              | images/s, median | min  | max  |")
    print("|------------------|------------------|------|------|")
    for way, values in rates.items():
        print(f"| {way:16} | {statistics.median(values):16.0f} | {min(values):4.0f} | {max(values):4.0f} |")
    print(f"ratio to the bare loop: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
