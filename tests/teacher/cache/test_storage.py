"""Rows under keys: the same bits again, torn ones noticed, processes beside each other, kill -9, a full disk."""

import copy
import json
import logging
import multiprocessing
import os
import resource
import time

import numpy as np
import pytest
import torch
from helpers import Network
from torch import nn

from born_again.teacher.cache import storage
from born_again.teacher.cache.outputs import HEADER_NAME, CachedOutputs, network_sha256
from born_again.teacher.cache.storage import DiskRows, MemoryRows, RowLayout, checksum

KEYS, ROW = 500, 24
fork = multiprocessing.get_context("fork")  # the children need nothing but numpy and a moment


def row_of(key: int) -> np.ndarray:
    return np.random.default_rng(int(key)).integers(0, 256, ROW, np.uint8)


def rows_of(keys) -> np.ndarray:
    return np.stack([row_of(key) for key in keys])


def on_disk(folder, limit=10**9) -> DiskRows:
    return DiskRows(folder, KEYS, ROW, limit)


def everything(store) -> list[int]:
    """Which keys have a row; every one of them is right."""
    keys = np.arange(KEYS)
    rows, found = store.read(keys)
    assert np.array_equal(rows[found], rows_of(keys[found])) if found.any() else True
    return keys[found].tolist()


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return MemoryRows(KEYS, ROW, 10**9) if request.param == "memory" else on_disk(tmp_path)


def test_rows_are_found_again_in_any_order_and_mixture(store):
    assert everything(store) == []
    store.write(np.array([7, 3, 499]), rows_of([7, 3, 499]))
    store.write(np.array([3, 0, 0, 7]), np.stack([row_of(1), row_of(0), row_of(1), row_of(1)]))  # earlier ones stay
    rows, found = store.read(np.array([499, 5, 0, 3, 3, 7]))
    assert found.tolist() == [True, False, True, True, True, True]
    assert np.array_equal(rows[found], rows_of([499, 0, 3, 3, 7]))
    assert everything(store) == [0, 3, 7, 499] and store.count == 4 and not store.closed


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_store_is_filled_up_to_its_limit_and_read_on(tmp_path, kind):
    size = ROW if kind == "memory" else ROW + 16
    make = MemoryRows if kind == "memory" else lambda *sizes: DiskRows(tmp_path, *sizes)
    store = make(KEYS, ROW, 10 * size + 5)
    for first in range(0, 40, 4):
        store.write(np.arange(first, first + 4), rows_of(range(first, first + 4)))
    assert everything(store) == list(range(10)) and store.closed
    if kind == "disk":
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 10 * size


def test_another_run_goes_on_with_what_is_on_disk(tmp_path):
    first = on_disk(tmp_path)
    first.write(np.arange(5), rows_of(range(5)))
    first.close()
    first.write(np.arange(5, 8), rows_of(range(5, 8)))
    second = on_disk(tmp_path)
    second.write(np.arange(10), rows_of(range(10)))
    assert second.count == 10 and sum(path.stat().st_size for path in tmp_path.glob("*.rows")) == 10 * ROW
    assert everything(second) == everything(on_disk(tmp_path)) == list(range(10))
    assert everything(first) == list(range(8))
    first.refresh()
    assert everything(first) == list(range(10))


def test_a_miss_looks_for_what_others_wrote_once_in_a_while(tmp_path, monkeypatch):
    reader, writer = on_disk(tmp_path), on_disk(tmp_path)
    writer.write(np.arange(5), rows_of(range(5)))
    assert everything(reader) == []
    monkeypatch.setattr(storage, "REFRESH_SECONDS", 0.0)
    assert everything(reader) == list(range(5))


@pytest.mark.parametrize("damage", ["a bit", "cut row", "cut mark", "another key", "zeros"])
def test_what_is_torn_is_missing_and_is_written_anew(tmp_path, damage):
    store = on_disk(tmp_path)
    store.write(np.arange(6), rows_of(range(6)))
    store.close()
    (rows,), (marks,) = tmp_path.glob("*.rows"), tmp_path.glob("*.marks")
    content, whole = bytearray(rows.read_bytes()), bytearray(marks.read_bytes())
    if damage == "a bit":
        content[5 * ROW + 3] ^= 1
    elif damage == "cut row":
        del content[-1]
    elif damage == "cut mark":
        del whole[-1]
    elif damage == "another key":
        whole[5 * 16] = 77
    else:
        content[5 * ROW :] = bytes(ROW)
    rows.write_bytes(content)
    marks.write_bytes(whole)
    again = on_disk(tmp_path)
    assert everything(again) == [0, 1, 2, 3, 4]
    again.write(np.array([5]), rows_of([5]))
    assert everything(again) == list(range(6))


def test_the_checksum_covers_key_and_row():
    assert len({checksum(key, row) for key in (0, 1, 256) for row in (row_of(1), row_of(2))}) == 6


def write_forever(folder, seed):
    store, random = on_disk(folder), np.random.default_rng(seed)
    while True:
        keys = random.permutation(KEYS)[:7]
        store.write(keys, rows_of(keys))
        store._place[:] = -1  # so that there is always something to write


def test_kill_9_leaves_whole_rows_or_none(tmp_path):
    for seed in range(8):
        child = fork.Process(target=write_forever, args=(tmp_path, seed))
        child.start()
        before = time.monotonic()
        while len(list(tmp_path.glob("*.marks"))) <= seed and time.monotonic() - before < 10:
            time.sleep(0.001)
        time.sleep(0.005 * (seed + 1))
        child.kill()
        child.join()
        assert everything(on_disk(tmp_path)), "the child wrote nothing"
    assert len(list(tmp_path.glob("*.marks"))) == 8


def write_all(folder, order, both_are_there):
    store = on_disk(folder)
    both_are_there.wait()
    for keys in np.array_split(np.arange(KEYS)[::order], 100):
        store.write(keys, rows_of(keys))
    os._exit(0)


def test_two_processes_that_write_at_once_do_not_disturb_each_other(tmp_path):
    barrier = fork.Barrier(2)
    children = [fork.Process(target=write_all, args=(tmp_path, order, barrier)) for order in (1, -1)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert everything(on_disk(tmp_path)) == list(range(KEYS))
    assert len(list(tmp_path.glob("*.rows"))) == 2


def fill_under_a_limit(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    store = on_disk(folder)
    for key in range(100):
        store.write(np.array([key]), rows_of([key]))
    (folder / "seen").write_text(json.dumps([store.closed, everything(store), store.count]))
    os._exit(0)


def test_a_full_disk_ends_the_filling_and_frees_its_space(tmp_path, caplog):
    other = on_disk(tmp_path)
    other.write(np.arange(490, 495), rows_of(range(490, 495)))
    child = fork.Process(target=fill_under_a_limit, args=(tmp_path,))
    child.start()
    child.join()
    closed, found, kept = json.loads((tmp_path / "seen").read_text())
    assert closed and found == list(range(490, 495)) and kept == 5
    assert len(list(tmp_path.glob("shard-*"))) == 2  # of the other


def test_rows_of_a_writer_that_gave_up_are_missing_to_those_who_had_seen_them(tmp_path, monkeypatch, caplog):
    writer, reader = on_disk(tmp_path), on_disk(tmp_path)
    writer.write(np.arange(5), rows_of(range(5)))
    reader.refresh()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_write_all", full)
    with caplog.at_level(logging.WARNING):
        writer.write(np.array([6]), rows_of([6]))
    assert "cannot be written (No space left on device)" in caplog.text and everything(writer) == []
    reader.refresh()
    assert set(everything(reader)) <= set(range(5))


# ---- Layout, identity, header ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_come_back_with_the_same_bits(dtype):
    parts = [torch.arange(30).reshape(3, 2, 5).to(dtype), torch.arange(12).reshape(4, 3).T.to(torch.float32)]
    if dtype.is_floating_point:
        parts[0][0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    layout = RowLayout.of(parts)
    again = RowLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    rows = layout.pack(parts)
    assert rows.shape == (3, layout.row_bytes)
    for part, other in zip(parts, again.unpack(rows[[2, 0]], torch.device("cpu")), strict=True):
        expected = part[[2, 0]].contiguous()
        assert other.dtype == part.dtype and other.is_contiguous()
        assert torch.equal(other.view(torch.uint8), expected.view(torch.uint8))


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="teacher_cache: the teacher's output for a sample is .* expected the same"):
        RowLayout.of([torch.zeros(2, 3)]).pack([torch.zeros(2, 4)])


def with_buffers() -> nn.Module:
    network = Network(1)
    network.register_buffer("saved", torch.zeros(2))
    network.register_buffer("unsaved", torch.zeros(2), persistent=False)
    return network


def test_a_network_is_known_by_every_parameter_buffer_and_setting():
    expected = network_sha256(with_buffers())
    assert network_sha256(copy.deepcopy(with_buffers())) == expected
    changes = [
        lambda network: network.out.bias.data[0].add_(1e-9),
        lambda network: network.saved.add_(1),
        lambda network: network.unsaved.add_(1),
        lambda network: setattr(network.dropout, "p", 0.5),
        lambda network: network.float(),
    ]
    for change in changes:
        network = with_buffers()
        change(network)
        assert network_sha256(network) != expected


def cached(folder, identity, limit=None) -> CachedOutputs:
    return CachedOutputs(folder, KEYS, limit, 1, lambda: {"teacher": identity})


def test_outputs_of_another_identity_are_never_read(tmp_path):
    first, second = cached(tmp_path, "a"), cached(tmp_path, "b")
    first.write(np.arange(3), [torch.ones(3, 2)], "logits")
    assert not second.read(np.arange(3), torch.device("cpu"))[0].any()
    second.write(np.arange(3), [torch.zeros(3, 5)], "logits")
    for again, expected in ((cached(tmp_path, "a"), torch.ones(3, 2)), (cached(tmp_path, "b"), torch.zeros(3, 5))):
        found, (parts,) = again.read(np.arange(3), torch.device("cpu"))
        assert found.all() and torch.equal(parts, expected)


def test_a_header_that_is_not_what_its_folder_is_called_is_made_anew(tmp_path, caplog):
    cached(tmp_path, "a").write(np.arange(3), [torch.ones(3, 2)], "logits")
    (header,) = tmp_path.glob(f"*/{HEADER_NAME}")
    for text in ("{", json.dumps({"identity": {"teacher": "b"}, "layout": [], "meaning": "logits"})):
        header.write_text(text)
        again = cached(tmp_path, "a")
        assert not again.read(np.arange(3), torch.device("cpu"))[0].any()
        again.write(np.arange(3), [torch.ones(3, 2)], "logits")
        assert cached(tmp_path, "a").read(np.arange(3), torch.device("cpu"))[0].all()


@pytest.mark.parametrize("on", ["memory", "disk"])
def test_a_teacher_that_was_changed_between_two_trainings_is_cached_anew(tmp_path, on):
    known = {"teacher": "a"}
    kept = CachedOutputs(tmp_path if on == "disk" else None, KEYS, None, 1, lambda: dict(known))
    kept.write(np.arange(3), [torch.ones(3, 2)], "logits")
    kept.close()
    assert kept.read(np.arange(3), torch.device("cpu"))[0].all()
    known["teacher"] = "b"
    kept.close()
    assert not kept.read(np.arange(3), torch.device("cpu"))[0].any()


def test_the_size_is_logged_before_anything_is_made(tmp_path, caplog):
    kept = cached(tmp_path, "a", limit=2000 / 2**30)
    with caplog.at_level(logging.INFO):
        kept.write(np.arange(300), [torch.ones(300, 2)], "logits")
    assert "500 outputs of 8 bytes" in caplog.text and "50% of them fit" in caplog.text
    assert "full with 83 outputs" in caplog.text  # 24 bytes each on disk


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="teacher_cache_dir: .*file/inner cannot be made"):
        cached(tmp_path / "file" / "inner", "a")


def test_a_full_disk_at_the_start_is_no_end(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("born_again.teacher.cache.outputs.write_atomically", full)
    kept = cached(tmp_path, "a")
    kept.write(np.arange(3), [torch.ones(3, 2)], "logits")
    kept.write(np.arange(3), [torch.ones(3, 2)], "logits")
    assert not kept.read(np.arange(3), torch.device("cpu"))[0].any()
    assert caplog.text.count("cannot be written (No space left on device)") == 1
