"""What images an image network was trained on, and how images prepared otherwise become them.

Pixel values are (pixel / 255 - mean) / std of each channel. Two networks trained with other statistics need other
pixel values of the same image, and one batch can serve both: normalising is affine in each channel, so what one
network gets is an affine function of what the other gets. Crops, mirroring and padding by reflection change no value
of a pixel, so they commute with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from born_again.teacher.inputs import unwrapped

_PIXELS = "pixel_values"
_REVERSED = [2, 1, 0]
# Below what rounding of statistics to six decimals does; processors compute in float32.
_SAME = 2e-6
_PROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessing:
    """What is known of the images that a network, a processor or a dataset stands for.

    Args:
        mean: of each channel of the network's input, on the scale where 255 is 1.
        std: standard deviation likewise.
        source: where this is from, for messages.
        is_bgr: whether the channels are blue, green, red.
        size: height and width in pixels, None where it is not known.
        other_sizes: sizes that are as good, such as that which timm tests with.
        is_certain: False for what a library has by default, whatever the network was trained with.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    is_bgr: bool = False
    size: tuple[int, int] | None = None
    other_sizes: tuple[tuple[int, int], ...] = ()
    is_certain: bool = True

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"mean ({mean}), std ({std}){' in BGR' if self.is_bgr else ''} ({self.source})"


@dataclass(frozen=True)
class Renormalization:
    """Pixel values of one preprocessing as those of another.

    Args:
        scale: of each channel of the result.
        shift: likewise, added after scaling.
        reverses: whether the result has the three channels in the opposite order.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    reverses: bool = False

    @classmethod
    def between(cls, given: Preprocessing, wanted: Preprocessing) -> Renormalization | None:
        """What makes pixel values prepared one way those of the other; None where they are the same.

        Raises:
            ValueError: another number of channels.
        """
        channels = max(len(given.mean), len(wanted.mean))
        mean, std, own_mean, own_std = (
            values * channels if len(values) == 1 else values
            for values in (given.mean, given.std, wanted.mean, wanted.std)
        )
        if not len(mean) == len(std) == len(own_mean) == len(own_std):
            raise ValueError(f"{len(mean)} channels and {len(own_mean)}: {given}, {wanted}")
        reverses = given.is_bgr != wanted.is_bgr
        if reverses:
            mean, std = ([values[channel] for channel in _REVERSED] for values in (mean, std))
        scale = tuple(ours / theirs for ours, theirs in zip(std, own_std, strict=True))
        shift = tuple((ours - own) / by for ours, own, by in zip(mean, own_mean, own_std, strict=True))
        same = all(abs(value - 1) < _SAME for value in scale) and all(abs(value) < _SAME for value in shift)
        return None if same and not reverses else cls(scale, shift, reverses)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Computed in float32 or wider.

        Args:
            pixels: (..., channels, height, width) of any float dtype.

        Returns:
            The same shape, dtype and memory format.

        Raises:
            ValueError: another number of channels.
        """
        if pixels.dim() < 3 or pixels.shape[-3] != len(self.scale):
            raise ValueError(
                f"{_PIXELS}: got shape {tuple(pixels.shape)}, expected {len(self.scale)} channels, since so many have "
                "a mean and std, as (batch, channels, height, width)."
            )
        wide = pixels if pixels.dtype == torch.float64 else pixels.float()
        if self.reverses:
            wide = wide.flip(-3)
        scale, shift = _columns(self, wide.dtype, wide.device)
        return (wide * scale + shift).to(pixels.dtype)


@lru_cache(maxsize=32)
def _columns(change: Renormalization, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, (channels, 1, 1) each: kept, so that nothing is copied to the device at every batch."""
    scale, shift = (torch.tensor(values, dtype=dtype).to(device) for values in (change.scale, change.shift))
    return scale[:, None, None], shift[:, None, None]


def renormalized(inputs: Mapping[str, Any], change: Renormalization | None) -> Mapping[str, Any]:
    """The inputs of a network, with their pixel values changed: `pixel_values`, or the one image batch there is."""
    name = None if change is None else pixels_name(inputs)
    return inputs if name is None else {**inputs, name: change(inputs[name])}


def pixels_name(inputs: Mapping[str, Any]) -> str | None:
    """The name of the pixel values among a network's inputs, None where there are none that are normalised."""
    found = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() == 4]
    name = _PIXELS if _PIXELS in inputs else found[0] if len(found) == 1 else None
    is_normalized = name is not None and isinstance(inputs[name], Tensor) and inputs[name].is_floating_point()
    return name if is_normalized else None


def preprocessing_of_network(network: nn.Module) -> Preprocessing | None:
    """The preprocessing in a network's config, None where there is none.

    A timm network inside transformers says it in `config.pretrained_cfg`; one of timm itself in `pretrained_cfg`,
    which is certain where it was read from a repository or a folder or was set by hand, and is timm's default for
    that architecture otherwise; another network in the preprocessor_config.json of the folder it was loaded from.
    """
    network = unwrapped(network)
    config = getattr(network, "config", None)
    saved = getattr(config, "pretrained_cfg", None)
    if isinstance(saved, Mapping):
        return _of_pretrained_cfg(saved, "pretrained_cfg of its config", True)
    own = getattr(network, "pretrained_cfg", None)
    if isinstance(own, Mapping):
        is_certain = own.get("source") in ("hf-hub", "local-dir") or not _is_default(own)
        source = "its pretrained_cfg" if is_certain else f"timm's default for {own.get('architecture')}"
        return _of_pretrained_cfg(own, source, is_certain)
    folder = str(getattr(config, "_name_or_path", None) or "")
    if folder and os.path.isfile(os.path.join(folder, _PROCESSOR_FILE)):
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError, TypeError):
            return None
        return preprocessing_of_processor(processor, f"{_PROCESSOR_FILE} of {folder}")
    return None


def preprocessing_of_processor(processor: Any, source: str | None = None) -> Preprocessing | None:
    """The normalisation of an image processor, detected by calling it on images of one colour.

    Its attributes would not tell: some processors rescale by an offset, divide by std twice (EfficientNet) or put
    blue first (MobileViT, PP-LCNet).

    Args:
        processor: an image processor of transformers, or a processor that has one; anything else is not known.
        source: where it is from, for messages.
    """
    processor = getattr(processor, "image_processor", processor)
    if _PIXELS not in getattr(processor, "model_input_names", ()):
        return None
    from PIL import Image

    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (51, 51, 51)]
    try:
        outputs = processor(images=[Image.new("RGB", (64, 64), colour) for colour in colours], return_tensors="pt")
        pixels = outputs[_PIXELS].double()  # (4, 3, height, width)
    except Exception:  # what a processor of any library may raise for images it was not made for
        return None
    if pixels.dim() != 4 or pixels.shape[:2] != (4, 3):
        return None
    height, width = pixels.shape[-2:]
    # Not at the border, where some pad.
    inside = pixels[:, :, height // 4 : -(-3 * height // 4), width // 4 : -(-3 * width // 4)]
    if not torch.equal(inside.amin((2, 3)), inside.amax((2, 3))):
        return None
    black, white, red, grey = inside[:, :, 0, 0]  # (3,) each
    span = white - black
    if not (span > 0).all() or not torch.allclose(grey, black + span / 5, atol=1e-4):
        return None
    reddest = int(((red - black) / span).argmax())
    return Preprocessing(
        tuple((-black / span).tolist()),
        tuple((1 / span).tolist()),
        source or type(processor).__name__,
        is_bgr=reddest == 2,
        size=(height, width),
    )


def preprocessing_of_dataset(dataset: Any) -> Preprocessing | None:
    """The preprocessing that a dataset declares, None where it declares none.

    It says it by `mean` and `std`, as born_again.data's ImageDataset does, or by a Normalize of torchvision in its
    `transform`; a Subset by the dataset inside.
    """
    while dataset is not None:
        transform = getattr(dataset, "transform", None)
        for said in (dataset, *reversed(getattr(transform, "transforms", [transform]) or [])):
            mean, std = _numbers(getattr(said, "mean", None)), _numbers(getattr(said, "std", None))
            # On another scale, such as 0 to 255, they would be taken for something that they are not.
            if mean and std and all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std):
                return Preprocessing(mean, std, "the dataset")
        dataset = getattr(dataset, "dataset", None)
    return None


def wrong_config(network: nn.Module, dataset: Any, processor: Any) -> str | None:
    """A warning for a network around timm whose config, saved beside it, tells others to prepare images otherwise
    than its training set does; None where it does not, or where that is not known."""
    saved = getattr(getattr(network, "config", None), "pretrained_cfg", None)
    if not isinstance(saved, Mapping):
        return None
    own = preprocessing_of_network(network)
    given = preprocessing_of_dataset(dataset) or preprocessing_of_processor(processor, "processing_class")
    if own is None or given is None or not _differ(given, own):
        return None
    return (
        f"model: its pixel values have {given}, and its config says {own}: who loads it will prepare images as the "
        "config says. Set 'mean' and 'std' in model.config.pretrained_cfg to those it is trained with."
    )


def check_prepared_as(network: nn.Module, dataset: Any, processor: Any) -> None:
    """Refuses to have a network measured on images prepared otherwise than those it was trained on.

    Args:
        network: as it is loaded.
        dataset: what it would be measured on, or a dict of datasets by split.
        processor: that prepares it, where the dataset says nothing.

    Raises:
        ValueError: they differ.
    """
    own = preprocessing_of_network(network)
    if own is None or not own.is_certain:
        return
    for split in dataset.values() if isinstance(dataset, dict) else [dataset]:
        given = preprocessing_of_dataset(split) or preprocessing_of_processor(processor, "processing_class")
        if given is not None and _differ(given, own):
            raise ValueError(
                f"teacher: its pixel values have {own}, those that the trainer would measure it on {given}; expected "
                "the same. Pass an `evaluate` that prepares images for the network it is handed, such as "
                "born_again.lineage.evaluation.evaluate_classifier."
            )


def _differ(given: Preprocessing, wanted: Preprocessing) -> bool:
    try:
        return Renormalization.between(given, wanted) is not None
    except ValueError:  # another number of channels
        return True


def preprocessing_of_training(dataset: Any, processor: Any, student: nn.Module) -> Preprocessing | None:
    """What pixel values a student is given: as the dataset says, or the processor, or the student's config.

    What a student says that was loaded from somewhere is not certain: the dataset may have been prepared for its
    teacher. The size is that which the student says.
    """
    own = preprocessing_of_network(student)
    known = preprocessing_of_dataset(dataset) or preprocessing_of_processor(processor, "processing_class")
    if known is not None:
        return known if own is None else replace(known, size=own.size)
    # What from_pretrained(None) and a configuration alone leave there.
    is_new = str(getattr(getattr(student, "config", None), "_name_or_path", "")) in ("", "None")
    if own is None or not own.is_certain:
        return None
    return replace(own, source=f"{own.source}, the student", is_certain=is_new)


class TeacherPixels:
    """One teacher's own pixel values, made of its student's.

    Args:
        network: the teacher.
        given: of the pixel values that it is handed, None where that is not known.
        processor: its own image processor, where its user gave one.
        say: is handed what a user must know, once.

    Attributes:
        change: what is done to the pixel values; None leaves them as they are.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        given: Preprocessing | None = None,
        processor: Any = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.change: Renormalization | None = None
        self._say = say
        self._own = preprocessing_of_processor(processor, "teacher_processing_class")
        if self._own is None and network is not None:
            self._own = preprocessing_of_network(network)
        self._sized_as: tuple[int, int] | None = None
        if given is None or self._own is None:
            self._say_what_is_assumed(given)
            return
        if given.size == self._own.size:
            # Made alike, whatever that is: many have timm's default in their config and were trained on another.
            self._sized_as = given.size
        try:
            change = Renormalization.between(given, self._own)
        except ValueError as error:
            raise ValueError(
                f"teacher: takes images of {len(self._own.mean)} channels with {self._own}, and those it would be "
                f"given have {len(given.mean)}, {given}; expected as many, take a teacher trained on such images."
            ) from error
        if change is None:
            return
        which = f"The teacher's pixel values have {self._own}, the student's {given}"
        if not self._own.is_certain:
            say(
                f"{which}. Whether the teacher was trained with the default is not known, so it is given the "
                "student's pixel values. If it was, pass its image processor as teacher_processing_class; if not, set "
                "'mean' and 'std' in its pretrained_cfg to what it was trained with."
            )
        elif not given.is_certain:
            say(
                f"{which}. Which of the two the training set was prepared with is not known, so both are given its "
                "pixel values as they are. Pass the image processor that made them as processing_class: the teacher "
                "is then given its own."
            )
        else:
            self.change = change
            say(f"{which}: the batch is renormalised for the teacher.")

    def _say_what_is_assumed(self, given: Preprocessing | None) -> None:
        if given is not None:
            self._say(
                f"The student's pixel values have {given}; which the teacher was trained on is not known, so it is "
                "given the student's as they are. If it was trained on others, pass its image processor as "
                "teacher_processing_class, or set pretrained_cfg = {'mean': ..., 'std': ...} on it."
            )
        elif self._own is not None and self._own.is_certain:
            self._say(
                f"The teacher's pixel values have {self._own}; which the training set has is not known, so the "
                "teacher is given them as they are. If they are others, pass the image processor that made them as "
                "processing_class, or give the training set attributes 'mean' and 'std': the teacher is then given "
                "its own."
            )

    def __call__(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs with the teacher's own pixel values."""
        if self._own is not None and self._own.size is not None and self._sized_as is None:
            self._look_at_size(inputs)
        return renormalized(inputs, self.change)

    @property
    def facts(self) -> dict[str, Any] | None:
        """What is done, JSON-able; None where nothing is."""
        return None if self.change is None else asdict(self.change)

    @contextmanager
    def naming_sizes(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Around a call of the network: where it fails on images of another size than its own, both are named.

        Raises:
            ValueError: in place of what the network raised.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            size, name = None if self._own is None else self._own.size, pixels_name(inputs)
            if name is None or size is None or tuple(inputs[name].shape[-2:]) == size:
                raise
            raise ValueError(_size_message(name, inputs[name], size, "and does not take them")) from error

    def _look_at_size(self, inputs: Mapping[str, Any]) -> None:
        name = pixels_name(inputs)
        if name is None:
            return
        self._sized_as = tuple(inputs[name].shape[-2:])
        if self._sized_as not in (self._own.size, *self._own.other_sizes):
            self._say(_size_message(name, inputs[name], self._own.size, "which it was not trained on"))


def check_image_shape(network: nn.Module, channels: int, size: tuple[int, int]) -> None:
    """Refuses a network that says it was trained on images of another size or number of channels.

    Args:
        network: an image classifier.
        channels: of the images that it would be given.
        size: their height and width.

    Raises:
        ValueError: with both sizes or numbers.
    """
    own = preprocessing_of_network(network)
    if own is not None and len(own.mean) != channels:
        raise ValueError(
            f"teacher: takes images of {len(own.mean)} channels, its config has {own}, and those of the data have "
            f"{channels}; expected as many, take a teacher trained on such images."
        )
    if own is not None and own.is_certain and own.size is not None and size not in (own.size, *own.other_sizes):
        raise ValueError(
            f"teacher: was trained on images of {own.size[0]}x{own.size[1]} pixels ({own.source}), and those of the "
            f"data are {size[0]}x{size[1]}; expected one size: give --image_size {own.size[0]}, take another teacher, "
            "or correct input_size in its config.json if that is not what it was trained on."
        )


def _size_message(name: str, pixels: Tensor, size: tuple[int, int], and_so: str) -> str:
    height, width = pixels.shape[-2:]
    return (
        f"teacher: was trained on images of {size[0]}x{size[1]} pixels and is given {name} of {height}x{width}, "
        f"{and_so}; expected one size: prepare the images at {size[0]}x{size[1]}, or take a teacher trained at "
        f"{height}x{width}."
    )


def read_otherwise(saved: Mapping[str, Any], *interpolations: str) -> str | None:
    """How a network's pretrained_cfg has images of any size read, where not as `load_images` reads them.

    Args:
        saved: the pretrained_cfg.
        interpolations: what may resize them, as timm calls it; none of them asks for crops alone.

    Returns:
        A description; None where they are squashed, whole, by one of these.
    """
    mode, share, interpolation = (saved.get(name) for name in ("crop_mode", "crop_pct", "interpolation"))
    if (mode, share) == ("squash", 1.0) and (not interpolations or interpolation in interpolations):
        return None
    return f"crop_mode {mode}, crop_pct {share} and {interpolation} interpolation"


def _of_pretrained_cfg(saved: Mapping[str, Any], source: str, is_certain: bool) -> Preprocessing | None:
    mean, std = _numbers(saved.get("mean")), _numbers(saved.get("std"))
    if not mean or not std:
        return None
    sizes = [tuple(saved[name][1:]) for name in ("input_size", "test_input_size") if saved.get(name)]
    return Preprocessing(
        mean, std, source, size=sizes[0] if sizes else None, other_sizes=tuple(sizes[1:]), is_certain=is_certain
    )


def _is_default(own: Mapping[str, Any]) -> bool:
    """Whether mean and std are those that timm's registry has for the architecture."""
    from timm.models import get_pretrained_cfg

    default = get_pretrained_cfg(".".join(str(own[name]) for name in ("architecture", "tag") if own.get(name)))
    return default is None or (_numbers(default.mean), _numbers(default.std)) == (
        _numbers(own.get("mean")),
        _numbers(own.get("std")),
    )


def _numbers(values: Any) -> tuple[float, ...] | None:
    if isinstance(values, Tensor) and values.dim() == 1:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    return tuple(map(float, values)) if all(isinstance(value, int | float) for value in values) else None
