"""Members trained with another mean and std than the first are given their own pixel values."""

import pytest
import torch
from helpers import arguments
from lineage_folders import LABELS, lineage, network
from torch.utils.data import DataLoader

from born_again import BornAgainTrainer, LineageEnsemble, load_generation
from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit
from born_again.lineage.evaluation import evaluate_classifier
from born_again.lineage.manifest import LineageError
from born_again.teacher.cache.outputs import network_sha256

THEIRS = [0.2, 0.5, 0.7], [0.11, 0.6, 0.33]
OURS = [0.5] * 3, [0.25] * 3
STATISTICS = [THEIRS, OURS, OURS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    networks = [network("image", seed, statistics=own) for seed, own in enumerate(STATISTICS)]
    return lineage(tmp_path_factory.mktemp("images"), networks)


def images(statistics):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = ImageSplit(pixels, torch.randint(len(LABELS), (16,), generator=generator))
    return ImageDataset(split, *map(tuple, statistics), augment=False, flip=False, seed=0)


def pixels(statistics):
    return next(iter(DataLoader(images(statistics), 16, collate_fn=collate_batch)))["pixel_values"]


def own_mean(folder, indices):
    """From each member's own preprocessing of the images."""
    each = [load_generation(folder / f"gen{index}")(pixels(STATISTICS[index])).logits for index in indices]
    return torch.stack(each).double().softmax(-1).mean(0).detach()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 0], [1, 2]])
def test_the_mean_is_of_what_each_says_of_its_own_pixel_values(folder, indices, sequential):
    ensemble = LineageEnsemble.from_lineage(folder, indices, sequential=sequential)
    wanted, given = own_mean(folder, indices), pixels(STATISTICS[indices[0]])
    for logits in (ensemble(given).logits, ensemble(pixel_values=given).logits):
        torch.testing.assert_close(logits.double().softmax(-1), wanted, rtol=1e-4, atol=1e-5)
    saved = ensemble.config.pretrained_cfg
    assert (saved["mean"], saved["std"]) == tuple(STATISTICS[indices[0]])


def test_it_is_measured_and_teaches_so(folder, tmp_path):
    wanted, labels = own_mean(folder, [0, 1, 2]), images(OURS).labels
    ensemble = LineageEnsemble.from_lineage(folder, "all")
    for statistics in STATISTICS[:2]:
        metrics = evaluate_classifier(ensemble, images(statistics), collate_batch)
        nll = -wanted.log().gather(1, labels[:, None]).mean().item()
        assert metrics["nll"] == pytest.approx(nll, rel=1e-4)
        trainer = BornAgainTrainer(
            network("image", 9, statistics=statistics),
            arguments(tmp_path, remove_unused_columns=False),
            teacher=LineageEnsemble.from_lineage(folder, "all"),
            data_collator=collate_batch,
            train_dataset=images(statistics),
        )
        taught = trainer.teacher({"pixel_values": pixels(statistics)})
        torch.testing.assert_close(taught.double().softmax(-1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_teacher_cache_tells_ensembles_apart(folder, tmp_path, sequential):
    """By members that are not in memory, by what is averaged, and by the statistics of each member."""
    others = [network("image", seed, statistics=OURS) for seed in range(3)]
    others = lineage(tmp_path, others)
    asked = [(folder, "1,2", "probabilities"), (folder, "1,2", "logits"), (folder, "2,1", "logits")]
    asked += [(folder, "1,0", "logits"), (others, "1,0", "logits")]
    hashes = [network_sha256(LineageEnsemble.from_lineage(*each, sequential=sequential)) for each in asked]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == network_sha256(LineageEnsemble.from_lineage(*asked[0], sequential=sequential))


def test_members_of_other_numbers_of_channels_are_refused(folder, tmp_path):
    networks = [network("image", 1), network("image", 2)]
    networks[1].config.pretrained_cfg.update(mean=[0.5] * 4, std=[0.5] * 4)
    with pytest.raises(
        LineageError, match=r"generations 0 and 1 take images of other numbers of channels \(3 channels"
    ):
        LineageEnsemble.from_lineage(lineage(tmp_path, networks), "all")
