"""The peers of images: a Wide-ResNet taught by another of its size, each by the peer's own loop.

By default means: crop, flip and normalisation by torchvision on decoded images, a torch DataLoader in the process of
the training, float32, as their examples do it; for timm its own loader with its own number of workers. At equal
precision everyone gets ready batches of `ImageDataset`, bfloat16 autocast and channels_last, and the teacher alone
teaches at temperature 1, as far as the options of the peer allow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2
from transformers import DefaultDataCollator, Trainer, TrainingArguments

from born_again import BornAgainTrainer, BornAgainTrainingArguments, create_image_classifier
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.lineage.machine import has_fast_bf16, keep_freed_memory
from tests.benchmarks.peers_run import Attach, Logits, Run, Watch, stand_ins

STATISTICS = ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
CHECK_BATCH = 32
LABELS = [str(label) for label in range(10)]


def networks(run: Run) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, the same in every child."""
    pair = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pair.append(create_image_classifier(run.model, LABELS, *STATISTICS).to(run.device))
    if run.equal:
        pair = [network.to(memory_format=torch.channels_last) for network in pair]
    if run.checked:
        _fit_statistics(pair[1], run)
    return tuple(pair)


@torch.no_grad()
def _fit_statistics(teacher: nn.Module, run: Run) -> None:
    """Gives BatchNorm the statistics of the data, as a trained teacher's has.

    So what a peer pays for leaving it in training mode is what single batches differ by, and no more.
    """
    teacher.train()
    data = ready(run)
    for first in range(0, 40 * CHECK_BATCH, CHECK_BATCH):
        rows = [row % len(data) for row in range(first, first + CHECK_BATCH)]
        logits(teacher, data.__getitems__(rows)["pixel_values"].to(run.device))


def logits(classifier: nn.Module, pixels: Tensor) -> Tensor:
    return classifier(pixel_values=pixels).logits


class Pictures(Dataset):
    """Images one by one, as torchvision.datasets.CIFAR10 has them: an array in memory, Pillow, transform."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform: Any) -> None:
        self.pixels, self.labels, self.transform = pixels, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def arrays(run: Run) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.load(run.folder / f"{name}.npy")[: run.items] for name in ("pixels", "labels"))


def torchvision_transform() -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*STATISTICS),
        ]
    )


def ready(run: Run) -> ImageDataset:
    pixels, labels = map(torch.from_numpy, arrays(run))
    return ImageDataset(ImageSplit(pixels, labels), *STATISTICS, augment=True, flip=True, seed=0)


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    batch = collate_batch(batch)
    return batch["pixel_values"], batch["labels"]


def loader(run: Run) -> DataLoader:
    """Batches of (pixels, labels)."""
    if run.equal:
        return DataLoader(ready(run), run.batch, shuffle=True, drop_last=True, collate_fn=as_pair)
    return DataLoader(Pictures(*arrays(run), torchvision_transform()), run.batch, shuffle=True, drop_last=True)


def as_modules(run: Run, student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What a peer takes that knows no transformers: the timm networks, in autocast where requested."""
    if not run.equal:
        return student.timm_model, teacher.timm_model
    return Logits(run, student, logits), Logits(run, teacher, logits)


def sgd(network: nn.Module, watch: Watch) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    watch.attach(optimizer)
    return optimizer


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """What one writes in a loop: the mean over items, in float32 or wider."""
    if student_logits.dtype == torch.bfloat16:
        student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    return F.cross_entropy(student_logits, teacher_logits.softmax(-1))


def bare_loop(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    run.forbid_accumulation("a loop has what one writes")
    student.train()
    teacher.eval().requires_grad_(False)
    optimizer = sgd(student, watch)
    for pixels, _ in loader(run):
        pixels = pixels.to(run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            with torch.no_grad():
                teacher_logits = logits(teacher, pixels)
            student_logits = logits(student, pixels)
        loss = soft_cross_entropy(student_logits, teacher_logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def torchdistill(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """DistillationBox in the loop of its image classification example, KDLoss with the values of its CIFAR-10 runs."""
    student, teacher = as_modules(run, student, teacher)
    dataset = Pictures(*arrays(run), torchvision_transform())
    train_with_a_box(run, student, teacher, watch, dataset, loader(run) if run.equal else None)


def train_with_a_box(
    run: Run, student: nn.Module, teacher: nn.Module, watch: Watch, dataset: Dataset, batches: Any = None
) -> None:
    """`batches` of (inputs, targets) take the place of the loader that the box makes of `dataset`."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.core.interfaces import forward_proc  # noqa: F401  registers what the configuration names
    from torchdistill.losses import high_level, mid_level, util  # noqa: F401  likewise
    from torchdistill.misc.log import MetricLogger

    modules = {f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in _OUTPUT.items()}
    values = {"temperature": 1.0, "alpha": 0.0} if run.plain else {"temperature": 4.0, "alpha": 0.9}
    term = {"criterion": {"key": "KDLoss", "kwargs": {**modules, **values, "reduction": "batchmean"}}, "weight": 1.0}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": run.batch, "drop_last": True},
        },
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"requires_grad": True, "forward_proc": "forward_batch_only"},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
            "grad_accum_step": run.accumulate,
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}},
    }
    box = get_distillation_box(teacher, student, {"train": dataset}, config, run.device, None, False, 1)
    watch.attach(box.optimizer)
    if batches is not None:
        box.train_data_loader = _Supplemented(batches)
    meters = MetricLogger(delimiter="  ")
    box.pre_epoch_process(epoch=0)
    for inputs, targets, extra in meters.log_every(box.train_data_loader, 100, "Epoch: [0]"):
        loss = box.forward_process(inputs.to(run.device), targets.to(run.device), extra)
        box.post_forward_process(loss=loss)
        meters.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        if not torch.isfinite(loss):
            raise ValueError(f"loss is {loss}")
    box.post_epoch_process()


_OUTPUT = {"path": ".", "io": "output"}


class _Supplemented:
    """Batches with the third part that torchdistill expects."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple]:
        return ((*batch, {}) for batch in self.batches)


def kd_lib(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """VanillaKD. Its BANN has one module for teacher and student, so that nothing is distilled there.

    KD_Lib 0.0.32 does not import beside today's libraries: its text half wants torchtext.legacy and AdamW of
    transformers. Only the vision half is imported, with stand-ins for that half, for matplotlib and for tensorboard,
    which are not called.
    """
    run.forbid_accumulation("it has none")
    with stand_ins(
        matplotlib={},
        matplotlib__pyplot={},
        torch__utils__tensorboard={"SummaryWriter": None},
        KD_Lib__KD__text={"BERT2LSTM": None, "get_essentials": None},
    ):
        from KD_Lib.KD import VanillaKD

    student, teacher = as_modules(run, student, teacher)
    pixels, labels = arrays(run)
    few = DataLoader(Pictures(pixels[: run.batch], labels[: run.batch], torchvision_transform()), run.batch)
    values = {"temp": 1.0, "distil_weight": 1.0} if run.plain else {}
    distiller = VanillaKD(
        teacher, student, loader(run), few, None, sgd(student, watch), device=run.device.type, **values
    )
    distiller.train_student(epochs=1, plot_losses=False, save_model=False)


def textbrewer(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """GeneralDistiller, the one it recommends, with its defaults: temperature 4 and no hard labels."""
    student, teacher = as_modules(run, student, teacher)
    train_with_textbrewer(run, student, teacher, sgd(student, watch), loader(run))


def train_with_textbrewer(
    run: Run, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader
) -> None:
    with stand_ins(torch__utils__tensorboard={"SummaryWriter": None}):  # log_dir=None, its default, calls none
        from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    distiller = GeneralDistiller(
        TrainingConfig(device=run.device, gradient_accumulation_steps=run.accumulate),
        DistillationConfig(temperature=1) if run.plain else DistillationConfig(),
        teacher,
        student,
        lambda batch, outputs: {"logits": outputs},
        lambda batch, outputs: {"logits": outputs},
    )
    with distiller:
        distiller.train(optimizer, batches, num_epochs=1, batch_postprocessor=lambda batch: {"x": batch[0]})


def timm_task(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """LogitDistillationTask in a loop such as timm's train.py, which has autocast around the task, with its loader."""
    from timm.data import create_loader
    from timm.task import LogitDistillationTask

    run.forbid_accumulation("of train.py, not of the task")
    values = {"task_loss_weight": 0.0, "distill_loss_weight": 1.0} if run.plain else {}
    task = LogitDistillationTask(
        student.timm_model, teacher.timm_model, nn.CrossEntropyLoss(), device=run.device, verbose=False, **values
    )
    if run.equal:
        batches = loader(run)
    else:
        batches = create_loader(
            Pictures(*arrays(run), None),
            (3, 32, 32),
            run.batch,
            is_training=True,
            mean=STATISTICS[0],
            std=STATISTICS[1],
            device=run.device,
        )
    optimizer = sgd(student, watch)
    task.train()
    for pixels, labels in batches:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            output = task(pixels.to(run.device), labels.to(run.device))
        output["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


class DocumentedTrainer(Trainer):
    """The pattern of the documentation of transformers, "Knowledge Distillation for Computer Vision".

    compute_loss takes num_items_in_batch, which today's Trainer passes and the documented signature lacks. At equal
    precision the teacher is called in autocast too, which the pattern does not do.
    """

    def __init__(self, *args: Any, teacher: nn.Module, temperature: float, weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.divergence = nn.KLDivLoss(reduction="batchmean")
        self.temperature, self.weight = temperature, weight
        self.teacher_in_autocast = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad(), torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.teacher_in_autocast):
            answer = self.teacher(**inputs)
        soft = F.softmax(self.rows(answer.logits).to(outputs.logits.dtype) / self.temperature, dim=-1)
        guess = F.log_softmax(self.rows(outputs.logits) / self.temperature, dim=-1)
        distilled = self.divergence(guess, soft) * self.temperature**2
        loss = (1.0 - self.weight) * outputs.loss + self.weight * distilled
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def rows(logits: Tensor) -> Tensor:
        """(items, classes)."""
        return logits


def trainer_settings(run: Run) -> dict[str, Any]:
    """What every Trainer here is told: what is trained, and silence."""
    return {
        "output_dir": "out",
        "max_steps": run.all_steps,
        "per_device_train_batch_size": run.batch,
        "gradient_accumulation_steps": run.accumulate,
        "optim": "sgd",
        "learning_rate": 0.01,
        "use_cpu": run.device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **({"max_grad_norm": 0.0} if run.plain else {}),
    }


def documented(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    transform = torchvision_transform()

    def transform_rows(rows: dict[str, list]) -> dict[str, list]:
        return {
            "pixel_values": [transform(image.convert("RGB")) for image in rows["img"]],
            "labels": rows["label"],
        }

    if run.equal:
        data, collator = ready(run), collate_batch
    else:
        data = datasets.load_from_disk(run.folder / "hub").select(range(run.items)).with_transform(transform_rows)
        collator = DefaultDataCollator()
    trainer = DocumentedTrainer(
        student,
        TrainingArguments(
            **trainer_settings(run),
            optim_args="momentum=0.9,nesterov=True",
            bf16=run.bf16,
            fp16=not run.plain and torch.cuda.is_available(),  # as documented; a CPU has none
        ),
        teacher=teacher,
        temperature=1.0 if run.plain else 5.0,
        weight=1.0 if run.plain else 0.5,
        train_dataset=data,
        data_collator=collator,
        callbacks=[Attach(watch)],
    )
    trainer.teacher_in_autocast = run.bf16
    trainer.train()


def born_again(run: Run, student: nn.Module, teacher: nn.Module, watch: Watch) -> None:
    """BornAgainTrainer as examples/run_cifar.py sets it up."""
    keep_freed_memory()
    BornAgainTrainer(
        student,
        BornAgainTrainingArguments(
            **{**trainer_settings(run), "max_grad_norm": 0.0},
            optim_args="momentum=0.9,nesterov=True",
            bf16=has_fast_bf16() and not run.checked,
            channels_last=True,
            logging_steps=50,
        ),
        teacher=teacher,
        train_dataset=ready(run),
        data_collator=collate_batch,
        callbacks=[EpochCallback(), Attach(watch)],
    ).train()


VARIANTS = {
    "bare loop": bare_loop,
    "torchdistill": torchdistill,
    "KD_Lib": kd_lib,
    "TextBrewer": textbrewer,
    "timm": timm_task,
    "HF docs pattern": documented,
    "born_again": born_again,
}
