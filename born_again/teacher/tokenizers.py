"""Whether two tokenizers give two networks the same input."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

# Capitals, accents composed and not, digits, punctuation, other scripts: where normalisers and pre-tokenizers differ.
_PROBE = "The Quick brøwn fox's café cafe\u0301 x_1 123.45, (don’t) — Straße 中文 <tag>"
_SAMPLED = 32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def tokenizer_of(processing_class: Any) -> Any | None:
    """The tokenizer that a processing_class is or has, or None."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if hasattr(tokenizer, "get_vocab") else None


def tokenizer_beside(network: nn.Module) -> Any | None:
    """The tokenizer in the folder that a network was loaded from, where there is one; never from the Hub."""
    name = getattr(getattr(network, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    if not has_tokenizer(name) or not _has_any(name, _WEIGHTS):
        return None
    from transformers import AutoTokenizer  # a second, which most trainings do without

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a check that cannot be made must not stop a training; it raises many kinds
        logger.info(f"teacher: the tokenizer in {name} cannot be loaded to be compared with the student's ({error}).")
        return None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's files; where it does not, transformers may give an empty tokenizer."""
    return _has_any(folder, _TOKENIZER_FILES)


def token_count(tokenizer: Any) -> int:
    """How many ids a tokenizer may give: its largest and all below it."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_tokens(teacher: Any, student: Any) -> None:
    """Refuses a teacher whose token ids do not mean what the student's mean.

    Args:
        teacher: tokenizer with `get_vocab()`, from token to id.
        student: the same.

    Raises:
        ValueError: another number of tokens, or another token for an id; names the first.
    """
    theirs, ours = _by_id(teacher), _by_id(student)
    if len(theirs) != len(ours):
        raise ValueError(
            f"teacher: its tokenizer has {len(theirs)} tokens, the student's {len(ours)}; expected the same, since "
            f"the student is taught token by token: {_REMEDY}"
        )
    _check_ids(theirs, ours)


def student_tokenizer(processing_class: Any, data_collator: Any, student: nn.Module) -> Any | None:
    """The tokenizer that a student's batches are made with, as far as that is known."""
    for given in (processing_class, data_collator):
        if (tokenizer := tokenizer_of(given)) is not None:
            return tokenizer
    return tokenizer_beside(student)


def check_same_tokenizer(teacher: Any, student: Any, remedy: str | None = None) -> None:
    """Refuses a teacher whose tokenizer would have given it another input than the student's gives both.

    Compared are the tokens by id, but for a padding token that only one has; what is made of texts (normalisation,
    lower-casing, splitting, special tokens that are added); and the side of the padding.

    Args:
        teacher: tokenizer of transformers, or an object with `get_vocab()` alone, whose tokens are compared.
        student: the same.
        remedy: for the message, what to do where the teacher was trained with the student's tokenizer all the same;
            None speaks of a trainer's arguments.

    Raises:
        ValueError: they differ; names both and a text that they read differently.
    """
    theirs, ours = _by_id(teacher), _by_id(student)
    for own, other, tokenizer in ((theirs, ours, teacher), (ours, theirs, student)):
        padding = getattr(tokenizer, "pad_token_id", None)
        # Never a label and never attended to, unless it is the end of a text too.
        if padding not in other and padding != getattr(tokenizer, "eos_token_id", None):
            own.pop(padding, None)
    if len(theirs) != len(ours):
        lacking = sorted({*theirs} ^ {*ours})[0]
        raise ValueError(
            f"teacher: its tokenizer has {len(theirs)} tokens, the student's {len(ours)}; expected the same, since "
            f"the student is taught token by token, and only one of them has {(theirs | ours)[lacking]!r} (id "
            f"{lacking}): {_REMEDY} {remedy or _VOUCH}"
        )
    _check_ids(theirs, ours, f" {remedy or _VOUCH}")
    if not (callable(teacher) and callable(student)):
        return
    for text in _probes(ours):
        _check_same_reading(teacher, student, text, remedy or _VOUCH)
    sides = [getattr(tokenizer, "padding_side", None) for tokenizer in (teacher, student)]
    if sides[0] != sides[1]:
        raise ValueError(
            f"teacher: its tokenizer pads on the {sides[0]}, the student's on the {sides[1]}, which moves every token "
            f"to another position; expected the same: set padding_side={sides[0]!r} on the student's tokenizer. "
            f"{remedy or _VOUCH}"
        )


def differences_to_know(teacher: Any, student: Any) -> Iterator[str]:
    """What two tokenizers that pass `check_same_tokenizer` still have apart: sentences for a warning."""
    for name in ("bos_token", "eos_token"):
        theirs, ours = getattr(teacher, name, None), getattr(student, name, None)
        if theirs != ours and None not in (theirs, ours):
            yield (
                f"teacher: the {name} of its tokenizer is {theirs!r}, of the student's {ours!r}: it teaches texts to "
                f"begin or end with {theirs!r}. Set tokenizer.{name} = {theirs!r} where that is not meant."
            )
    theirs, ours = (getattr(tokenizer, "model_max_length", None) for tokenizer in (teacher, student))
    if theirs is not None and ours is not None and theirs < ours:
        yield (
            f"teacher: the model_max_length of its tokenizer is {theirs}, of the student's {ours}: texts longer than "
            f"{theirs} tokens may be longer than any it was trained on. Truncate them to {theirs}."
        )


def check_padding(network: nn.Module, tokenizer: Any) -> None:
    """Refuses a teacher that would not know the padding of the batches for padding.

    Args:
        network: a teacher.
        tokenizer: that pads the batches.

    Raises:
        ValueError: the padding's id is beyond its vocabulary; a classifier whose config.pad_token_id, by which some
            find the last token of a text or count positions, is another.
    """
    config, padding = getattr(network, "config", None), getattr(tokenizer, "pad_token_id", None)
    if padding is None or not hasattr(config, "get_text_config"):
        return
    config = config.get_text_config()
    size, own = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if isinstance(size, int) and padding >= size:
        raise ValueError(
            f"teacher: knows {size} tokens (config.vocab_size), and batches are padded with {tokenizer.pad_token!r}, "
            f"id {padding}; expected an id that it knows: call teacher.resize_token_embeddings(len(tokenizer)), which "
            "changes no logits of the other tokens, or pad with a token that it has."
        )
    find = getattr(network, "get_output_embeddings", None)
    if own not in (None, padding) and find is not None and find() is None:
        raise ValueError(
            f"teacher: its config.pad_token_id is {own}, and batches are padded with {tokenizer.pad_token!r}, id "
            f"{padding}; expected the same, since a classifier may find the end of a text by it: use the teacher's "
            "tokenizer, or set teacher.config.pad_token_id where it was trained with this padding."
        )


class EndsOfTexts:
    """Looks, in the first steps of a training, for ends of texts that count for nothing, as if they were padding.

    Where a tokenizer pads with the token that ends texts, DataCollatorForLanguageModeling(mlm=False) ignores every
    label that is the padding, and so do many who label texts themselves. Looking waits for the device.

    Args:
        collator: of the training.
        processing_class: whose tokenizer stands in for that of a collator without one.
        is_causal: whether the student is a causal language model, whose labels may be its token ids.
    """

    def __init__(self, collator: Any, processing_class: Any, is_causal: bool) -> None:
        from transformers import DataCollatorForLanguageModeling

        tokenizer = tokenizer_of(collator)
        tokenizer = tokenizer_of(processing_class) if tokenizer is None else tokenizer
        padding = getattr(tokenizer, "pad_token_id", None)
        self._ignores_by_id = isinstance(collator, DataCollatorForLanguageModeling) and not collator.mlm
        is_text = self._ignores_by_id or (is_causal and not getattr(collator, "mlm", False))
        self._end = padding if is_text and padding == getattr(tokenizer, "eos_token_id", None) else None
        self._token = getattr(tokenizer, "pad_token", None)
        self._steps = self._ignored = 0

    def look(self, batches: Sequence[Mapping[str, Any]], labels: str) -> str | None:
        """A warning, once, where the ends of texts in the batches of a step are ignored.

        Args:
            batches: input_ids, attention_mask and labels (rows, time) among them.
            labels: the name of the labels.
        """
        if self._end is None:
            return None
        counts = [self._counts(batch, labels) for batch in batches]
        counted = sum(count[1] for count in counts)
        self._steps += 1
        self._ignored += sum(count[0] for count in counts)
        # Labels made by hand may leave out some ends on purpose, such as those of prompts.
        if self._steps == _STEPS or (self._ignored if self._ignores_by_id else counted):
            self._end = None
        if self._end is not None or not self._ignored:
            return None
        if self._ignores_by_id:
            return (
                f"data_collator: DataCollatorForLanguageModeling(mlm=False) pads with {self._token!r}, which also "
                f"ends texts, and ignores every label that is the padding: {max(count[0] for count in counts)} ends "
                f"of texts in a batch count for nothing, and texts are never taught to end. {_PAD_BY_PLACE}"
            )
        if counted:
            return None
        return (
            f"{labels}: all {self._ignored} ends of texts in the first {_STEPS} steps have the label -100, and "
            f"{self._token!r}, which ends texts, pads them too: texts are never taught to end. If labels were ignored "
            f"where they are the padding, that is why. {_PAD_BY_PLACE}"
        )

    def _counts(self, batch: Mapping[str, Any], labels: str) -> tuple[int, int]:
        """How many ends, tokens that are attended to, are ignored, and how many count."""
        ids, mask, targets = (batch.get(name) for name in ("input_ids", "attention_mask", labels))
        if ids is None or mask is None or targets is None or not ids.shape == mask.shape == targets.shape:
            return 0, 0
        ignored = targets[(ids == self._end) & mask.bool()] == -100
        return int(ignored.sum()), int((~ignored).sum())


_STEPS = 8
_PAD_BY_PLACE = (
    "Pad labels by their place instead: a column labels equal to input_ids, and DataCollatorForSeq2Seq(tokenizer); or "
    "give the padding a token of its own, tokenizer.add_special_tokens({'pad_token': '<pad>'}), and call "
    "resize_token_embeddings(len(tokenizer)) on student and teacher."
)
_REMEDY = "train teacher and student with one tokenizer, loaded from the teacher's folder."
_VOUCH = (
    "Where the teacher was trained with the student's tokenizer, give that as processing_class and as "
    "teacher_processing_class."
)


def _has_any(folder: str | Path, names: tuple[str, ...]) -> bool:
    return any((Path(folder) / name).is_file() for name in names)


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _check_ids(theirs: dict[int, str], ours: dict[int, str], remedy: str = "") -> None:
    for index in sorted(ours):
        if theirs.get(index) != ours[index]:
            raise ValueError(
                f"teacher: its tokenizer has {theirs.get(index)!r} for id {index}, the student's {ours[index]!r}; "
                f"expected the same tokens in the same order: {_REMEDY}{remedy}"
            )


def _probes(tokens: dict[int, str]) -> Iterator[str]:
    ordered = [tokens[index] for index in sorted(tokens)]
    sample = " ".join(ordered[:: max(1, len(ordered) // _SAMPLED)])
    yield from (_PROBE, sample, sample.upper(), "a")


def _check_same_reading(teacher: Any, student: Any, text: str, remedy: str) -> None:
    if _read(teacher, text) == _read(student, text):
        return
    bare = _read(teacher, text, add_special_tokens=False), _read(student, text, add_special_tokens=False)
    # The shortest example: a single word that they read differently, alone or with what is put around it.
    word = next((word for word in text.split() if _read(teacher, word) != _read(student, word)), text)
    theirs, ours = (_shown(tokenizer, word) for tokenizer in (teacher, student))
    what = "adds other special tokens than" if bare[0] == bare[1] else "reads text otherwise than"
    raise ValueError(
        f"teacher: its tokenizer {what} the student's: {word!r} is {theirs} for the teacher's ({_name(teacher)}), "
        f"{ours} for the student's ({_name(student)}); expected the same, since both read one batch: {_REMEDY} "
        + remedy
    )


def _read(tokenizer: Any, text: str, **options: Any) -> list[int] | str:
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # of the Rust library, which raises nothing narrower for a word it has no id for
        return type(error).__name__


def _shown(tokenizer: Any, text: str) -> Any:
    ids = _read(tokenizer, text)
    return tokenizer.convert_ids_to_tokens(ids) if isinstance(ids, list) else f"refused ({ids})"


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def compare_tokenizers(
    teachers: Sequence[nn.Module], processors: Sequence[Any], tokenizer: Any
) -> tuple[list[int], list[str]]:
    """Refuses teachers that would read other tokens than those that the student's tokenizer means.

    Args:
        teachers: the networks.
        processors: one for each, what the user gave; a tokenizer beside its weights stands in for none.
        tokenizer: the student's; without one nothing is compared.

    Returns:
        How many tokens each pair of tokenizers has, for teachers with one; and differences to tell the user.

    Raises:
        ValueError: another tokenizer, or another padding.
    """
    counts, differences = [], []
    for network, given in zip(teachers, processors, strict=True) if tokenizer is not None else ():
        theirs = tokenizer_of(given)
        theirs = tokenizer_beside(network) if theirs is None else theirs
        if theirs is not None:
            check_same_tokenizer(theirs, tokenizer)
            counts.append(max(token_count(theirs), token_count(tokenizer)))
            differences += differences_to_know(theirs, tokenizer)
        check_padding(network, tokenizer)
    return counts, list(dict.fromkeys(differences))
