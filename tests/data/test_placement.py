"""A dataset that is kept beside the network; the device is a pretended one, since tests run without a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from born_again.data import placement
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageData, ImageSplit
from born_again.data.placement import fits_on_gpu
from born_again.data.streams import TokenStreams
from born_again.data.text import load_text

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
GPU = torch.device("cuda", 0)


def split(rows=6):
    return ImageSplit(torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8), torch.arange(rows))


@pytest.fixture
def data():
    return ImageData(split(), split(2), ("a", "b"), *STATISTICS, {}, True)


def test_images_go_to_a_gpu_where_they_fit(data, monkeypatch):
    free = 4 * data.nbytes
    assert data.nbytes == 8 * (3072 + 8)
    monkeypatch.setattr(placement.torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    assert fits_on_gpu(data, GPU)
    assert not fits_on_gpu(data, GPU, workers=2)
    assert not fits_on_gpu(data, torch.device("cpu"))
    free -= 1
    assert not fits_on_gpu(data, GPU)


def test_both_splits_move(data):
    moved = data.to("meta")
    assert {part.device.type for each in (moved.train, moved.test) for part in (each.pixels, each.labels)} == {"meta"}
    assert (moved.label_names, moved.mean, moved.flip) == (data.label_names, data.mean, data.flip)


@pytest.mark.parametrize("augment", [True, False])
def test_a_batch_is_made_on_the_device_of_the_pixels(augment):
    """Operations that mix devices fail there, and so would anything that reads a value back from the device."""
    dataset = ImageDataset(split().to("meta"), *STATISTICS, augment=augment, flip=True, seed=1)
    batch = collate_batch(dataset.__getitems__([4, 0, 2]))
    assert {name: part.device.type for name, part in batch.items()} == {"pixel_values": "meta", "labels": "meta"}
    assert batch["pixel_values"].shape == (3, 3, 32, 32) and batch["labels"].shape == (3,)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert dataset.views(torch.tensor([4, 0, 2])).device.type == "cpu"


class Operations(TorchDispatchMode):
    """The names of what torch does inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation._schema.name)
        return operation(*args, **(kwargs or {}))


def test_text_moves_and_its_batches_are_copies_of_slices_on_its_device():
    text = load_text("grammar", max_train_samples=200, max_eval_samples=50)
    assert text.nbytes == 2 * 8 * (200 + 50 + 50)
    moved = text.to("meta")
    assert {tokens.device.type for tokens in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert (moved.fingerprint, moved.tokenizer) == (text.fingerprint, text.tokenizer)
    streams = TokenStreams(moved.train, 4, 10, before=0)
    for rows in (range(4, 8), [6, 7]):  # the second, of one of two processes
        with Operations() as done:
            batch = streams.__getitems__(rows)
        assert set(done.names) == {"aten::slice", "aten::clone"}  # an index would be a transfer
        assert {part.device.type for part in batch.values()} == {"meta"}
        assert batch["labels"].shape == (len(rows), 10) and batch["labels"].is_contiguous()
