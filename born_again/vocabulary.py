"""Whether two tokenizers mean the same by a token id."""

from __future__ import annotations

from typing import Any


def check_same_words(teacher: Any, student: Any) -> None:
    """Refuses a teacher whose words are not the student's.

    Args:
        teacher: tokenizer with `get_vocab()`, from token to id.
        student: the same.

    Raises:
        ValueError: another number of tokens, or another token for an id; names the first.
    """
    theirs, ours = ({index: word for word, index in each.get_vocab().items()} for each in (teacher, student))
    remedy = "train teacher and student with one tokenizer, loaded from the teacher's folder."
    if len(theirs) != len(ours):
        raise ValueError(
            f"teacher: its tokenizer has {len(theirs)} words, the student's {len(ours)}; expected the same, since the "
            f"student is taught word by word: {remedy}"
        )
    for index in sorted(ours):
        if theirs.get(index) != ours[index]:
            raise ValueError(
                f"teacher: its tokenizer has {theirs.get(index)!r} for id {index}, the student's {ours[index]!r}; "
                f"expected the same words in the same order: {remedy}"
            )
