"""Unknown tokens of each split: counted, recorded, and warned of with their cause."""

import json
import logging
import unicodedata

import pytest

from born_again.data.grammar import EOS
from born_again.data.text import load_text

TRAIN = "le café noir <unk> dort\nun élève dort là\n<unk> là\n" * 4


@pytest.fixture(autouse=True)
def warnings(caplog):
    caplog.set_level(logging.WARNING, "born_again.data")


def write(folder, train=TRAIN, valid=TRAIN, test=TRAIN):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_decomposed_accents_in_one_split_are_counted_and_named(tmp_path, caplog):
    data = load_text(write(tmp_path, test=unicodedata.normalize("NFD", TRAIN)))
    words = [word for line in TRAIN.splitlines() for word in (*line.split(), EOS)]
    accented = sum(any(ord(letter) > 127 for letter in word) for word in words)
    assert data.coverage == {
        "train": {"unknown": 0.0, "untrained": 0.0},
        "validation": {"unknown": 0.0, "untrained": 0.0},
        "test": {"unknown": accented / len(words), "untrained": 0.0},
    }
    assert json.loads(json.dumps(data.coverage)) == data.coverage
    (record,) = caplog.records
    assert f"{accented / len(words):.1%} of the tokens of the split 'test' ({accented})" in record.message
    assert f"{accented} of them are there but for Unicode normalisation (NFC or NFD)" in record.message
    assert "unicodedata.normalize('NFC', text)" in record.message and "capitals" not in record.message


def test_the_unk_of_the_text_itself_is_no_unknown_word(tmp_path, caplog):
    """As in Penn Treebank, where 5 of 100 words are <unk> as they are written."""
    data = load_text(write(tmp_path, test="<unk> <unk> <unk> dort\n"))
    assert all(own["unknown"] == 0 for own in data.coverage.values())
    assert not caplog.records


def test_few_unknown_words_are_recorded_and_not_warned_of(tmp_path, caplog):
    data = load_text(write(tmp_path, test=TRAIN * 3 + "zébu\n"))
    assert 0 < data.coverage["test"]["unknown"] < 0.03
    assert not caplog.records


def test_capitals_and_other_languages(tmp_path, caplog):
    load_text(write(tmp_path, valid=TRAIN.upper().replace("<UNK>", "<unk>"), test="der schwarze Kaffee\n"))
    capitals, other = (record.message for record in caplog.records)
    assert "split 'validation'" in capitals and "but for capitals: lower-case every split or none" in capitals
    assert "split 'test'" in other and "in the same language?" in other and "'der'" in other


def test_words_that_a_cut_training_split_never_shows(tmp_path):
    cut = load_text(write(tmp_path, test="le là là\n"), max_train_samples=4)  # le café noir <unk>
    assert cut.coverage["test"] == {"unknown": 0.0, "untrained": 0.75}
    assert cut.coverage["train"] == {"unknown": 0.0, "untrained": 0.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [("{} </s>", "'</s>' ends 3 of 3 lines"), ("<s> {}", "'<s>' begins 3 of 3 lines"), ("{} <eos>", "'<eos>' ends")],
)
def test_lines_that_are_marked_twice_are_warned_of(tmp_path, caplog, line, message):
    text = "".join(line.format(words) + "\n" for words in ("a b", "b c", "c a"))
    load_text(write(tmp_path, text, text, text))
    (record,) = caplog.records
    assert message in record.message and "remove" in record.message


def test_lines_that_end_with_a_stop_or_an_unknown_word_are_not(tmp_path, caplog):
    text = "a <unk> .\nb .\n"
    load_text(write(tmp_path / "stop", text, text, text))
    text = "a <unk>\nb <unk>\n"
    load_text(write(tmp_path / "unk", text, text, text))
    assert not caplog.records


def test_only_the_first_process_warns(tmp_path, caplog, monkeypatch):
    folder = write(tmp_path, test=unicodedata.normalize("NFD", TRAIN))
    monkeypatch.setenv("RANK", "1")
    load_text(folder)
    assert not caplog.records


def test_a_folder_hidden_behind_an_embedded_name_is_said_aloud(tmp_path, caplog, monkeypatch):
    write(tmp_path / "grammar")
    monkeypatch.chdir(tmp_path)
    assert load_text("grammar").entropy_per_word is not None
    assert "is embedded, and not the folder of that name here, which is --dataset './grammar'" in caplog.text
    caplog.clear()
    assert load_text("./grammar").entropy_per_word is None
    assert not caplog.records
