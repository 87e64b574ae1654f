"""model_cards/: every card is what its lineage.json renders, and the index has its numbers."""

import shutil
from pathlib import Path

import pytest

from born_again.hub.files import render_cards
from born_again.lineage.manifest import Manifest

CARDS = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/lineage.json"))


def shown(metrics: dict) -> str:
    test = metrics["test"]
    return f"{test['perplexity']:.2f}" if "perplexity" in test else f"{100 * test['accuracy']:.2f} %"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_cards_are_rendered_from_the_lineage_beside_them(folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / folder.name))
    before = {path.relative_to(own): path.read_bytes() for path in own.rglob("*") if path.is_file()}
    for card in own.glob("*/README.md"):
        card.unlink()
    written = render_cards(own)
    assert {path.relative_to(own): path.read_bytes() for path in own.rglob("*") if path.is_file()} == before
    records = Manifest.read(own).generations
    assert {path.parent.name for path in written} >= {f"gen{record['index']}" for record in records}
    assert all(len(content) < 200_000 for content in before.values()), "records and cards, no weights"

    (line,) = [line for line in (CARDS / "README.md").read_text().splitlines() if f"[{folder.name}](" in line]
    assert f"({folder.name}/gen{len(records) - 1}/README.md)" in line
    assert [shown(records[0]["metrics"]), shown(records[-1]["metrics"])] == [
        cell.strip() for cell in line.split("|")[3:5]
    ]


def test_there_are_cards_and_each_folder_has_its_lineage():
    assert FOLDERS == sorted(path for path in CARDS.iterdir() if path.is_dir())
    assert FOLDERS


def test_a_missing_folder_of_a_generation_is_named(tmp_path):
    own = Path(shutil.copytree(FOLDERS[0], tmp_path / "copy"))
    shutil.rmtree(own / "gen1")
    with pytest.raises(FileNotFoundError, match="gen1: is missing, expected the folder of generation 1; put it back"):
        render_cards(own)
    assert not (own / "gen1").exists()
