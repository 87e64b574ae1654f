"""One folder for timm and transformers: image classifiers made, saved and loaded so that either library reads them.

The folder holds `config.json` and `model.safetensors`, with the keys of the timm network. timm reads it by
`timm.create_model("local-dir:FOLDER", pretrained=True)`, transformers by `AutoModelForImageClassification`,
`AutoImageProcessor` (which finds the preprocessing in `config.json`) and `pipeline("image-classification")`, each
after `import born_again`, which registers the networks. The processor and the pipeline serve colour images only: with
in_chans other than 3 they leave the image at 3 channels, and the network refuses it.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg, get_arch_name, get_pretrained_cfg
from torch import nn
from transformers import PreTrainedConfig, TimmWrapperConfig, TimmWrapperForImageClassification

from born_again._files import replaced_atomically
from born_again.models.saved import check_index, check_settings, check_size, loading, read_settings

__all__ = ["create_image_classifier", "load_image_classifier", "save_image_classifier"]

# Supported by timm's transforms, which transformers' processors use.
_CROP_MODES = ("squash", "center", "border")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# Set by the labels and statistics, or would load other weights, or no property of the network.
_RESERVED = (
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "device",
    "dtype",
)


def create_image_classifier(
    name: str,
    labels: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    image_size: int | None = None,
    interpolation: str = "bilinear",
    crop_mode: str = "squash",
    crop_pct: float = 1.0,
    **model_args: Any,
) -> TimmWrapperForImageClassification:
    """Builds the transformers model around a timm network, with the initial weights that the network itself draws.

    Constructing `TimmWrapperForImageClassification` from a configuration draws every weight anew at one standard
    deviation, whatever the network's own rule is. Here the weights are, bit for bit, those of
    `timm.create_model(name, num_classes=len(labels), **model_args)` at the same state of torch's random generator.

    The configuration says how an image of any size becomes the network's input; timm's transforms, AutoImageProcessor
    and pipelines do what it says. It has to be what is done in training: the defaults are what `load_images` does.

    Args:
        name: A timm architecture, such as "densenet90_60_cifar" or "resnet18".
        labels: Names of the classes, by index; two or more, all different.
        mean: Mean of each channel of the training images, in [0, 1].
        std: Standard deviation of each channel, above 0.
        image_size: Side of the images trained on, in pixels; None for the size that the architecture is made for. It
            becomes the `img_size` of networks that have one (ViT, Swin).
        interpolation: What resizes an image: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos".
        crop_mode: "squash" resizes both sides, whatever the proportions; "center" resizes the shorter side and cuts
            the middle out; "border" resizes the longer side and pads.
        crop_pct: Of a resized image, the share of each side that is kept, above 0 to 1.
        **model_args: What the architecture takes besides, such as `proj_drop_rate=0.3`; kept in the configuration,
            so only what JSON can hold.

    Returns:
        The model, in training mode: pixel_values (batch, channels, height, width) of float to logits (batch, labels).

    Raises:
        ValueError: If the architecture is unknown, a label, mean, std or another argument is not as described, or
            model_args holds what is decided here (the number of classes, the weights) or an img_size that is not
            image_size.

    Example:
        >>> labels, mean, std = ["cat", "dog"], [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
        >>> model = create_image_classifier("wide_resnet16_1_cifar", labels, mean, std, image_size=32)
        >>> model(torch.zeros(4, 3, 32, 32)).logits.shape
        torch.Size([4, 2])
        >>> model.config.id2label
        {0: 'cat', 1: 'dog'}
    """
    check_architecture(name)
    for argument, value, known in (
        ("interpolation", interpolation, _INTERPOLATIONS),
        ("crop_mode", crop_mode, _CROP_MODES),
    ):
        if value not in known:
            raise ValueError(f"{argument}={value!r} is unknown to timm; give one of {', '.join(known)}.")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} is a share of each side; give a number above 0, at most 1.")
    model_args = _with_image_size(name, image_size, model_args)
    labels = _checked_labels(labels)
    reserved = sorted(set(model_args) & set(_RESERVED))
    if reserved:
        raise ValueError(
            f"model_args={reserved} are set by create_image_classifier, which builds an untrained network with one "
            "output per label; leave them out."
        )
    try:
        json.dumps(model_args)
    except TypeError as error:
        raise ValueError(f"model_args={model_args} go into config.json; give what JSON can hold: {error}.") from error

    network = timm.create_model(name, num_classes=len(labels), **model_args)
    input_config = _input_config(network, model_args)
    channels, *sides = input_config["input_size"]
    defaults = cast(dict[str, Any], network.pretrained_cfg)
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": name,
            "num_classes": len(labels),
            "label_names": labels,
            # Left open, the first loss would fill it in, and the configuration would change in training.
            "problem_type": "single_label_classification",
            # Without num_classes, which transformers passes by itself; never null, which timm cannot read.
            "model_args": model_args,
            # Not the network's whole record: its source, tag and licence are those of weights that are not used here.
            "pretrained_cfg": {
                "input_size": [
                    channels,
                    *(input_config["input_size"][1:] if image_size is None else [image_size] * 2),
                ],
                "fixed_input_size": input_config["fixed_input_size"],
                "interpolation": interpolation,
                "crop_pct": float(crop_pct),
                "crop_mode": crop_mode,
                "mean": _checked_statistic("mean", mean, channels),
                "std": _checked_statistic("std", std, channels),
                "pool_size": defaults.get("pool_size"),
                "first_conv": defaults.get("first_conv"),
                "classifier": defaults.get("classifier"),
            },
        }
    )
    # A model made through from_pretrained keeps the weights, and knows that its files carry no "timm_model." prefix.
    model = TimmWrapperForImageClassification.from_pretrained(None, config=config, state_dict=network.state_dict())
    return model.train()


def wrap_timm_network(
    network: nn.Module, labels: Sequence[str] | None = None, image_size: int | None = None
) -> TimmWrapperForImageClassification:
    """Puts a network of timm, trained or not, into the transformers model around it; the network itself is kept.

    Its configuration has the architecture and the preprocessing that the network names, and no arguments of the
    architecture, which a network does not know. So it is made again from that, and has to compute the same.

    Args:
        network: What `timm.create_model` returned.
        labels: Names of its classes; None numbers them.
        image_size: Side of the images it reads, in pixels; None for what the network names.

    Raises:
        ValueError: If it does not name an architecture of timm, or that one made anew, with the same weights, has
            others or other outputs: then it was made with arguments, which create_image_classifier keeps.
    """
    own = dict(getattr(network, "pretrained_cfg", None) or {})
    name, classes = own.get("architecture", ""), getattr(network, "num_classes", 0)
    check_architecture(name, "model")
    size = [own["input_size"][0], *(own["input_size"][1:] if image_size is None else [image_size] * 2)]
    kept = ("fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    kept = (*kept, "pool_size", "first_conv", "classifier")
    model_args = {}
    if own.get("fixed_input_size") and size[1:] != list(own["input_size"][1:]):
        model_args["img_size"] = size[1]
    settings = {
        "architecture": name,
        "num_classes": classes,
        "problem_type": "single_label_classification",
        "model_args": model_args,
        "pretrained_cfg": {"input_size": size, **{key: own[key] for key in kept if key in own}},
    }
    if labels is not None:
        settings["label_names"] = _checked_labels(labels)
    config = TimmWrapperConfig.from_dict(settings)
    try:
        weights = network.state_dict()
        model = TimmWrapperForImageClassification.from_pretrained(None, config=config, state_dict=weights)
        made = model.timm_model
        same = {key: value.shape for key, value in made.state_dict().items()} == {
            key: value.shape for key, value in weights.items()
        } and _computes_as(made, network, size)
    except (RuntimeError, TypeError) as error:
        raise _made_with_arguments(name) from error
    if not same:
        raise _made_with_arguments(name)
    model.timm_model = network
    return model.train()


def _computes_as(made: nn.Module, network: nn.Module, size: Sequence[int]) -> bool:
    weight = next(network.parameters())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        pixels = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)).to(weight)
        modes = {module: module.training for module in network.modules()}
        try:
            made = made.to(weight.device, weight.dtype).eval()
            return torch.allclose(made(pixels), network.eval()(pixels), rtol=1e-4, atol=1e-4)
        finally:
            for module, training in modes.items():
                module.training = training


def _made_with_arguments(name: str) -> ValueError:
    return ValueError(
        f"model: {name!r} made anew by timm is another network than the one given, which was made with arguments of "
        f"its own that it does not know; make it by create_image_classifier({name!r}, labels, mean, std, ...), which "
        "keeps them in its configuration, so that its generations can be loaded."
    )


def check_model_args(name: str, model_args: Mapping[str, Any], argument: str = "model_args") -> None:
    """Checks that an architecture can be built with its arguments, before any data is read.

    Args:
        name: A timm architecture.
        model_args: Of the network, as `create_image_classifier` takes them.
        argument: What the user knows model_args as, for the message.

    Raises:
        ValueError: If the architecture is unknown, or does not have one of the arguments, which is named together
            with the nearest that it has, or cannot be built with their values.
    """
    check_architecture(name, argument.removesuffix("_args"))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            timm.create_model(name, num_classes=2, **model_args)
        return
    except (TypeError, ValueError) as error:
        problem = error
    except Exception:  # not every network can be built on the meta device
        return
    known = _constructor_arguments(name)
    for unknown in sorted(set(model_args) - known) if known else []:
        near = difflib.get_close_matches(unknown, sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known - {*_RESERVED}))}."
        flag = {"proj_drop_rate": " (it is --dropout)", "img_size": " (it is --image_size)"}.get(unknown, "")
        raise ValueError(f"{argument}: got {unknown!r}{flag}, which {name} does not have; {hint}") from problem
    raise ValueError(f"{argument}={dict(model_args)}: {name} cannot be built with these: {problem}") from problem


def takes_model_arg(name: str, model_arg: str) -> bool:
    """Whether an architecture has an argument of this name; False where that is not known."""
    return model_arg in _constructor_arguments(name)


def _constructor_arguments(name: str) -> set[str]:
    """The names of an architecture's arguments, none where they cannot be told."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            parameters = inspect.signature(type(timm.create_model(name))).parameters
    except Exception:  # see check_model_args
        return set()
    return set() if any(each.kind is each.VAR_KEYWORD for each in parameters.values()) else set(parameters)


def check_image_size(name: str, image_size: int, **model_args: Any) -> None:
    """Checks that an architecture accepts square colour images of a size, before any data is read.

    Args:
        name: A timm architecture.
        image_size: Side of the images, in pixels.
        **model_args: Of the network, as `create_image_classifier` takes them.

    Raises:
        ValueError: If it is unknown, or cannot be built for such images or fails on one.
    """
    check_architecture(name)
    model_args = _with_image_size(name, image_size, model_args)

    def read_one() -> None:
        network = timm.create_model(name, num_classes=2, **model_args).eval()
        # Some networks silently ignore the pixels beyond the last whole patch.
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        if isinstance(patch, tuple) and any(image_size % side for side in patch):
            raise ValueError(f"it reads patches of {patch[0]} x {patch[1]}, so give a multiple")
        network(torch.zeros(1, 3, image_size, image_size))

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # The meta device is fast, but does not work with every network.
        with contextlib.suppress(Exception), torch.device("meta"):
            read_one()
            return
        try:
            read_one()
        except TypeError as error:
            raise ValueError(
                f"model_args={model_args}: {name} does not take all of these ({error}); leave out what it does not "
                "have (proj_drop_rate is --dropout, img_size is --image_size)."
            ) from error
        # A wrong size can raise anything, anywhere.
        except Exception as error:
            own = cast(PretrainedCfg, get_pretrained_cfg(name)).input_size[-1]
            raise ValueError(
                f"image_size={image_size}: {name} cannot read images of {image_size} x {image_size} pixels "
                f"({type(error).__name__}: {str(error)[:300]}); give --image_size {own}, for which it is made, or "
                "another --model."
            ) from error


def _input_config(network: nn.Module, model_args: dict[str, Any]) -> dict[str, Any]:
    """input_size (channels, height, width) and fixed_input_size of a network as it was built with its arguments."""
    if hasattr(timm.models, "get_model_input_config"):
        return timm.models.get_model_input_config(network)
    # Older timm: pretrained_cfg is that of the architecture, whatever its arguments.
    own = cast(dict[str, Any], network.pretrained_cfg)
    channels, *sides = own["input_size"]
    size = model_args.get("img_size") or sides
    return {
        "input_size": (model_args.get("in_chans", channels), *([size] * 2 if isinstance(size, int) else size)),
        "fixed_input_size": own.get("fixed_input_size", False),
    }


def _with_image_size(name: str, image_size: int | None, model_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a network for an image size: with img_size if its input size is fixed."""
    if image_size is None:
        return model_args
    if type(image_size) is not int or image_size < 1:
        raise ValueError(
            f"image_size={image_size!r} is the side of the images in pixels; give a whole number above 0."
        )
    own = cast(PretrainedCfg, get_pretrained_cfg(name))
    requested = model_args.get("img_size")
    if requested not in (None, image_size, [image_size] * 2, (image_size, image_size)):
        raise ValueError(
            f"model_args={{'img_size': {requested!r}}} and image_size={image_size} differ; give the size of the "
            "images as image_size alone."
        )
    if requested is None and own.fixed_input_size and tuple(own.input_size[1:]) != (image_size, image_size):
        return {**model_args, "img_size": image_size}
    return model_args


def load_image_classifier(
    path_or_repo: str | os.PathLike[str], revision: str | None = None
) -> TimmWrapperForImageClassification:
    """Loads an image classifier from a folder or from the Hub, from safetensors only: nothing is unpickled.

    Args:
        path_or_repo: A folder that holds config.json and model.safetensors, or the id of a repository on the Hub.
        revision: Branch, tag or commit, for the Hub.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If a folder is missing, or lacks config.json or model.safetensors.
        OSError: If the Hub has no such repository, or it lacks one of the files.
        ValueError: If what is there is not a timm image classifier, its network is unknown or is described by
            anything but its own arguments, or the weights are not all of this network and nothing else.
    """
    source = os.fspath(path_or_repo)
    if os.path.isdir(source):
        _check_files(Path(source))
        check_index(Path(source))
    elif os.path.isabs(source) or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(
            f"path_or_repo={source!r} is not a folder; give a folder with config.json and model.safetensors, or a Hub "
            "repository as 'namespace/name'."
        )
    with loading(source):
        model, settings, report = _load(source, revision)
    # transformers would initialise missing weights at random, with a warning only.
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(
            f"path_or_repo={source!r}: the weights do not fit {settings['architecture']!r}; missing: {missing[:5]}, "
            f"unexpected: {unexpected[:5]} (the first 5 of {len(missing)} and {len(unexpected)}). Save it again."
        )
    # auto_map names code in the repository, which will not be in the folder that this model is saved to.
    vars(model.config).pop("auto_map", None)
    return model.eval()


def _load(source: str, revision: str | None) -> tuple[TimmWrapperForImageClassification, dict, dict]:
    is_folder = os.path.isdir(source)
    settings = (
        read_settings(Path(source)) if is_folder else PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    )
    is_timms = _convert_timm_config(settings)
    if settings.get("model_type") != "timm_wrapper" or settings.get("num_classes") == 0:
        raise ValueError(
            f"path_or_repo={source!r} holds a model of type {settings.get('model_type')!r} with "
            f"{settings.get('num_classes', 'no')} classes, not an image classifier around a timm network; give one "
            "that save_image_classifier or a Trainer of such a model wrote, or load this one with transformers."
        )
    check_settings(settings, source)
    check_architecture(settings.get("architecture", ""))
    labels = settings.get("label_names")
    if labels is not None and not (isinstance(labels, list) and len(labels) == settings.get("num_classes")):
        raise ValueError(
            f"path_or_repo={source!r}: config.json has label_names {str(labels)[:200]} and num_classes "
            f"{settings.get('num_classes')!r}, expected one name for each class; correct it."
        )
    reserved = sorted(set(settings.get("model_args") or {}) & set(_RESERVED))
    if reserved:  # checkpoint_path, for one, would unpickle a file anywhere
        raise ValueError(
            f"path_or_repo={source!r}: config.json has model_args {reserved}, which would bring in other weights or "
            "another number of classes, expected arguments of the network alone; take them out."
        )
    config = TimmWrapperConfig.from_dict(copy.deepcopy(settings))
    if is_folder:
        check_size(lambda: TimmWrapperForImageClassification(config), Path(source))
    own = {"config": config} if is_timms else {}  # transformers would read what timm has written as it stands
    model, report = cast(Any, TimmWrapperForImageClassification).from_pretrained(  # not annotated as a tuple
        source, revision=revision, use_safetensors=True, output_loading_info=True, **own
    )
    return model, settings, report


def _convert_timm_config(settings: dict[str, Any]) -> bool:
    """Converts the config of timm's save_for_hf, in place, to that of transformers; returns whether it was one.

    It has no model_type, and model_args contain the number of classes, which the wrapper passes itself.
    """
    if "model_type" in settings or "architecture" not in settings or not isinstance(settings.get("num_classes"), int):
        return False
    settings["model_type"] = "timm_wrapper"
    if isinstance(arguments := settings.get("model_args"), dict):
        kept = {name: value for name, value in arguments.items() if name != "num_classes"}
        settings["model_args"] = kept if arguments.get("num_classes") == settings["num_classes"] else arguments
    return True


def save_image_classifier(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes config.json and model.safetensors into `folder`, each replaced in one step.

    Args:
        model: A `TimmWrapperForImageClassification`, also inside torch.compile or (Distributed)DataParallel, in any
            memory format, on any device.
        folder: Where to write; made if needed.

    Raises:
        ValueError: If the model is none of these.
    """
    inner = model
    while not isinstance(inner, TimmWrapperForImageClassification):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise ValueError(
                f"model={type(model).__name__} is not a TimmWrapperForImageClassification; build it with "
                "create_image_classifier or load it with load_image_classifier."
            )
    # timm's keys: neither the wrapper's prefix nor, where the network inside was compiled, the compiler's.
    weights = {
        key.replace("_orig_mod.", "").removeprefix("timm_model."): tensor.detach().cpu().contiguous()
        for key, tensor in inner.state_dict().items()
    }
    config = copy.deepcopy(inner.config)
    config.architectures = [type(inner).__name__]
    config.model_args = config.model_args or {}
    config.dtype = str(inner.dtype).removeprefix("torch.")

    folder = Path(folder)
    # The configuration last: a folder with a config.json is complete.
    with replaced_atomically(folder / "model.safetensors") as path:
        save_file(weights, path, metadata={"format": "pt"})
    with replaced_atomically(folder / "config.json") as path:
        config.to_json_file(path)


def _check_files(folder: Path) -> None:
    # Sharded models have an index instead of the single file.
    for choices in (("config.json",), ("model.safetensors", "model.safetensors.index.json")):
        if not any((folder / name).is_file() for name in choices):
            raise FileNotFoundError(
                f"path_or_repo={str(folder)!r} has no {choices[0]}; give a folder that save_image_classifier or a "
                "Trainer wrote. Pickled weights (pytorch_model.bin) are never loaded."
            )


def check_architecture(name: str, argument: str = "name") -> None:
    if timm.is_model(name) and name == get_arch_name(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=5)
    if timm.is_model(name):
        near = [get_arch_name(name)]
    hint = f" Near it: {', '.join(near)}." if near else ""
    raise ValueError(
        f"{argument}={name!r} is not an architecture that timm {timm.__version__} knows (a tag, after a dot, would "
        f"name trained weights).{hint} timm.list_models('*cifar*') lists those of this package, timm.list_models() "
        "all."
    )


def _checked_labels(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels={labels!r} should be a list of strings, one per class; convert them with str().")
    if len(labels) < 2:
        raise ValueError(f"labels={list(labels)} has {len(labels)} classes; a classifier needs 2 or more.")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(f"labels={list(labels)} repeats {repeated}; give every class a name of its own.")
    return list(labels)


def _checked_statistic(argument: str, values: Sequence[float], channels: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != channels:
        raise ValueError(
            f"{argument}={numbers} has {len(numbers)} numbers and the network takes {channels} channels; give one for "
            "each (in_chans sets the channels)."
        )
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{argument}={numbers} is not finite; compute it over the training images, scaled to [0, 1].")
    if argument == "std" and min(numbers) <= 0:
        raise ValueError(f"std={numbers} divides the pixels; give numbers above 0, of images scaled to [0, 1].")
    return numbers
