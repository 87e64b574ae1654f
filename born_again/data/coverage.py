"""How much of each split of a text its vocabulary covers, and what makes a perplexity easier than the text is.

A word that the training split lacks is read as `<unk>`, one easy token: a split written otherwise than the training
split (decomposed accents, capitals) then has a low perplexity that says nothing.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

logger = logging.getLogger(__name__)

UNKNOWN_FROM = 0.03  # of a split's tokens, from which on it is warned of
_MARK = re.compile(r"</?\w+>|\[\w+\]")  # such as <s>, </s>, [SEP]
_SPELLINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "Unicode normalisation (NFC or NFD)": (
        lambda word: unicodedata.normalize("NFC", word),
        "write every split in one, with unicodedata.normalize('NFC', text)",
    ),
    "capitals": (str.casefold, "lower-case every split or none"),
}


def token_coverage(
    words: Mapping[str, Sequence[str]], ids: Mapping[str, int], tokens: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """The shares of tokens that a model cannot have learned to tell from others.

    Args:
        words: the tokens of each split as they are written.
        ids: of the vocabulary.
        tokens: (N,) int64 ids of each split, as many as its words; "train" is what is trained on.

    Returns:
        For each split, as fractions of its tokens: "unknown", words that are not in the vocabulary and are read as
        `<unk>`, where an `<unk>` that the text itself has is none; "untrained", words of the vocabulary that what is
        trained on does not have (0 unless the training split was cut).
    """
    trained = torch.zeros(len(ids), dtype=torch.bool)
    trained[tokens["train"]] = True
    coverage = {}
    for split, own in tokens.items():
        known = torch.tensor([word in ids for word in words[split]])
        coverage[split] = {
            "unknown": (~known).double().mean().item(),
            "untrained": (known & ~trained[own]).double().mean().item(),
        }
    return coverage


def warn_of_unknown_words(name: str, words: Mapping[str, Sequence[str]], ids: Mapping[str, int]) -> None:
    """Names a split of which more than `UNKNOWN_FROM` is unknown, and why where that can be seen.

    Args:
        name: of the dataset.
        words: see `token_coverage`.
        ids: see there.
    """
    for split, own in words.items():
        unknown = Counter(word for word in own if word not in ids)
        share = unknown.total() / len(own)
        if share <= UNKNOWN_FROM:
            continue
        examples = ", ".join(repr(word) for word, _ in unknown.most_common(3))
        warn(
            logger,
            f"--dataset {name!r}: {share:.1%} of the tokens of the split {split!r} ({unknown.total():,}) are not in "
            f"the vocabulary of the training split and are read as '<unk>', which makes its perplexity lower than "
            f"that of the text; the most frequent are {examples}. "
            + (written_otherwise(unknown, ids) or "Is it written in the same way, in the same language?"),
        )


def written_otherwise(unknown: Counter[str], ids: Collection[str]) -> str:
    """Which words would be known if they were spelled in another way, and what to do; empty where those are few.

    Args:
        unknown: how often each word occurs.
        ids: the words that are known.
    """
    reasons = []
    for what, (spelling, remedy) in _SPELLINGS.items():
        known = {spelling(word) for word in ids}
        count = sum(times for word, times in unknown.items() if spelling(word) in known)
        if count > unknown.total() / 4:
            reasons.append(f"{count:,} of them are there but for {what}: {remedy}.")
    return " ".join(reasons)


def warn_of_marked_lines(name: str, lines: Sequence[str]) -> None:
    """Names a mark that begins or ends every line of the training split, beside the `<eos>` that is put there.

    Args:
        name: of the dataset.
        lines: of the training split.
    """
    split = [line.split() for line in lines if line.strip()]
    for place, where in ((0, "begins"), (-1, "ends")):
        mark, count = Counter(line[place] for line in split).most_common(1)[0]
        if mark != "<unk>" and _MARK.fullmatch(mark) and count >= 0.99 * len(split):
            warn(
                logger,
                f"--dataset {name!r}: {mark!r} {where} {count:,} of {len(split):,} lines of the training split, and "
                "'<eos>' follows every line: one of the two can always be predicted, so perplexities are lower than "
                f"those of the text and cannot be compared with published ones; remove {mark!r} from every split.",
            )


def warn(logger: logging.Logger, message: str, *args: object) -> None:
    """A warning of the first process of a launch: each of them reads the text."""
    if os.environ.get("RANK", "0") == "0":  # as torchrun and accelerate set it
        logger.warning(message, *args)
