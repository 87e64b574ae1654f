"""Views: drawn uniformly from nothing but their name, rendered as a slow twin would."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from born_again.data.augment import IDENTITY_VIEW, count_views, draw_views, identity_view, render_views, scramble

MEAN = (0.4914, 0.482158, 0.446531)
STD = (0.24703, 0.243485, 0.261587)
PINNED = [142, 74, 142, 103, 59, 24, 57, 51]


def some_pixels(count: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def slow_view(image: torch.Tensor, view: int, padding: int = 4) -> torch.Tensor:
    """One image (H, W, 3) uint8 -> (3, H, W) float64, the textbook way."""
    side = 2 * padding + 1
    mirrored, corner = divmod(view, side**2)
    row, column = divmod(corner, side)
    height, width, _ = image.shape
    planes = image.permute(2, 0, 1).to(torch.float64)  # (3, H, W)
    padded = F.pad(planes.unsqueeze(0), (padding,) * 4, mode="reflect")[0]
    crop = padded[:, row : row + height, column : column + width]
    if mirrored:
        crop = crop.flip(2)
    mean = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    return (crop / 255 - mean) / std


def slow_scramble(word: int) -> int:
    mask = 2**64 - 1
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def slow_draw(seed: int, epoch: int, sample: int, views: int) -> int:
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    key = slow_scramble(((seed & mask) + golden) & mask)
    key = slow_scramble((key + epoch) & mask)
    word = slow_scramble((key + (sample + 1) * golden) & mask)
    return ((word >> 32) * views) >> 32


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (9, 13, 4), (8, 8, 2)])
def test_every_view_equals_the_slow_twin(height, width, padding):
    pixels = some_pixels(3, height, width)
    views = torch.arange(count_views(True, padding))
    samples = views % 3
    rendered = render_views(pixels, samples, views, MEAN, STD, padding)
    pairs = zip(samples.tolist(), views.tolist(), strict=True)
    expected = torch.stack([slow_view(pixels[sample], view, padding) for sample, view in pairs])
    assert rendered.dtype == torch.float32
    assert rendered.shape == (len(views), 3, height, width)
    torch.testing.assert_close(rendered.double(), expected, atol=2e-6, rtol=0)


def test_batch_is_channels_last_and_independent_of_its_company():
    pixels = some_pixels(40)
    samples = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    views = draw_views(3, 1, samples, flip=True)
    batch = render_views(pixels, samples, views, MEAN, STD)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for position in (0, 17, 39):
        alone = render_views(pixels, samples[position : position + 1], views[position : position + 1], MEAN, STD)
        assert torch.equal(alone[0], batch[position])


def test_identity_view_is_plain_normalisation():
    pixels = some_pixels(5)
    samples = torch.arange(5)
    rendered = render_views(pixels, samples, torch.full((5,), IDENTITY_VIEW), MEAN, STD)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(rendered, (pixels.permute(0, 3, 1, 2) / 255 - mean) / std, atol=2e-6, rtol=0)
    assert IDENTITY_VIEW == identity_view(4) == 40


def test_views_differ_from_each_other():
    pixels = some_pixels(1)
    rendered = render_views(pixels, torch.zeros(162, dtype=torch.int64), torch.arange(162), MEAN, STD)
    assert len({image.numpy().tobytes() for image in rendered}) == 162


def test_draw_equals_plain_python_and_is_pinned():
    samples = torch.tensor([0, 1, 2, 49_999, 2**40])
    for seed, epoch, flip in [(0, 0, True), (42, 7, True), (-1, 3, False), (2**70 + 5, 299, False)]:
        expected = [slow_draw(seed, epoch, sample, 162 if flip else 81) for sample in samples.tolist()]
        drawn = draw_views(seed, epoch, samples, flip)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == expected
    # Cached teacher outputs are kept under these names: they may never change.
    assert draw_views(42, 7, torch.arange(8), True).tolist() == PINNED


def test_scramble_is_the_published_function():
    # The first outputs of SplitMix64 from state 0, whose state grows by the golden gamma.
    states = np.array([0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], dtype=np.uint64)
    assert [hex(word) for word in scramble(states).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@pytest.mark.parametrize("flip", [True, False])
def test_draw_is_uniform_over_views(flip):
    views = count_views(flip)
    samples = torch.arange(200 * views)
    for epoch in range(3):
        counts = torch.bincount(draw_views(11, epoch, samples, flip), minlength=views)
        assert len(counts) == views
        chi_square = float(((counts - 200.0) ** 2 / 200).sum())
        # Mean of views - 1, standard deviation of sqrt(2 (views - 1)): five of them on either side.
        assert abs(chi_square - (views - 1)) < 5 * (2 * (views - 1)) ** 0.5


@pytest.mark.parametrize(("one", "other"), [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0)), ((5, 2), (5, 3))])
def test_epochs_and_seeds_are_unrelated(one, other):
    samples = torch.arange(16_200)
    first, second = draw_views(*one, samples, True), draw_views(*other, samples, True)
    # 100 agreements expected of unrelated draws.
    assert 50 < int((first == second).sum()) < 150
    shifted = int((first[1:] == second[:-1]).sum())
    assert 50 < shifted < 150


def test_draw_depends_on_the_sample_alone():
    samples = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_views(1, 2, samples, True), draw_views(1, 2, torch.arange(1000), True)[samples])


def test_refusals():
    samples = torch.arange(2)
    with pytest.raises(ValueError, match="epoch is -1; expected 0 or more"):
        draw_views(0, -1, samples, True)
    with pytest.raises(ValueError, match="padding is -2; expected 0"):
        draw_views(0, 0, samples, True, padding=-2)
    with pytest.raises(ValueError, match=r"pixels is \(2, 3, 8, 8\) torch.uint8; expected \(N, H, W, 3\)"):
        render_views(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), samples, samples, MEAN, STD)
    with pytest.raises(ValueError, match="torch.float32; expected"):
        render_views(torch.zeros(2, 8, 8, 3), samples, samples, MEAN, STD)
    with pytest.raises(ValueError, match="padding is 8 for images of 8x8; .* smaller padding"):
        render_views(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), samples, samples, MEAN, STD, padding=8)


@pytest.mark.gpu
def test_pixels_on_the_device_give_the_same_batch():
    pixels = some_pixels(40)
    samples = torch.arange(40)
    views = draw_views(0, 0, samples, True)
    rendered = render_views(pixels.cuda(), samples, views, MEAN, STD)
    assert rendered.is_cuda
    torch.testing.assert_close(rendered.cpu(), render_views(pixels, samples, views, MEAN, STD), atol=2e-6, rtol=0)
