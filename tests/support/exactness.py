"""One training in many arrangements: what each of them computes, for test_exactness.py.

torchrun --nproc_per_node N tests/support/exactness.py FOLDER WHICH ENGINE

In float64 (DeepSpeed: float32, its widest) and without BatchNorm, so that rows, tokens and streams count once or the
numbers differ. An arrangement is how many processes share a step and how many micro-batches it has; what a step is
made of stays the same.
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import engines
import torch
from helpers import Network, arguments, language_model, sentences, vectors
from processes import leave
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.data.streams import TokenStreams, collate_windows
from born_again.metrics import classification_metrics
from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM
from born_again.training.sharding import gathered

BATCH = 8  # rows or streams of a step, of all processes and micro-batches
STEPS = 3
WINDOW = 5
OBJECTIVES = ("label", "ban", "ban+l", "cwtm", "dkpp")


@dataclass(frozen=True)
class Cell:
    """A training of the matrix.

    Args:
        task: "images", "tokens" (texts of their own lengths, padded), "stream" (the same rows without a length) or
            "lstm" (contiguous streams, states carried from window to window).
        objective: of the paper, or "label" without a teacher.
        rows: of the training set; 22 and 19 leave a ragged last batch of 6 and of 3. Of an LSTM windows are ragged.
        accumulated: micro-batches of a step.
    """

    task: str
    objective: str
    rows: int = 24
    accumulated: int = 1

    @property
    def reference(self) -> "Cell":
        """The cell of one process that has to give the same numbers: 2 accumulated windows are two, not one."""
        return self if self.task == "lstm" else Cell(self.task, self.objective, self.rows)


CELLS = {
    "few": [
        Cell("images", "ban+l", 22),
        Cell("images", "cwtm", 19, 2),
        Cell("tokens", "label", 19),
        Cell("tokens", "cwtm", 22, 2),
        Cell("stream", "ban", 19),
        Cell("lstm", "cwtm", accumulated=2),
    ],
    "all": [
        *(Cell(*values) for values in itertools.product(("images", "tokens"), OBJECTIVES, (24, 22, 19), (1, 2))),
        *(Cell("stream", objective, rows) for objective, rows in itertools.product(OBJECTIVES, (22, 19))),
        *(Cell("lstm", objective, accumulated=accumulated) for objective in OBJECTIVES for accumulated in (1, 2)),
    ],
    "sharded": [
        Cell(task, objective, *shares)
        for task, objective, shares in itertools.product(("images", "tokens"), OBJECTIVES, ((24, 2), (19, 1)))
    ],
}


class ImageNetwork(nn.Module):
    """A convolution and a classifier of images, in float64 as it is made."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.classifier = nn.Linear(8, 4)
        self.double()

    def forward(self, pixel_values):
        hidden = self.norm(self.convolution(pixel_values.to(self.convolution.weight.dtype))).relu()
        return {"logits": self.classifier(hidden.mean((2, 3)))}


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def images(rows: int) -> ImageDataset:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (rows, 8, 8, 3), dtype=torch.uint8, generator=generator)
    split = ImageSplit(pixels, torch.randint(0, 4, (rows,), generator=generator))
    return ImageDataset(split, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), augment=True, flip=True, seed=5)


def lstm(seed: int) -> LstmLMForCausalLM:
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=17, hidden_size=6, dropout=0.0)).double()


def streams() -> TokenStreams:
    # The last window is ragged, and the last stream too short by 3.
    tokens = torch.randint(0, 17, (BATCH * (5 * WINDOW + 2) - 3,), generator=torch.Generator().manual_seed(3))
    return TokenStreams(tokens, BATCH, WINDOW, before=0)


def trainer_of(cell: Cell, folder: Path, **engine) -> BornAgainTrainer:
    """The trainer of a cell on this process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    size = BATCH // cell.accumulated // processes
    taught, dtype = cell.objective != "label", torch.float32 if "deepspeed" in engine else torch.float64
    settings = {
        "objective": cell.objective if taught else "ban",
        "loss_normalization": "step",
        "max_steps": STEPS,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": cell.accumulated,
        "logging_steps": 1,
        "remove_unused_columns": False,
        # The usual seed of tests draws the permutation that leaves all as they are.
        **({"permutation": "fixed", "seed": 3} if cell.objective == "dkpp" else {}),
        **engine,
    }
    kind, options = BornAgainTrainer, {}
    if cell.task == "images":
        build, data = ImageNetwork, images(cell.rows)
        options = {"data_collator": collate_batch, "callbacks": [EpochCallback()]}
        options["compute_metrics"] = classification_metrics()
        settings["batch_eval_metrics"] = True
    elif cell.task == "lstm":
        build, data, kind = lstm, streams(), BornAgainLMTrainer
        options = {"data_collator": collate_windows}
        settings |= {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
        settings["accelerator_config"] = {"split_batches": True}
    else:
        build, data, kind = language_model, sentences("next", cell.rows), BornAgainLMTrainer
    train = Stream(data) if cell.task == "stream" else data
    trainer = kind(
        build(1).to(dtype),
        arguments(folder, **settings),
        train_dataset=train,
        eval_dataset=data,
        teacher=build(2).to(dtype) if taught else None,
        **options,
    )
    trainer.in_lineage = True  # which has the teacher measured whatever the objective
    return trainer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter or gradient, flat and in one piece, also where an engine keeps it in several."""
    return gathered(tensor, keep=True).detach().flatten().double()


class BeforeStep(TrainerCallback):
    """Calls a function before every step of DeepSpeed's, which is part of its backward pass."""

    def __init__(self, trainer, keep):
        self.trainer, self.keep = trainer, keep

    def on_train_begin(self, *args, **kwargs):
        from deepspeed.utils import safe_get_full_grad

        engine = self.trainer.model_wrapped
        step = engine.step

        def step_afterwards(*args, **kwargs):
            self.keep(gradient_of=safe_get_full_grad)
            step(*args, **kwargs)

        engine.step = step_afterwards


def computed(cell: Cell, folder: Path, **engine) -> dict[str, torch.Tensor]:
    """The gradient of every step, the weights after all, what was logged, and evaluations."""
    trainer = trainer_of(cell, folder, **engine)
    gradients: list[torch.Tensor] = []

    def keep(*_, gradient_of=lambda parameter: parameter.grad):
        gradients.append(torch.cat([whole(gradient_of(parameter)) for parameter in trainer.model.parameters()]))

    if "deepspeed" in engine:
        trainer.add_callback(BeforeStep(trainer, keep))
    else:
        trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    metrics = trainer.evaluate()
    named = ("loss", "accuracy", "nll", "perplexity", "tokens")
    measured = trainer.teacher_train_metrics or {}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ["loss", *(["kd_loss", "teacher_agreement"] if trainer.teacher is not None else [])]
    return {
        "wrapped": torch.tensor(trainer.model_wrapped is not trainer.model),
        "gradients": torch.stack(gradients),
        "weights": torch.cat([whole(parameter) for parameter in trainer.model.parameters()]),
        "evaluated": torch.tensor([metrics.get(f"eval_{name}", 0.0) for name in named], dtype=torch.float64),
        "teacher": torch.tensor([measured[name] for name in sorted(measured)], dtype=torch.float64),
        "logged": torch.tensor([[entry[name] for name in names] for entry in logged], dtype=torch.float64),
    }


def drawn(folder: Path, **engine) -> dict[str, torch.Tensor]:
    """What a training with dropout draws and weighs; and one that was resumed in its first epoch."""
    found = {}
    for name, resume in (("", None), (" resumed", str(folder / "drawn" / "checkpoint-2"))):
        args = arguments(
            folder / "drawn",
            max_steps=5,
            per_device_train_batch_size=4,
            loss_normalization="step",
            save_strategy="steps",
            save_steps=2,
            **engine,
        )
        student, masks = Network(1, dropout=0.5), []
        student.dropout.register_forward_hook(lambda module, inputs, out, masks=masks: masks.append(out.ne(0)))
        trainer = BornAgainTrainer(student, args, train_dataset=vectors(22))
        trainer.train(resume_from_checkpoint=resume)
        found[f"masks{name}"] = torch.stack(masks[-3:])
        found[f"weights{name}"] = torch.cat([whole(parameter) for parameter in student.parameters()])
    return found


def grouped(folder: Path, **engine) -> torch.Tensor:
    """The rows that this process was shown in two epochs, where rows of one length are together."""
    args = arguments(
        folder,
        num_train_epochs=2,
        max_steps=-1,
        per_device_train_batch_size=4,
        loss_normalization="step",
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        **engine,
    )
    student, seen = Network(1, dropout=0.5), []
    student.register_forward_pre_hook(lambda module, inputs, named: seen.append(named["x"][:, 0]), with_kwargs=True)
    data = [{**row, "input_ids": [0] * (5 + 3 * (place % 4))} for place, row in enumerate(vectors(24))]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in ("x", "labels")}

    BornAgainTrainer(student, args, train_dataset=data, data_collator=collate).train()
    return torch.stack(seen)


def main(folder: Path, which: str, engine: str = "ddp") -> None:
    torch.set_num_threads(1)
    options = {"ddp_backend": "gloo"} if engine == "ddp" else engines.prepare(engine)
    results = {str(cell): computed(cell, folder / str(place), **options) for place, cell in enumerate(CELLS[which])}
    if which == "few":
        results |= {"drawn": drawn(folder, **options), "grouped": grouped(folder / "grouped", **options)}
    leave(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
