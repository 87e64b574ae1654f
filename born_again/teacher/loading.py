"""Networks of transformers by folder or Hub id, loaded as the class that their config.json names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

Teacher = nn.Module | str | os.PathLike[str]  # a network, or the folder or Hub id of one

# What can be taught: one row of logits for each label. Task as the Hub names it -> transformers' auto class.
TASKS = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
}
_OTHER_TASKS = {
    "SEQ_TO_SEQ_CAUSAL_LM": "sequence to sequence",
    "SPEECH_SEQ_2_SEQ": "speech recognition",
    "QUESTION_ANSWERING": "question answering",
    "DOCUMENT_QUESTION_ANSWERING": "question answering",
    "VISUAL_QUESTION_ANSWERING": "question answering",
    "TABLE_QUESTION_ANSWERING": "question answering",
    "MULTIPLE_CHOICE": "multiple choice",
    "NEXT_SENTENCE_PREDICTION": "next sentence prediction",
    "OBJECT_DETECTION": "object detection",
    "ZERO_SHOT_OBJECT_DETECTION": "object detection",
    "SEMANTIC_SEGMENTATION": "segmentation",
    "INSTANCE_SEGMENTATION": "segmentation",
    "UNIVERSAL_SEGMENTATION": "segmentation",
    "IMAGE_SEGMENTATION": "segmentation",
    "DEPTH_ESTIMATION": "depth estimation",
    "MASKED_IMAGE_MODELING": "masked image modelling",
    "IMAGE_TEXT_TO_TEXT": "text of images",
    "CTC": "speech recognition",
    "AUDIO_CLASSIFICATION": "audio classification",
    "VIDEO_CLASSIFICATION": "video classification",
    "PRETRAINING": "several pretraining losses at once",
}
SERVED = (
    "image, sequence and token classification, causal and masked language models "
    f"({', '.join(name.replace('AutoModel', '') for name in TASKS.values())})"
)


def task_of(network: nn.Module) -> str | None:
    """The task of a network of transformers, as the Hub names it; None for a class that transformers does not know.

    Raises:
        ValueError: a class of transformers for a task that is not served.
    """
    names = [kind.__name__ for kind in type(network).__mro__]
    for task, auto in TASKS.items():
        if any(name in names for name in class_names(auto)):
            return task
    for suffix, what in _OTHER_TASKS.items():
        known = getattr(modeling_auto, f"MODEL_FOR_{suffix}_MAPPING_NAMES", {})
        if any(name in names for name in _flat(known.values())):
            raise ValueError(
                f"model: {type(network).__name__} is for {what}, expected a network with one row of logits for each "
                f"label; served are {SERVED}."
            )
    return None


def class_names(auto: str) -> set[str]:
    """Names of the classes that an auto class makes: those of transformers, and those that were registered."""
    mapping = getattr(transformers, auto)._model_mapping
    registered = [kind.__name__ for kinds in mapping._extra_content.values() for kind in _flat([kinds])]
    return {*_flat(mapping._model_mapping.values()), *registered}


def _flat(entries: Any) -> list[Any]:
    return [name for entry in entries for name in (entry if isinstance(entry, tuple | list) else [entry])]


def load_network(
    source: str | os.PathLike[str],
    revision: str | None = None,
    like: type[PreTrainedModel] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a network of transformers as the class that its config.json names, its weights from safetensors only.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit of the Hub repository.
        like: class to load where config.json names none, such as the student's.
        **options: of from_pretrained, such as dtype.

    Returns:
        The network in eval mode.

    Raises:
        OSError: there is no such folder or repository, it lacks a file, or the Hub cannot be reached.
        ValueError: a network for a task that is not served, of a class that is not transformers' own, or whose weights
            are not all there.
    """
    source = os.fspath(source)
    check_single_network(source)
    if not os.path.isdir(source) and (os.path.isabs(source) or source.startswith(".") or source.count("/") > 1):
        raise FileNotFoundError(f"{source!r} is no folder")
    settings, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    kind = _class_of(source, config, settings, like)
    loaded: Any = kind.from_pretrained(
        source, revision=revision, config=config, use_safetensors=True, output_loading_info=True, **options
    )
    network, report = loaded
    missing, mismatched = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    if missing or mismatched:  # transformers would fill them in at random, with a warning
        raise ValueError(
            f"{source!r}: the weights are not all those of a {kind.__name__}, expected every one; missing: "
            f"{missing[:5]}, of another shape: {mismatched[:5]}. Give a network that is trained for this task, or "
            "save it again."
        )
    return network.eval()


def check_single_network(source: str) -> None:
    """Refuses the folder of an ensemble or a whole lineage, where that of one network is expected.

    Raises:
        ValueError: it is one; says what to give.
    """
    folder = Path(source)
    if (folder / "ensemble.json").is_file():
        raise ValueError(
            f"{source!r} is the folder of an ensemble, expected that of a single network; give the folder of a "
            "generation, or the ensemble itself, LineageEnsemble.from_pretrained(...)."
        )
    if (folder / "lineage.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{source!r} is the folder of a lineage, expected that of a single network; give the folder of one "
            f"generation, such as {str(folder / 'gen0')!r}."
        )


def _class_of(
    source: str, config: PretrainedConfig, settings: dict[str, Any], like: type[PreTrainedModel] | None
) -> type[PreTrainedModel]:
    wanted = (settings.get("architectures") or [None])[0]
    if wanted is None and settings.get("model_type") is None and config.model_type == "timm_wrapper":
        wanted = "TimmWrapperForImageClassification"  # a repository of timm's own
    if like is not None and wanted in (None, like.__name__):
        return like
    for auto in TASKS.values():
        mapping: auto_factory._LazyAutoMapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            for kind in _flat([mapping[type(config)]]):
                if kind.__name__ == wanted:
                    return kind
    raise ValueError(
        f"{source!r} holds a {wanted or config.model_type}, expected a network of transformers with one row of logits "
        f"for each label; served are {SERVED}. Load another one yourself, and give the network in place of the text."
    )


def load_teachers(teacher: Teacher | Sequence[Teacher]) -> nn.Module | list[nn.Module]:
    """A teacher, or a list of them, with every folder and Hub id loaded.

    Raises:
        ValueError: what a text names cannot be loaded; says why.
    """
    if isinstance(teacher, list | tuple):
        return [_loaded(one) for one in teacher]
    return _loaded(teacher)  # type: ignore[arg-type]


def _loaded(teacher: Any) -> Any:
    if not isinstance(teacher, str | os.PathLike):
        return teacher
    source = os.fspath(teacher)
    try:
        return load_network(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher: {source!r} cannot be loaded ({error}); expected the folder of a generation or of a network "
            "with config.json and model.safetensors, or 'owner/name' on the Hub; relative paths start at "
            f"{os.getcwd()!r}."
        ) from error
