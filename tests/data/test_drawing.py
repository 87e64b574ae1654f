"""What a collator or a dataset draws is a function of seed, epoch and rows; one that cannot be seeded is named."""

import logging
import pickle

import pytest
import torch
from transformers import default_data_collator

from born_again.data.drawing import seed_draws

ROWS = [{"x": torch.arange(4.0) + row} for row in range(3)]


def noisy(rows):
    return {"x": torch.stack([row["x"] for row in rows]) + torch.randn(len(rows), 4)}


def noise(collate, rows):
    return collate(rows)["x"] - torch.stack([row["x"] for row in rows])


class Noisy(torch.utils.data.Dataset):
    column_names = ("x",)

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return {"x": ROWS[index]["x"] + torch.randn(4)}


class OwnGenerator:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, rows):
        return {"x": torch.rand(len(rows), generator=self.generator)}


@pytest.mark.parametrize("kind", ["collator", "rows"])
def test_draws_hang_on_seed_epoch_and_rows_alone(kind):
    dataset, collate = seed_draws(Noisy() if kind == "rows" else ROWS, noisy, ROWS[:2])
    if kind == "rows":
        own, others, read = dataset, (0, 1), lambda which, index: which[index]["x"] - ROWS[index]["x"]
        assert len(dataset) == 3 and dataset.column_names == ("x",) and not hasattr(dataset, "__getitems__")
    else:
        assert dataset is ROWS and collate.for_evaluation is noisy
        own, others, read = collate, (ROWS[:2], ROWS[1:]), noise
    own.set_seed(5)
    before = torch.get_rng_state()
    first = read(own, others[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    read(own, others[1])
    copied = pickle.loads(pickle.dumps(own))  # as a worker has it
    assert torch.equal(read(own, others[0]), first) and torch.equal(read(copied, others[0]), first)
    differences = {}
    own.set_epoch(1)
    differences["epoch"] = read(own, others[0])
    own.set_seed(6)
    differences["seed"] = read(own, others[0])
    assert not any(torch.equal(first, other) for other in differences.values())
    own.set_seed(5)
    assert torch.equal(read(own, others[0]), first)  # begins in epoch 0
    assert not torch.allclose(read(own, others[1]), first, atol=0.1)


def test_what_draws_nothing_or_is_told_the_epoch_is_left_as_it_is(caplog):
    class Told(Noisy):
        def set_epoch(self, epoch):
            pass

    told = Told()
    assert seed_draws(told, default_data_collator, ROWS) == (told, default_data_collator)
    assert seed_draws(ROWS, default_data_collator, ROWS) == (ROWS, default_data_collator)
    assert not caplog.records


@pytest.mark.parametrize(
    ("collate", "rows", "reason"),
    [
        (OwnGenerator(), ROWS, "OwnGenerator draws random numbers from a generator of its own"),
        (lambda rows: torch.rand(2), [object()], "draws random numbers for rows that cannot be told apart"),
    ],
)
def test_what_cannot_be_seeded_is_named(caplog, collate, rows, reason):
    with caplog.at_level(logging.WARNING):
        assert seed_draws(ROWS, collate, rows)[1] is collate
    assert f"data_collator: {reason}" in caplog.text.replace("<lambda> ", "")
