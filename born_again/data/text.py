"""Reads a text corpus into three tensors of token ids with a word-level tokenizer, and checks its coverage.

A line is a sentence: it is split at white space, and `<eos>` follows every line, as in Mikolov's Penn Treebank.
Nothing is lowercased or normalised.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from born_again.data.grammar import EOS, grammar_corpus, grammar_entropy

logger = logging.getLogger(__name__)

MAX_UNKNOWN_SHARE = 0.03  # of the tokens of a split; above it a warning is logged
_MARK = re.compile(r"</?\w+>|\[\w+\]")  # such as <s>, </s>, [SEP]
_SPELLINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "Unicode normalisation (NFC or NFD)": (
        lambda word: unicodedata.normalize("NFC", word),
        "write every split in one, with unicodedata.normalize('NFC', text)",
    ),
    "capitals": (str.casefold, "lower-case every split or none"),
}
EMBEDDED = "grammar"
UNK = "<unk>"
SPLITS = ("train", "validation", "test")
Lines = dict[str, list[str]]
SHORTCUTS = {"ptb": "ptb-text-only/ptb_text_only"}
# The Hub's own conversion: the dataset itself is a script, and scripts no longer load.
_PTB_REVISION = "refs/convert/parquet"
_PTB_SIZES = {"train": 929_589, "validation": 73_760, "test": 82_430, "vocabulary": 10_000}
_TEXT_FILE = re.compile(r"((?:[^.]+\.)?)(train|valid|validation|test)\.txt")
_TABLES = {".parquet", ".jsonl", ".json", ".csv", ".arrow"}


@dataclass(frozen=True)
class TextData:
    """A corpus, read.

    Attributes:
        train, validation, test: (tokens,) int64 token ids, in the order of the text.
        tokenizer: word-level, with the vocabulary of the training split, see `load_text`.
        entropy_per_word: nats per word, `<eos>` counted as a word: the lower bound of the expected loss. None if not
            known.
        fingerprint: JSON-able, the same for the same data: tokens by split, vocabulary (its size), sha256 of
            vocabulary and ids of all splits, and entropy_per_word (rounded to 6 decimals) if known.
        coverage: for each split the fractions of its tokens that are "unknown" and "untrained", see
            `born_again.data.text.token_coverage`.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    tokenizer: PreTrainedTokenizerFast
    entropy_per_word: float | None
    fingerprint: dict[str, Any]
    coverage: dict[str, dict[str, float]]

    def to(self, device: torch.device | str) -> TextData:
        """The corpus with all splits on another device."""
        moved = {split: getattr(self, split).to(device) for split in ("train", "validation", "test")}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Size of the token streams made of all splits, in bytes: inputs and labels."""
        return 2 * (self.train.nbytes + self.validation.nbytes + self.test.nbytes)


def load_text(
    dataset: str | Path,
    *,
    text_column: str | None = None,
    revision: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> TextData:
    """Read a corpus into memory.

    The vocabulary is that of the whole training split, whatever the limits, so that a limit does not change the model.
    Tokens are ordered by decreasing count, then by first appearance; `<eos>` is included. A word that only other
    splits have becomes `<unk>` if the training split contains `<unk>`, as Penn Treebank's does; many of them give a
    warning. A blank line gives `<eos>` only. A newline at the end of a file or row does not begin a line. A literal
    `<eos>` in the text is the same token.

    Args:
        dataset: "grammar" (embedded, see `born_again.data.grammar`); a folder with train.txt, valid.txt (or
            validation.txt) and test.txt, or the three with one prefix such as ptb.train.txt, or with tables that
            `datasets` reads; "ptb" or "owner/name" on the Hub. A folder with the name of a shortcut is given as
            "./ptb".
        text_column: column of the text, where `datasets` reads it; None takes the only one of strings.
        revision: branch, tag or commit of a dataset on the Hub.
        max_train_samples: number of tokens to keep from the start of the training split; None, or more than there are,
            keeps all.
        max_eval_samples: likewise for the validation and the test split, each.

    Returns:
        The splits as token ids, the tokenizer, and a fingerprint.

    Raises:
        ValueError: if the name, a file, a split, a column, a word or a limit is not as expected; the message says
            which.
        ConnectionError: if the Hub is needed and cannot be reached.
    """
    limits = {"train": max_train_samples, "validation": max_eval_samples, "test": max_eval_samples}
    for flag, limit in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"--{flag} is {limit}; expected at least 1: leave it out to use every token")
    lines, is_ptb = _read_lines(dataset, text_column, revision)
    texts = {}
    for split in SPLITS:
        texts[split] = [word for line in lines[split] for word in (*line.split(), EOS)]
        if len(texts[split]) == len(lines[split]):
            raise ValueError(f"--dataset {str(dataset)!r}: split {split!r} is empty; expected words: check its file")
    # most_common keeps the order of first appearance among equal counts.
    words = [word for word, _ in Counter(texts["train"]).most_common()]
    ids = {word: number for number, word in enumerate(words)}
    unknown = ids.get(UNK)
    tokens = {}
    for split, text in texts.items():
        numbers = [ids.get(word, unknown) for word in text]
        if unknown is None and None in numbers:
            word = text[numbers.index(None)]
            line = next(number for number, line in enumerate(lines[split], 1) if word in line.split())
            missing = Counter(word for word in text if word not in ids)
            remedy = spelling_hint(missing, ids) or f"write {UNK} for rare words in all splits"
            raise ValueError(
                f"--dataset {str(dataset)!r}: the word {word!r} in line {line} of the split {split!r} is not in the "
                f"training split, which has no {UNK!r} to stand for it; {missing.total():,} of its {len(text):,} "
                f"tokens are not. Expected every word there: {remedy}"
            )
        tokens[split] = torch.tensor(numbers[: limits[split]])
    kept = {split: text[: limits[split]] for split, text in texts.items()}
    warn_about_unknown_tokens(str(dataset), kept, ids)
    warn_about_line_markers(str(dataset), lines["train"])
    sizes = {split: len(text) for split, text in texts.items()} | {"vocabulary": len(words)}
    differing = {part: size for part, size in sizes.items() if size != _PTB_SIZES[part]}
    if is_ptb and differing and max_train_samples is None and max_eval_samples is None:
        warn(
            logger,
            "--dataset %r is Penn Treebank by its name, but has %s where Mikolov's preparation has %s (tokens of a "
            "split, words of the vocabulary): perplexities cannot be compared with published ones.",
            *(str(dataset), differing, {part: _PTB_SIZES[part] for part in differing}),
        )
    entropy = grammar_entropy() if dataset == EMBEDDED else None
    fingerprint = {
        "tokens": {split: len(numbers) for split, numbers in tokens.items()},
        "vocabulary": len(words),
        "sha256": _digest(words, tokens),
    }
    if entropy is not None:
        fingerprint["entropy_per_word"] = round(entropy, 6)
    return TextData(
        **tokens,
        tokenizer=word_tokenizer(words),
        entropy_per_word=entropy,
        fingerprint=fingerprint,
        coverage=token_coverage(kept, ids, tokens),
    )


def _digest(words: list[str], tokens: dict[str, torch.Tensor]) -> str:
    """sha256 over the words, then the ids of each split."""
    digest = hashlib.sha256("\n".join(words).encode())
    for split in SPLITS:
        digest.update(f"\n{split} {len(tokens[split])}\n".encode())
        # Explicit byte order, so that the digest is the same on any machine.
        digest.update(tokens[split].numpy().astype("<i8").data)
    return digest.hexdigest()


# ---- Files and tables ----


def _read_lines(dataset: str | Path, text_column: str | None, revision: str | None) -> tuple[Lines, bool]:
    """Lines of each split, and whether the name is that of Penn Treebank."""
    name = str(dataset)
    if name in (EMBEDDED, *SHORTCUTS) and not isinstance(dataset, Path) and os.path.isdir(name):
        warn(
            logger,
            "--dataset %r is %s, and not the folder of that name here, which is --dataset %r.",
            *(name, "embedded" if name == EMBEDDED else f"{SHORTCUTS[name]} on the Hub", f"./{name}"),
        )
    if dataset == EMBEDDED:
        _refuse(name, "is embedded", text_column=text_column, revision=revision)
        return grammar_corpus(), False
    folder = Path(dataset).expanduser()
    if folder.is_dir() and (isinstance(dataset, Path) or name not in SHORTCUTS):
        _refuse(name, "is a folder, not a dataset on the Hub", revision=revision)
        prefix, files = _find_files(name, folder)
        if files:
            _refuse(name, "is plain text without columns", text_column=text_column)
            return {split: _read_file(path) for split, path in files.items()}, prefix == "ptb."
        return _read_tables(name, str(folder), text_column, None), False
    source = SHORTCUTS.get(name, name)
    if isinstance(dataset, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"--dataset is {name!r}; expected {EMBEDDED!r}, 'ptb', a folder, or 'owner/name' on the Hub, and there is "
            "no such folder: check the spelling"
        )
    is_ptb = source == SHORTCUTS["ptb"]
    return _read_tables(name, source, text_column, revision or (_PTB_REVISION if is_ptb else None)), is_ptb


def _refuse(name: str, reason: str, **arguments: str | None) -> None:
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(f"{argument} is {value!r} for --dataset {name!r}, which {reason}: drop it")


def _find_files(name: str, folder: Path) -> tuple[str, dict[str, Path]]:
    """The common prefix of the three text files and each split's file; no files where the folder holds tables."""
    entries = sorted(entry.name for entry in folder.iterdir())
    sets: dict[str, dict[str, list[Path]]] = {}
    for entry in entries:
        if match := _TEXT_FILE.fullmatch(entry):
            split = "validation" if match[2] == "valid" else match[2]
            sets.setdefault(match[1], {}).setdefault(split, []).append(folder / entry)
    complete = [prefix for prefix, files in sets.items() if len(files) == len(SPLITS)]
    chosen = [path.name for prefix in complete for paths in sets[prefix].values() for path in paths]
    if len(chosen) > len(SPLITS):
        raise ValueError(
            f"--dataset {name!r} holds {', '.join(sorted(chosen))}; expected one file for each of train, validation "
            "and test: move the others to a folder of their own"
        )
    if complete:
        return complete[0], {split: sets[complete[0]][split][0] for split in SPLITS}
    if not sets and any(path.suffix in _TABLES for path in folder.rglob("*")):
        return "", {}
    shown = ", ".join(entries[:20] + ["..."] * (len(entries) > 20)) or "nothing"
    raise ValueError(
        f"--dataset {name!r} is a folder that holds {shown}; expected train.txt, valid.txt (or validation.txt) and "
        "test.txt, or the three with one prefix such as ptb.train.txt, or tables that `datasets` reads "
        f"({', '.join(sorted(_TABLES))}): rename or add the missing files"
    )


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is not part of the first word
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 ({error}); expected a text file in UTF-8: convert it") from error
    return _split_lines(text) if text else []


def _split_lines(text: str) -> list[str]:
    # Not splitlines(), which breaks at form feeds and a dozen other characters too.
    return text.removesuffix("\n").split("\n")


def _read_tables(name: str, source: str, text_column: str | None, revision: str | None) -> Lines:
    """Lines of each split of a dataset that `datasets` reads: a folder, or an id on the Hub."""
    # Imported here: it takes a second, and other corpora do not need it.
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if (Path(source) / "dataset_dict.json").is_file():
            tables = datasets.load_from_disk(source)
        else:
            tables = datasets.load_dataset(source, revision=revision)
    except DatasetNotFoundError as error:
        raise ValueError(
            f"--dataset {name!r} is neither a folder here nor a dataset on the Hub that this account can read "
            f"({error}); check the spelling and the revision, or log in with `hf auth login` if it is private or gated"
        ) from error
    except (ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"--dataset {name!r} is not in the local cache and the Hub cannot be reached ({error}); use `--dataset "
            f"{EMBEDDED}`, which needs no network, or `--dataset PATH` with a folder of train.txt, valid.txt, test.txt"
        ) from error
    # RuntimeError: a dataset that is a script. IndexError: load_from_disk on an empty split.
    except (ValueError, IndexError, RuntimeError, FileNotFoundError, DatasetGenerationError) as error:
        raise ValueError(
            f"--dataset {name!r} is refused by `datasets` ({error}); expected readable tables and one configuration: "
            f"for a script on the Hub try the revision {_PTB_REVISION!r}, or save train.txt, valid.txt and test.txt"
        ) from error
    tables = cast(Mapping[str, datasets.Dataset], tables)
    missing = [split for split in SPLITS if split not in tables]
    if missing:
        raise ValueError(
            f"--dataset {name!r} has the splits {', '.join(tables)}; expected {', '.join(SPLITS)}, so "
            f"{', '.join(missing)} is missing: rename or make it (Dataset.train_test_split, then save as parquet)"
        )
    features = tables["train"].features
    columns: list[str] = [
        name for name in features if getattr(features[name], "dtype", "") in ("string", "large_string")
    ]
    column = text_column or (columns[0] if len(columns) == 1 else None)
    if column not in columns:
        raise ValueError(
            f"--text_column is {text_column!r}; dataset {name!r} has the columns {list(features)}, of which {columns} "
            "hold strings: name one of these"
        )
    lines: Lines = {}
    for split in SPLITS:
        rows = tables[split].select_columns([column]).with_format("arrow")[:][column].to_pylist()
        if None in rows:
            raise ValueError(
                f"--dataset {name!r}: column {column!r} of the split {split!r} has no text in row {rows.index(None)}; "
                "expected a string in every row: remove the row"
            )
        lines[split] = [line for row in rows for line in _split_lines(row)]
    return lines


# ---- Tokenizer ----


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that splits at white space; word i has the id i.

    A newline becomes `<eos>`, so that the text of a file gets the ids of `load_text`; nothing else is added:
    `decode(encode("the cat"))` is "the cat". `<unk>` and `<eos>` in a text are ordinary words. A word that is not in
    `words` becomes `<unk>` if `words` has it; otherwise encoding raises. `<eos>` is also the padding token:
    distinguish them by the attention mask, which DataCollatorForLanguageModeling does not do.

    Args:
        words: unique, without white space, including `<eos>`.

    Raises:
        ValueError: if `words` is not as described.
    """
    vocabulary = {word: number for number, word in enumerate(words)}
    bad = [word for number, word in enumerate(words) if vocabulary[word] != number or word.split() != [word]]
    if bad or EOS not in vocabulary:
        wrong = f"holds {bad[0]!r}, which is repeated, empty or has white space" if bad else f"lacks {EOS!r}"
        raise ValueError(f"words {wrong}; expected different words, {EOS!r} among them: pass those of a corpus")
    unknown = {"unk_token": UNK} if UNK in vocabulary else {}
    tokenizer = Tokenizer(WordLevel(vocabulary, **unknown))
    # Python's str.split, by which the ids of a corpus are made, splits at four more characters than WhitespaceSplit.
    tokenizer.normalizer = Normalizers([Replace("\n", f" {EOS} "), Replace(Regex("[\x1c-\x1f]"), " ")])
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000_000,
        model_input_names=["input_ids", "attention_mask"],
        # Otherwise a special token inside a word would be split off.
        split_special_tokens=True,
        **unknown,
    )


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokens of `tokenizer`, by id."""
    return list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))


# ---- Coverage of the vocabulary ----


def token_coverage(
    words: Mapping[str, Sequence[str]], ids: Mapping[str, int], tokens: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """The fractions of tokens that a model cannot have learned: unknown and untrained ones.

    Args:
        words: the tokens of each split as text.
        ids: from token to id, of the vocabulary.
        tokens: (N,) int64 ids of each split, as many as its words; a model is trained on "train".

    Returns:
        For each split, as fractions of its tokens: "unknown", those not in the vocabulary, which become `<unk>` (an
        `<unk>` in the text itself is not counted); "untrained", those in the vocabulary but not in the training tokens
        (0 unless the training split was truncated).
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


def warn_about_unknown_tokens(name: str, words: Mapping[str, Sequence[str]], ids: Mapping[str, int]) -> None:
    """Warns if the share of unknown tokens of a split exceeds `MAX_UNKNOWN_SHARE`, with the reason if it is known.

    Args:
        name: of the dataset.
        words: see `token_coverage`.
        ids: see there.
    """
    for split, own in words.items():
        unknown = Counter(word for word in own if word not in ids)
        share = unknown.total() / len(own)
        if share <= MAX_UNKNOWN_SHARE:
            continue
        examples = ", ".join(repr(word) for word, _ in unknown.most_common(3))
        warn(
            logger,
            f"--dataset {name!r}: {share:.1%} of the tokens of the split {split!r} ({unknown.total():,}) are not in "
            f"the vocabulary of the training split and are read as '<unk>', which makes its perplexity lower than "
            f"that of the text; the most frequent are {examples}. "
            + (spelling_hint(unknown, ids) or "Is it written in the same way, in the same language?"),
        )


def spelling_hint(unknown: Counter[str], ids: Collection[str]) -> str:
    """Why words are unknown (capitals or Unicode normalisation), and the remedy; empty if that explains only few.

    Args:
        unknown: counts of the unknown words.
        ids: the words of the vocabulary.
    """
    reasons = []
    for what, (spelling, remedy) in _SPELLINGS.items():
        known = {spelling(word) for word in ids}
        count = sum(times for word, times in unknown.items() if spelling(word) in known)
        if count > unknown.total() / 4:
            reasons.append(f"{count:,} of them are there but for {what}: {remedy}.")
    return " ".join(reasons)


def warn_about_line_markers(name: str, lines: Sequence[str]) -> None:
    """Warns of a marker that begins or ends every line of the training split, in addition to the added `<eos>`.

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
    """Logs a warning on the first process only, since every process reads the text."""
    if os.environ.get("RANK", "0") == "0":  # as torchrun and accelerate set it
        logger.warning(message, *args)
