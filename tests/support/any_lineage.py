"""Lineages of tiny networks of transformers by `Lineage`."""

import datasets
import numpy as np
import torch
from helpers import arguments, sentences, sequence_classifier

from born_again import Lineage

STEPS = 4


def classifier():
    """A tiny BERT whose weights the seed decides, with dropout."""
    model = sequence_classifier(torch.initial_seed()).float()
    model.dropout.p = 0.2
    return model


def rows(kind="sequence"):
    return datasets.Dataset.from_list(
        [{name: value.tolist() for name, value in row.items()} for row in sentences(kind)]
    )


def lineage(folder, model_init=classifier, *, data=None, changes=(), **options):
    data = rows() if data is None else data
    args = arguments(
        folder,
        **{"max_steps": STEPS, "objective": "ban+l", "save_strategy": "steps", "save_steps": 2, **dict(changes)},
    )
    given = {
        "generations": 2,
        "train_dataset": data,
        "eval_dataset": data,
        "save_minutes": None,
        "report": False,
        **options,
    }
    return Lineage(model_init, args, **given)


def pixels(size=8, count=12):
    generator = np.random.default_rng(0)
    images = generator.random((count, 3, size, size), dtype=np.float32)
    features = datasets.Features(
        {
            "pixel_values": datasets.Array3D((3, size, size), "float32"),
            "labels": datasets.ClassLabel(names=["cat", "dog", "owl"]),
        }
    )
    labels = [index % 3 for index in range(count)]
    return datasets.Dataset.from_dict({"pixel_values": images, "labels": labels}, features)
