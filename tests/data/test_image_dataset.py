"""The torch Dataset: the same views for any workers, processes and resumes, different ones in every epoch."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, TrainingArguments

from born_again.data.augment import IDENTITY_VIEW, draw_views, render_views
from born_again.data.image_dataset import EpochCallback, ImageDataset, collate_batch
from born_again.data.images import ImageSplit

SAMPLES = 24
SEED = 5
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make_split() -> ImageSplit:
    """Random images; the label of each is its own number, so that a batch tells which samples it holds."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SAMPLES, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return ImageSplit(pixels, torch.arange(SAMPLES))


def make_dataset(augment: bool = True) -> ImageDataset:
    return ImageDataset(make_split(), MEAN, STD, augment=augment, flip=True, seed=SEED)


def expected_pixels(samples: torch.Tensor, epoch: int) -> torch.Tensor:
    return render_views(make_split().pixels, samples, draw_views(SEED, epoch, samples, True), MEAN, STD)


def assert_epoch(batches: list[dict[str, torch.Tensor]], epoch: int, samples: int = SAMPLES) -> None:
    """Every sample once, each in its view of `epoch`."""
    labels = torch.cat([batch["labels"] for batch in batches])
    pixel_values = torch.cat([batch["pixel_values"] for batch in batches])
    assert len(set(labels.tolist())) == len(labels) == samples
    assert torch.equal(pixel_values, expected_pixels(labels, epoch))


def test_sample_and_batch_agree():
    dataset = make_dataset()
    dataset.set_epoch(3)
    batch = dataset.__getitems__([7, 2, 7])
    assert batch.keys() == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels"].tolist() == [7, 2, 7]
    sample = dataset[2]
    assert sample["pixel_values"].shape == (3, 8, 8)
    assert sample["labels"].shape == () and sample["labels"].dtype == torch.int64
    assert torch.equal(sample["pixel_values"], batch["pixel_values"][1])
    assert torch.equal(dataset[-1]["pixel_values"], dataset[SAMPLES - 1]["pixel_values"])
    with pytest.raises(IndexError, match="index is 24; expected less than the 24 samples"):
        dataset[SAMPLES]


def test_views_are_named():
    dataset = make_dataset()
    dataset.set_epoch(2)
    samples = torch.tensor([4, 9])
    assert torch.equal(dataset.views(samples), draw_views(SEED, 2, samples, True))
    assert make_dataset(augment=False).views(samples).tolist() == [IDENTITY_VIEW, IDENTITY_VIEW]


def test_without_augmentation_every_epoch_is_the_image_itself():
    dataset = make_dataset(augment=False)
    before = dataset.__getitems__(range(SAMPLES))["pixel_values"]
    dataset.set_epoch(1)
    assert torch.equal(before, dataset.__getitems__(range(SAMPLES))["pixel_values"])
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    plain = (make_split().pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(before, plain, atol=2e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_sees_every_epoch_with_any_workers(workers):
    dataset = make_dataset()
    loader = DataLoader(
        dataset,
        batch_size=7,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate_batch,
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [7, 7, 7, 3]
        assert_epoch(batches, epoch)
    del loader


@pytest.mark.slow
def test_spawned_workers_follow_the_epoch_too():
    dataset = make_dataset()
    loader = DataLoader(
        dataset,
        batch_size=12,
        num_workers=1,
        persistent_workers=True,
        collate_fn=collate_batch,
        multiprocessing_context="spawn",
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert_epoch(list(loader), epoch)
    del loader


def begin_epoch(loader: DataLoader, epoch: float) -> None:
    """What Trainer does at the beginning of an epoch."""
    EpochCallback().on_epoch_begin(None, SimpleNamespace(epoch=epoch), None, train_dataloader=loader)
    loader.set_epoch(int(epoch))


def prepared(process: int, processes: int) -> DataLoader:
    dataset = make_dataset()
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=collate_batch)
    return prepare_data_loader(
        loader,
        num_processes=processes,
        process_index=process,
        use_seedable_sampler=True,
        data_seed=1,
        put_on_device=False,
    )


def test_processes_together_see_the_views_of_one():
    loaders = [prepared(process, 2) for process in range(2)]
    for epoch in range(2):
        batches = []
        for loader in loaders:
            begin_epoch(loader, epoch)
            batches += list(loader)
        assert_epoch(batches, epoch)


def test_epoch_resumed_half_way_keeps_its_views():
    loader = skip_first_batches(prepared(0, 1), 4)
    begin_epoch(loader, 1 + 4 / 6)
    assert_epoch(list(loader), 1, samples=8)


def test_collate_stacks_samples_and_passes_batches():
    dataset = make_dataset()
    batch = dataset.__getitems__([1, 5])
    assert collate_batch(batch) is batch
    stacked = collate_batch([dataset[1], dataset[5]])
    assert torch.equal(stacked["pixel_values"], batch["pixel_values"])
    assert stacked["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(stacked["labels"], batch["labels"])
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        collate_batch(["pixel_values", "labels"])
    with pytest.raises(ValueError, match="expected a whole batch or a list of samples"):
        collate_batch([])


def test_refusals():
    split = ImageSplit(make_split().pixels, torch.arange(3))
    with pytest.raises(ValueError, match="24 images and 3 labels; expected as many"):
        ImageDataset(split, MEAN, STD, augment=True, flip=True, seed=0)
    with pytest.raises(ValueError, match="std is .*; expected three numbers above 0"):
        ImageDataset(make_split(), MEAN, (0.2, 0.0, 0.2), augment=True, flip=True, seed=0)
    with pytest.raises(ValueError, match="epoch is -1; expected 0 or more"):
        make_dataset().set_epoch(-1)


class RecordingModel(nn.Module):
    """A linear classifier that keeps the batches it was trained on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, SAMPLES)
        self.seen = []

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.seen.append({"pixel_values": pixel_values.clone(), "labels": labels.clone()})
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_trainer(folder, **settings) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=SEED,
        **{"remove_unused_columns": False, "save_strategy": "no", **settings},
    )
    return Trainer(
        RecordingModel(),
        arguments,
        data_collator=collate_batch,
        train_dataset=make_dataset(),
        callbacks=[EpochCallback()],
    )


def test_trainer_trains_on_the_views_of_each_epoch(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    seen = trainer.model.seen
    assert len(seen) == 6
    assert_epoch(seen[:3], 0)
    assert_epoch(seen[3:], 1)
    assert seen[0]["labels"].tolist() != seen[3]["labels"].tolist()


def test_trainer_resumed_within_an_epoch_sees_the_same_batches(tmp_path):
    whole = make_trainer(tmp_path, save_strategy="steps", save_steps=4, save_only_model=False)
    whole.train()
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(resumed.model.seen) == 2
    for ours, theirs in zip(resumed.model.seen, whole.model.seen[4:], strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_trainer_that_filters_columns_is_told_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make_trainer(tmp_path, remove_unused_columns=True).train()
