"""Reading a corpus: files, columns, vocabulary, what is said when something is amiss; the tokenizer and its folder."""

import json
import logging
import subprocess
import sys
import unicodedata
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from born_again.data.grammar import grammar_corpus, grammar_entropy
from born_again.data.text import load_text, vocabulary_of, word_tokenizer

TRAIN = " the cat sat \n the <unk> sat on N mats \n mr. smith 's u.s. mats do n't \n"
VALID = " the dog sat \n"
TEST = " N mats \n $ N \n"
GRAMMAR_SHA256 = "1271a399518ac2adce208a55daf358619262f9120a3f64b3a302c5fc8be66090"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder: Path, train=TRAIN, valid=VALID, test=TEST, names=("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (train, valid, test), strict=True):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def words(data, split: str) -> list[str]:
    return data.tokenizer.convert_ids_to_tokens(getattr(data, split).tolist())


def test_folder_of_text_files(tmp_path):
    data = load_text(str(write(tmp_path / "ptb")))
    assert words(data, "train") == TRAIN.replace("\n", "<eos>").split()
    assert words(data, "validation") == ["the", "<unk>", "sat", "<eos>"]
    assert words(data, "test") == ["N", "mats", "<eos>", "<unk>", "N", "<eos>"]
    assert data.train.dtype == data.test.dtype == torch.int64 and data.train.dim() == 1
    assert data.entropy_per_word is None
    # By falling count, then first appearance.
    order = ["<eos>", "the", "sat", "mats", "cat", "<unk>", "on", "N", "mr.", "smith", "'s", "u.s.", "do", "n't"]
    assert vocabulary_of(data.tokenizer) == order
    assert data.fingerprint["tokens"] == {"train": 19, "validation": 4, "test": 6}
    assert data.fingerprint["vocabulary"] == 14


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("train.txt", "validation.txt", "test.txt"),
        ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"),
    ],
)
def test_other_names_of_the_files_read_the_same(tmp_path, names):
    plain = load_text(write(tmp_path / "ptb")).fingerprint
    folder = write(tmp_path / "other", names=names)
    (folder / "README").write_text("about")
    (folder / "ptb.char.train.txt").write_text("t h e")
    assert load_text(folder).fingerprint == plain


def test_fingerprint_tells_data_apart(tmp_path):
    first = load_text(write(tmp_path / "a")).fingerprint
    assert json.loads(json.dumps(first)) == first
    other = load_text(write(tmp_path / "b", test=" N mats \n N $ \n")).fingerprint
    assert other["tokens"] == first["tokens"] and other["sha256"] != first["sha256"]
    # The same ids, of other words.
    renamed = load_text(write(tmp_path / "c", train=TRAIN.replace("cat", "cow"))).fingerprint
    assert renamed["tokens"] == first["tokens"] and renamed["sha256"] != first["sha256"]


def test_lines_are_those_of_newlines_only(tmp_path):
    folder = write(tmp_path / "f", train="\ufeffa b\r\n\r\na\u2028b\x0cc\n", valid="a", test="b\n\n")
    data = load_text(folder)
    assert words(data, "train") == ["a", "b", "<eos>", "<eos>", "a", "b", "c", "<eos>"]
    assert words(data, "validation") == ["a", "<eos>"]
    assert words(data, "test") == ["b", "<eos>", "<eos>"]


def test_limits_keep_the_first_tokens_and_the_vocabulary(tmp_path):
    folder = write(tmp_path / "ptb")
    whole, cut = load_text(folder), load_text(folder, max_train_samples=5, max_eval_samples=4)
    assert torch.equal(cut.train, whole.train[:5])
    assert (len(cut.validation), len(cut.test)) == (4, 4)
    assert vocabulary_of(cut.tokenizer) == vocabulary_of(whole.tokenizer)
    assert load_text(folder, max_train_samples=10_000).fingerprint == whole.fingerprint


def test_unknown_word_without_unk(tmp_path):
    folder = write(tmp_path / "f", train="a b\n", valid="a\nb\nb zebra a\n", test="a\n")
    with pytest.raises(ValueError, match="word 'zebra' in line 3 of the split 'validation'.*no '<unk>'.*write <unk>"):
        load_text(folder)


def test_a_text_without_unk_in_another_unicode_normalisation_is_refused_by_its_name(tmp_path):
    text = "un café là\n"
    folder = write(tmp_path, train=text, valid=text, test=unicodedata.normalize("NFD", text))
    with pytest.raises(ValueError, match=r"2 of its 4 tokens are not.* 2 of them are there but for Unicode normalisa"):
        load_text(folder)


def test_another_preparation_of_ptb_is_a_warning(tmp_path, caplog):
    folder = write(tmp_path / "ptb")
    with caplog.at_level(logging.WARNING, "born_again.data.text"):
        load_text(folder)
    assert "'train': 19" in caplog.text and "'train': 929589" in caplog.text and "cannot be compared" in caplog.text
    caplog.clear()
    load_text(folder, max_eval_samples=3)
    load_text(write(tmp_path / "own", names=("train.txt", "valid.txt", "test.txt")))
    assert "Penn Treebank" not in caplog.text


def test_embedded_grammar():
    data = load_text("grammar")
    assert data.entropy_per_word == grammar_entropy()
    assert data.fingerprint == {
        "tokens": {"train": 60_004, "validation": 6_005, "test": 6_001},
        "vocabulary": 151,
        "sha256": GRAMMAR_SHA256,
        "entropy_per_word": 1.638991,
    }
    eos = data.tokenizer.eos_token_id
    for split, lines in grammar_corpus().items():
        encoded = [number for ids in data.tokenizer(lines)["input_ids"] for number in (*ids, eos)]
        assert encoded == getattr(data, split).tolist()
    assert load_text("grammar").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_train_samples": 0}, "--max_train_samples is 0; expected at least 1"),
        ({"max_eval_samples": -2}, "--max_eval_samples is -2; expected at least 1"),
        ({"revision": "main"}, "revision is 'main' for --dataset 'grammar', which is embedded: drop it"),
        ({"text_column": "text"}, "text_column is 'text' for --dataset 'grammar', which is embedded: drop it"),
        ({"dataset": "gramar"}, "--dataset is 'gramar'; expected 'grammar', 'ptb', a folder, or 'owner/name'"),
        ({"dataset": "./nowhere"}, "'./nowhere'; expected .*there is no such folder"),
        ({"dataset": Path("owner/name")}, "'owner/name'; expected .*there is no such folder"),
    ],
)
def test_refused_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        load_text(**{"dataset": "grammar", **change})


def test_refused_folders(tmp_path):
    folder = write(tmp_path / "f")
    with pytest.raises(ValueError, match="revision is 'main' .* is a folder, not a dataset on the Hub: drop it"):
        load_text(folder, revision="main")
    with pytest.raises(ValueError, match="text_column is 'text' .* plain text without columns: drop it"):
        load_text(folder, text_column="text")
    (folder / "ptb.validation.txt").write_text("a")
    with pytest.raises(ValueError, match="ptb.valid.txt, ptb.validation.txt; expected one file for each.*move"):
        load_text(folder)
    write(tmp_path / "two", names=("train.txt", "valid.txt", "test.txt"))
    with pytest.raises(ValueError, match="ptb.test.txt, .*valid.txt; expected one file for each.*move"):
        load_text(write(tmp_path / "two"))
    (folder / "ptb.train.txt").unlink()
    with pytest.raises(
        ValueError, match="holds ptb.test.txt, ptb.valid.txt, .*; expected train.txt, valid.txt .*test"
    ):
        load_text(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder that holds nothing; expected train.txt"):
        load_text(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_split_without_words(tmp_path, text):
    with pytest.raises(ValueError, match="split 'test' is empty; expected words: check its file"):
        load_text(write(tmp_path / "f", test=text))


def test_other_encodings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ptb.valid.txt' is not UTF-8 .*convert it"):
        load_text(write(tmp_path / "f", valid="caf\u00e9".encode("latin-1")))


def tables(train=TRAIN, column="sentence", **more) -> datasets.DatasetDict:
    def table(text):
        lines = text.splitlines()
        return datasets.Dataset.from_dict({column: lines, "number": list(range(len(lines)))} | more)

    return datasets.DatasetDict(train=table(train), validation=table(VALID), test=table(TEST))


def write_parquet(folder: Path, splits: datasets.DatasetDict, name="{split}/0000.parquet") -> Path:
    for split, table in splits.items():
        path = folder / name.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(path))
    return folder


def test_tables_read_like_text_files(tmp_path):
    plain = load_text(write(tmp_path / "ptb")).fingerprint
    # As the Hub's own conversion of Penn Treebank is laid out.
    converted = write_parquet(tmp_path / "parquet", tables(), "penn_treebank/{split}/0000.parquet")
    assert load_text(converted).fingerprint == plain
    lines = tmp_path / "lines"
    lines.mkdir()
    for split, table in tables(column="text").items():
        table.to_json(str(lines / f"{split}.jsonl"))
    assert load_text(str(lines)).fingerprint == plain
    tables().save_to_disk(str(tmp_path / "saved"))
    assert load_text(tmp_path / "saved", text_column="sentence").fingerprint == plain


def test_rows_may_hold_newlines(tmp_path):
    splits = tables()
    splits["train"] = datasets.Dataset.from_dict({"sentence": ["a <unk>\n", "", "b\nc"], "number": [0, 1, 2]})
    data = load_text(write_parquet(tmp_path / "f", splits))
    assert words(data, "train") == ["a", "<unk>", "<eos>", "<eos>", "b", "<eos>", "c", "<eos>"]


def test_refused_tables(tmp_path):
    two = tables()
    for split in two:
        two[split] = two[split].add_column("title", ["x"] * len(two[split]))
    folder = write_parquet(tmp_path / "two", two)
    match = (
        r"--text_column is None; .*\['sentence', 'number', 'title'\].*\['sentence', 'title'\] hold strings: name one"
    )
    with pytest.raises(ValueError, match=match):
        load_text(folder)
    assert load_text(folder, text_column="sentence").fingerprint["vocabulary"] == 14
    with pytest.raises(ValueError, match="--text_column is 'number'.* hold strings"):
        load_text(folder, text_column="number")
    missing = tables()
    del missing["validation"]
    with pytest.raises(ValueError, match="has the splits train, test; expected .* so validation is missing: rename"):
        load_text(write_parquet(tmp_path / "missing", missing))
    hole = tables()
    hole["test"] = datasets.Dataset.from_dict({"sentence": ["a", None], "number": [0, 1]})
    with pytest.raises(ValueError, match="column 'sentence' of the split 'test' has no text in row 1; expected a str"):
        load_text(write_parquet(tmp_path / "hole", hole))
    broken = write_parquet(tmp_path / "broken", tables())
    (broken / "train/0000.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is refused by `datasets` .*; expected readable tables"):
        load_text(broken)


def test_no_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'ptb' is not in the local cache.*`--dataset grammar`.*with a folder"):
        load_text("ptb")


def test_hub_ids_and_revisions(monkeypatch, caplog):
    asked = []

    def load(source, revision):
        asked.append((source, revision))
        if source == "a/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        if source == "no/where":
            raise datasets.exceptions.DatasetNotFoundError("no such dataset")
        return tables()

    monkeypatch.setattr(datasets, "load_dataset", load)
    load_text("ptb")
    assert "is Penn Treebank by its name" in caplog.text
    load_text("ptb-text-only/ptb_text_only", revision="v2")
    load_text("owner/name")
    with pytest.raises(ValueError, match="scripts are no longer supported.*try the revision 'refs/convert/parquet'"):
        load_text("a/script")
    with pytest.raises(ValueError, match="'no/where' is neither a folder here nor a dataset on the Hub.*spelling"):
        load_text("no/where")
    ptb = "ptb-text-only/ptb_text_only"
    assert asked[:3] == [(ptb, "refs/convert/parquet"), (ptb, "v2"), ("owner/name", None)]


def test_tokenizer_keeps_words_whole_and_special_words_in_place(tmp_path):
    data = load_text(write(tmp_path / "ptb"))
    tokenizer = data.tokenizer
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    ids = [number for line in TRAIN.splitlines() for number in (*tokenizer.encode(line), tokenizer.eos_token_id)]
    assert ids == data.train.tolist()
    middle = tokenizer.encode("N <unk> of <eos>")
    assert middle[1:] == [tokenizer.unk_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id]
    assert tokenizer.encode("The u.s . x<unk>") == [tokenizer.unk_token_id] * 4
    padded = tokenizer(["the cat sat", "N"], padding=True)
    assert padded["input_ids"][1][1:] == [tokenizer.eos_token_id] * 2
    assert padded["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert set(padded) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("end", ["", "\n"])
def test_tokenizer_reads_a_file_as_its_ids_were_made(tmp_path, end):
    """Every newline is <eos>, and white space is Python's."""
    text = "the cat\tsat\n\n on\u00a0the <unk>\x1cmat \r\n<eos> N\x1f.\u2003N" + end
    data = load_text(write(tmp_path / "f", train=text, valid=text, test=text))
    data.tokenizer.save_pretrained(tmp_path / "saved")
    for tokenizer in (data.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        found = tokenizer.encode(text)
        assert (found if end else [*found, tokenizer.eos_token_id]) == data.train.tolist()


def test_tokenizer_without_unk_refuses_other_words():
    tokenizer = word_tokenizer(["a", "<eos>"])
    assert tokenizer.unk_token is None and len(tokenizer) == 2
    with pytest.raises(Exception, match="Missing .UNK. token"):
        tokenizer.encode("b")
    assert word_tokenizer(["x<unk>y", "<unk>", "<eos>"]).encode("x<unk>y <unk>") == [0, 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["a", "b"], "words lacks '<eos>'; expected different words"),
        (["a", "<eos>", "a"], "words holds 'a', which is repeated"),
        (["a b", "<eos>"], "words holds 'a b', which is"),
        (["", "<eos>"], "words holds '', which is"),
    ],
)
def test_refused_words(bad, message):
    with pytest.raises(ValueError, match=message):
        word_tokenizer(bad)


@pytest.mark.slow
def test_tokenizer_loads_in_a_fresh_interpreter(tmp_path):
    """Without born_again, beside no config.json and beside one of a model that transformers does not know."""
    tokenizer = load_text(write(tmp_path / "ptb")).tokenizer
    for folder in ("alone", "model"):
        tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "lstm_lm", "architectures": ["LstmLM"]}')
    text = " mr. smith <unk> <eos> u.s. mats do n't zebra "
    code = """
import json, sys
from transformers import AutoTokenizer
found = []
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(sys.argv[1])
    found.append([ids, tokenizer.decode(ids), tokenizer.pad_token, len(tokenizer)])
assert "born_again" not in sys.modules
print(json.dumps(found))
"""
    folders = [str(tmp_path / "alone"), str(tmp_path / "model")]
    done = subprocess.run([sys.executable, "-c", code, text, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = tokenizer.encode(text)
    assert json.loads(done.stdout) == [[ids, "mr. smith <unk> <eos> u.s. mats do n't <unk>", "<eos>", 14]] * 2
