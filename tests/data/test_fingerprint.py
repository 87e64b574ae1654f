"""The fingerprint of any dataset: equal for equal rows, in any process, however they are stored."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from born_again.data import fingerprint
from born_again.data.fingerprint import dataset_sha256

UNHASHABLE = torch.Generator()
ROWS = {"ids": [[1, 2], [3], []], "label": [0, 1, 0], "text": ["a", None, "c"]}


def sha(dataset):
    return dataset_sha256("train_dataset", dataset)


def test_equal_rows_have_one_hash_and_other_rows_another(tmp_path):
    data = datasets.Dataset.from_dict(ROWS)
    whole = datasets.Dataset.from_dict({name: values * 2 for name, values in ROWS.items()})
    same = [
        data,
        whole.select([3, 4, 5]),
        whole.select(range(3)),
        datasets.concatenate_datasets([data.select([0]), data.select([1, 2])]),
        data.map(lambda row: row if UNHASHABLE else None),  # whose own fingerprint may be random
    ]
    data.save_to_disk(tmp_path / "saved")
    same.append(datasets.load_from_disk(tmp_path / "saved"))
    transformed = data.with_transform(lambda rows: rows)
    assert {sha(one) for one in [*same, transformed]} == {sha(data)}
    others = [
        data.select([0, 1]),
        data.select([1, 0, 2]),
        data.rename_column("text", "words"),
        data.map(lambda row: {"label": 1 - row["label"]}),
        data.cast_column("label", datasets.ClassLabel(names=["x", "y"])),
    ]
    assert len({sha(one) for one in [data, *others]}) == 1 + len(others)


def test_images_in_files_are_known_by_their_content(tmp_path, monkeypatch):
    def folder(name, last):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (4, 4), (index, 0, last if index == 2 else 0)).save(tmp_path / name / f"{index}.png")
        paths = [str(tmp_path / name / f"{index}.png") for index in range(3)]
        return datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())

    assert sha(folder("one", 0)) == sha(folder("moved", 0)) != sha(folder("other", 9))


def test_of_a_large_dataset_evenly_spaced_rows_are_hashed(monkeypatch):
    monkeypatch.setattr(fingerprint, "MIN_ROWS", 10)
    monkeypatch.setattr(fingerprint, "MAX_BYTES", 1)
    values = np.arange(100)
    data = datasets.Dataset.from_dict({"x": values})
    assert sha(data) != sha(datasets.Dataset.from_dict({"x": np.where(values == 10, 0, values)}))  # one of the ten
    assert sha(data) == sha(datasets.Dataset.from_dict({"x": np.where(values == 11, 0, values)}))  # seen by nobody
    assert sha(data) != sha(datasets.Dataset.from_dict({"x": values[:99]}))


class Rows(torch.utils.data.Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.make(index)


def test_rows_of_another_dataset():
    def row(index):  # with a random augmentation, which is drawn at a fixed seed
        noise = torch.rand(2), np.random.rand(2)
        return {"x": noise, "image": Image.new("L", (2, 2), index), "label": index, "flag": True, "none": None}

    before = torch.get_rng_state()
    assert sha(Rows(row)) == sha(Rows(row)) and torch.get_rng_state().equal(before)
    assert sha(Rows(row)) != sha(Rows(lambda index: {**row(index), "label": 2 - index}))
    assert sha([1, 2]) != sha([12]) and sha(["1"]) != sha([1])


CALLS = iter(range(1000))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (iter([1]), "eval_dataset: got list_iterator, a stream.*give data_fingerprint"),
        (Rows(lambda index: object()), "rows with a object"),
        (Rows(lambda index: next(CALLS)), "whose rows differ from one reading to the next"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(rows, match):
    with pytest.raises(ValueError, match=match):
        dataset_sha256("eval_dataset", rows)
