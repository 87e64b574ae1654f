"""A corpus cut into streams: every token once and in order, by the batch, and what is refused."""

import pytest
import torch
from torch.utils.data import DataLoader

from born_again.data.streams import TokenStreams, collate_windows


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


COMBINATIONS = [(1, 1, 1), (7, 1, 3), (12, 3, 4), (12, 4, 2), (13, 3, 4), (29, 4, 5), (100, 7, 6), (101, 17, 1)]
COMBINATIONS += [(count, streams, 3) for count in (50, 51, 59) for streams in (2, 3, 5)]
BEFORE = 9_999


@pytest.mark.parametrize(("count", "streams", "window"), COMBINATIONS)
def test_every_token_is_predicted_once_in_order(count, streams, window):
    tokens = torch.arange(count)
    data = TokenStreams(tokens, streams, window, before=BEFORE)
    length = -(-count // streams)
    assert (data.streams, data.window, data.length, data.token_count) == (streams, window, length, count)
    assert data.windows == -(-length // window) and len(data) == data.windows * streams
    inputs = torch.cat([tokens.new_tensor([BEFORE]), tokens[:-1]])
    seen = []
    for stream in range(streams):
        items = [data[place * streams + stream] for place in range(data.windows)]
        assert all(len(item["labels"]) == window for item in items[:-1])
        labels = torch.cat([item["labels"] for item in items])
        ids = torch.cat([item["input_ids"] for item in items])
        assert labels.dtype == ids.dtype == torch.int64 and len(labels) == len(ids) == length
        real = labels != -100
        assert real[0] and (ids[~real] == BEFORE).all()
        assert torch.equal(labels[real], tokens[stream * length : (stream + 1) * length])
        assert torch.equal(ids[real], inputs[stream * length : (stream + 1) * length])
        seen.append(labels[real])
    assert torch.equal(torch.cat(seen), tokens)


def test_dataloader_gives_window_after_window_for_any_processes():
    data = TokenStreams(torch.arange(103), 4, 8, before=BEFORE)
    batches = list(DataLoader(data, batch_size=4, collate_fn=collate_windows))
    assert [tuple(batch["labels"].shape) for batch in batches] == [(4, 8)] * 3 + [(4, 2)]
    for place, batch in enumerate(batches):
        items = collate_windows([data[place * 4 + row] for row in range(4)])
        assert batch.keys() == items.keys() == {"input_ids", "labels"}
        for name in batch:
            assert torch.equal(batch[name], items[name]) and batch[name].is_contiguous()
        for rank in range(2):
            rows = [place * 4 + rank * 2, place * 4 + rank * 2 + 1]
            half = data.__getitems__(rows)
            assert torch.equal(half["labels"], batch["labels"][rank * 2 : rank * 2 + 2])
        mixed = data.__getitems__([place * 4 + 3, place * 4, place * 4 + 1])
        assert all(torch.equal(mixed[name], batch[name][[3, 0, 1]]) for name in batch)
    # A stream goes on from batch to batch.
    assert torch.equal(torch.cat([batch["labels"][1] for batch in batches]), torch.arange(26, 52))


def test_batches_are_copies_and_items_count_from_either_end():
    data = TokenStreams(torch.arange(12), 2, 3, before=BEFORE)
    data.__getitems__([0, 1])["labels"].zero_()
    data[0]["labels"].zero_()
    assert data[0]["labels"].tolist() == [0, 1, 2]
    assert data[-1]["labels"].tolist() == data[3]["labels"].tolist() == [9, 10, 11]
    assert data[1]["input_ids"].tolist() == [5, 6, 7]
    with pytest.raises(IndexError, match="index is 4; expected less than the 4 windows of all streams"):
        data[4]


@pytest.mark.parametrize("indices", [[0, 2], [1, 2], [4, 5], [-1, -2]])
def test_batch_of_several_places_is_refused(indices):
    data = TokenStreams(torch.arange(12), 2, 3, before=BEFORE)
    with pytest.raises(
        ValueError, match="indices are of the windows .*; expected one of 2.*batches of 2 rows in order"
    ):
        data.__getitems__(indices)


@pytest.mark.parametrize(
    ("tokens", "streams", "window", "message"),
    [
        (torch.arange(4.0), 1, 1, "tokens is torch.float32 of shape .4,.; expected torch.int64"),
        (torch.zeros(2, 2, dtype=torch.int64), 1, 1, "tokens is torch.int64 of shape .2, 2.; expected torch.int64"),
        (torch.arange(0), 1, 1, "of shape .0,.; expected .*pass a split of load_text"),
        (torch.arange(9), 0, 1, "streams is 0; expected at least 1"),
        (torch.arange(9), 1, 0, "window is 0; expected at least 1"),
        (
            torch.arange(100),
            20,
            35,
            "streams is 20 and window is 35 for .* 100 tokens; .*at most 2 streams .* or a sho",
        ),
        (torch.arange(100), 1, 101, "window is 101 for a corpus of 100 tokens; .*: use a shorter window$"),
        (torch.arange(10), 7, 2, "not padding alone: use at most 5 streams .the batch size.$"),
        (torch.arange(10), 11, 1, "use at most 10 streams .the batch size.$"),
    ],
)
def test_refused_streams(tokens, streams, window, message):
    with pytest.raises(ValueError, match=message):
        TokenStreams(tokens, streams, window, before=0)


def test_refused_word_before():
    with pytest.raises(ValueError, match="before is -1; expected at least 0"):
        TokenStreams(torch.arange(9), 1, 1, before=-1)


def test_collate_refusals():
    data = TokenStreams(torch.arange(10), 1, 4, before=BEFORE)
    batch = data.__getitems__([0])
    assert collate_windows(batch) is batch
    for bad in ([], ["input_ids", "labels"], [data[0], data[2]]):
        with pytest.raises(
            ValueError, match="batch is .*; expected a ready batch or .* one length.*remove_unused_columns"
        ):
            collate_windows(bad)
