"""Random crops and flips as numbered views: the view of a sample is a pure function of (seed, epoch, sample).

The augmentation is the usual one of CIFAR (He et al. 2016, section 4.2; Huang et al. 2017, section 4.1): pad by 4
pixels, crop a window of the image's own size, mirror half of the time. Padding is by reflection, so that a border
looks like the image. There are (2 * padding + 1) ** 2 windows and 2 orientations: 162 views at padding 4. Since a view
has a number, results for (sample, view), such as teacher logits, can be cached.
"""

from functools import lru_cache

import numpy as np
import torch

PADDING = 4
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def usual_padding(image_size: int) -> int:
    """The padding in pixels for an image size: an eighth of it, as the usual 4 for 32, and at least 1."""
    return max(1, image_size // 8)


def count_views(flip: bool, padding: int = PADDING) -> int:
    """The number of views of a sample: (2 * padding + 1) ** 2 windows, twice that with mirroring."""
    return (2 * padding + 1) ** 2 * (2 if flip else 1)


def identity_view(padding: int = PADDING) -> int:
    """The number of the view that is the image itself: the middle window, not mirrored."""
    return padding * (2 * padding + 1) + padding


IDENTITY_VIEW = identity_view()  # at the usual padding of 32x32 images


def scramble(words: np.ndarray) -> np.ndarray:
    """Hash each 64-bit word: the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        words: uint64 of any shape.

    Returns:
        uint64 of the same shape; a bijection, so different words never collide.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def draw_views(seed: int, epoch: int, samples: torch.Tensor, flip: bool, padding: int = PADDING) -> torch.Tensor:
    """Draw the view of each sample, uniformly, as a function of (seed, epoch, sample) only.

    No generator is advanced, so the view of a sample in an epoch does not depend on the order of the samples, the
    batch size, or the number of workers or processes. With side = 2 * padding + 1, the number of a view is
    `mirrored * side ** 2 + row * side + column`, where (row, column) is the window's corner in the padded image;
    without `flip` the numbers end at side ** 2 - 1.

    Args:
        seed: the run's seed, any integer (taken modulo 2 ** 64).
        epoch: the epoch, counted from 0.
        samples: sample indices (B,) int64 on any device, all >= 0.
        flip: whether mirrored views are drawn.
        padding: pixels of padding on each side, >= 0.

    Returns:
        View numbers (B,) int64 on the CPU.

    Raises:
        ValueError: if `epoch` or `padding` is negative.
    """
    if epoch < 0:
        raise ValueError(f"epoch is {epoch}; expected 0 or more: count epochs from 0")
    if padding < 0:
        raise ValueError(f"padding is {padding}; expected 0 pixels or more")
    # One-element arrays, not scalars: numpy wraps arrays around silently and warns about scalars.
    key = scramble(np.array([seed & _WORD], dtype=np.uint64) + np.uint64(_GOLDEN))
    key = scramble(key + np.array([epoch & _WORD], dtype=np.uint64))
    counters = samples.cpu().numpy().astype(np.uint64) + np.uint64(1)
    words = scramble(key + counters * np.uint64(_GOLDEN))
    # The high half times the number of views, shifted down: uniform to one part in 2 ** 32 / 162.
    views = ((words >> np.uint64(32)) * np.uint64(count_views(flip, padding))) >> np.uint64(32)
    return torch.from_numpy(views.astype(np.int64))


def render_views(
    pixels: torch.Tensor,
    samples: torch.Tensor,
    views: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    padding: int = PADDING,
) -> torch.Tensor:
    """Crop, mirror and normalise the given view of each sample, the whole batch at once.

    Whole rows are gathered, then columns within the rows by a table for each (column, mirrored): reflection and
    mirroring only change the indices, so the padded image is never built.

    Args:
        pixels: the split (N, H, W, 3) uint8, contiguous, on any device.
        samples: indices into `pixels` (B,) int64, on any device.
        views: view numbers (B,) int64, on any device, as from `draw_views`.
        mean: mean of each channel, on the scale where 255 is 1.
        std: standard deviation of each channel, same scale.
        padding: of the views, as in `draw_views`.

    Returns:
        (B, 3, H, W) float32 in channels_last memory format on the device of `pixels`: (pixel / 255 - mean) / std.

    Raises:
        ValueError: if `pixels` is not (N, H, W, 3) uint8, or smaller than reflection by `padding` needs.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels is {tuple(pixels.shape)} {pixels.dtype}; expected (N, H, W, 3) torch.uint8")
    _, height, width, _ = pixels.shape
    if padding >= min(height, width):
        raise ValueError(
            f"padding is {padding} for images of {height}x{width}; reflection needs it below the smaller side: use a "
            "smaller padding or larger images"
        )
    device = pixels.device
    samples = samples.to(device)
    views = views.to(device)
    side = 2 * padding + 1
    row_table, column_table = _index_tables(height, width, padding, device)
    scale, shift = _normalisation(tuple(mean), tuple(std), width, device)
    mirrored = views // side**2
    corner_row = (views // side) % side
    corner_column = views % side

    rows = row_table.index_select(0, corner_row) + (samples * height).unsqueeze(1)  # (B, H)
    lines = pixels.reshape(-1, width * 3).index_select(0, rows.reshape(-1))  # (B * H, 3 W)
    lines = lines.view(-1, height, width * 3)  # (B, H, 3 W)
    columns = column_table.index_select(0, mirrored * side + corner_column)  # (B, 3 W)
    crops = lines.gather(2, columns.unsqueeze(1).expand(-1, height, -1))  # (B, H, 3 W)
    # Scale and shift have the length of a line, not 3: broadcasting over 3 elements is not vectorised.
    # In place: a second batch-sized buffer would be allocated from the system and page-faulted at each batch.
    normalised = crops.to(torch.float32).mul_(scale).add_(shift)
    return normalised.view(-1, height, width, 3).permute(0, 3, 1, 2)  # (B, 3, H, W), strides of channels_last


def _reflected(size: int, padding: int) -> torch.Tensor:
    """Source index of each pixel of each window along one side: (2 * padding + 1, size) int64."""
    positions = torch.arange(size) + torch.arange(-padding, padding + 1).unsqueeze(1)  # (side, size)
    positions = positions.abs()
    return (size - 1) - ((size - 1) - positions).abs()


@lru_cache(maxsize=16)
def _index_tables(height: int, width: int, padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row table (side, H) and byte-column table (2 * side, 3 W), the mirrored half second, both int64."""
    rows = _reflected(height, padding)  # (side, H)
    columns = _reflected(width, padding)  # (side, W)
    columns = torch.cat([columns, columns.flip(1)])  # (2 side, W)
    bytes_ = (columns.unsqueeze(2) * 3 + torch.arange(3)).flatten(1)  # (2 side, 3 W)
    return rows.to(device), bytes_.to(device)


@lru_cache(maxsize=16)
def _normalisation(
    mean: tuple[float, float, float], std: tuple[float, float, float], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (3 W,) float32 with pixel * scale + shift = (pixel / 255 - mean) / std."""
    mean64 = torch.tensor(mean, dtype=torch.float64)
    std64 = torch.tensor(std, dtype=torch.float64)
    scale = (1 / (255 * std64)).to(torch.float32).repeat(width)  # (3 W,)
    shift = (-mean64 / std64).to(torch.float32).repeat(width)  # (3 W,)
    return scale.to(device), shift.to(device)
