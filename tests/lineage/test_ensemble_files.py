"""An ensemble on disk: read back as written, refused where it leads elsewhere or was changed, and its card."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from lineage_folders import copy, inputs, lineage, members, network

from born_again import LineageEnsemble
from born_again.hub.model_card import ensemble_card
from born_again.lineage.manifest import LineageError, Manifest, file_sha256


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A teacher and three students; read only."""
    root = tmp_path_factory.mktemp("lineages")
    return {kind: lineage(root / kind, [network(kind, seed) for seed in range(4)]) for kind in ("image", "lstm")}


# ---- On disk ----


@pytest.mark.parametrize("kind", ["image", "lstm"])
def test_what_is_written_down_is_read_back(folders, kind, tmp_path):
    folder = copy(folders[kind], tmp_path / "lineage")
    for average in ("logits", "probabilities"):
        ensemble = LineageEnsemble.from_lineage(folder, "3,1", average)
        ensemble.save_pretrained(folder / "ensemble", write_card=ensemble_card)
        for sequential in (False, True):
            again = LineageEnsemble.from_pretrained(folder / "ensemble", sequential)
            assert (members(again), again.average) == ([3, 1], average)
            assert torch.equal(again(inputs(kind)).logits, ensemble(inputs(kind)).logits)
    hashes = {index: file_sha256(folder / f"gen{index}/model.safetensors") for index in (3, 1)}
    assert json.loads((folder / "ensemble/ensemble.json").read_text()) == {
        "format": "born_again.ensemble",
        "version": 1,
        "average": "probabilities",
        "members": [
            {"generation": index, "weights_sha256": sha256, "folder": f"../gen{index}"}
            for index, sha256 in hashes.items()
        ],
    }
    assert sorted(path.name for path in (folder / "ensemble").iterdir()) == ["README.md", "ensemble.json"]


@pytest.fixture
def written(folders, tmp_path) -> Path:
    folder = copy(folders["lstm"], tmp_path / "lineage")
    LineageEnsemble.from_lineage(folder).save_pretrained(folder / "ensemble")
    return folder / "ensemble"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "born_again.lineage"}, "'format' is 'born_again.lineage', expected 'born_again.ensemble'"),
        ({"version": 2}, "has version 2, this born_again reads up to 1; upgrade it"),
        ({"version": True}, "'version' is True, expected a whole number above 0"),
        ({"average": ["logits"]}, r"'average' is \['logits'\], expected 'probabilities' or 'logits'"),
        ({"members": []}, r"'members' is \[\], expected a list that is not empty"),
        ({"members": ["../gen1"]}, r"'members\[0\]' is '../gen1', expected an object"),
        ({"generation": "1"}, r"'members\[1\].generation' is '1', expected a whole number from 0 on"),
        ({"generation": -1}, r"'members\[1\].generation' is -1, expected a whole"),
        ({"generation": True}, r"'members\[1\].generation' is True, expected a whole"),
        ({"generation": 1, "folder": "../gen1"}, r"'members\[1\].generation' is 1, expected .* each once"),
        ({"folder": "../gen3"}, r"'members\[1\].folder' is '../gen3', expected '../gen2'"),
        ({"folder": "../../gen2"}, r"'members\[1\].folder' is '../../gen2', expected '../gen2'"),
        ({"folder": "/gen2"}, r"'members\[1\].folder' is '/gen2', expected"),
        ({"folder": "owner/name"}, r"'members\[1\].folder' is 'owner/name', expected"),
        ({"folder": None}, r"'members\[1\].folder' is None, expected"),
        ({"weights_sha256": "AB"}, r"'members\[1\].weights_sha256' is 'AB', expected a SHA-256"),
        ({"weights_sha256": None}, r"'members\[1\].weights_sha256' is None, expected a SHA-256"),
        ({"weights_sha256": "0" * 64}, r"gen2.model.safetensors: does not match the recorded hash of generation 2"),
        (
            {"generation": 9, "folder": "../gen9"},
            r"gen9.model.safetensors: is missing, expected the weights of a member",
        ),
    ],
)
def test_a_field_that_is_wrong_is_named_and_nothing_elsewhere_is_opened(written, change, message):
    content = json.loads((written / "ensemble.json").read_text())
    of_member = change.keys() <= {"generation", "folder", "weights_sha256"}
    (content["members"][1] if of_member else content).update(change)
    (written / "ensemble.json").write_text(json.dumps(content))
    with pytest.raises(LineageError, match=message):
        LineageEnsemble.from_pretrained(written)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 200_000, b'{"version": ' + b"1" * 5000 + b"}"])
def test_what_is_no_json_is_refused(written, text):
    (written / "ensemble.json").write_bytes(text)
    with pytest.raises(LineageError, match="ensemble.json: is not JSON .* restore it from a copy"):
        LineageEnsemble.from_pretrained(written)


def test_json_of_something_else_or_nothing_at_all(written):
    (written / "ensemble.json").write_text("[]")
    with pytest.raises(LineageError, match=r"is \[\], expected an object"):
        LineageEnsemble.from_pretrained(written)
    (written / "ensemble.json").unlink()
    with pytest.raises(FileNotFoundError, match="folder: .* has no ensemble.json, expected what .*save_pretrained"):
        LineageEnsemble.from_pretrained(written)


def test_links_are_not_followed(written, tmp_path):
    root = written.parent
    weights, elsewhere = root / "gen1/config.json", tmp_path / "elsewhere"
    weights.rename(elsewhere)
    weights.symlink_to(elsewhere)
    (root / "gen2").rename(tmp_path / "gen2")
    (root / "gen2").symlink_to(tmp_path / "gen2")
    for index, name in ((1, "gen1.config.json"), (2, "gen2")):
        with pytest.raises(LineageError, match=f"{name}: is a link, expected a file or folder; put a copy"):
            LineageEnsemble.from_lineage(root, [index])
    (written / "ensemble.json").rename(tmp_path / "ensemble.json")
    (written / "ensemble.json").symlink_to(tmp_path / "ensemble.json")
    with pytest.raises(LineageError, match="ensemble.json: is a link"):
        LineageEnsemble.from_pretrained(written)


@pytest.mark.parametrize("sequential", [False, True])
def test_weights_that_changed_are_refused(written, sequential):
    root = written.parent
    known = LineageEnsemble.from_pretrained(written, sequential)
    network("lstm", 9).save_pretrained(root / "gen3")
    for make in (LineageEnsemble.from_lineage, lambda _: LineageEnsemble.from_pretrained(written)):
        with pytest.raises(LineageError, match="gen3.model.safetensors: does not match the recorded hash of generat"):
            make(root)
    if sequential:
        with pytest.raises(LineageError, match="does not match"):
            known(inputs("lstm"))
    manifest = Manifest.read(root)
    manifest.update(3, weights_sha256=file_sha256(root / "gen3/model.safetensors"))
    manifest.save()
    assert members(LineageEnsemble.from_lineage(root)) == [1, 2, 3]
    with pytest.raises(LineageError, match="members: .*lineage.json does not have generation 3 with the weights"):
        known.save_pretrained(root / "another")


def test_it_is_written_beside_its_members_and_over_nothing_else(written, tmp_path):
    root = written.parent
    ensemble = LineageEnsemble.from_pretrained(written)
    (tmp_path / "out").mkdir()
    (root / "out").symlink_to(tmp_path / "out")
    for folder in (tmp_path / "ensemble", root, root / "gen1", root / "gen7", root / "ensemble/deeper", root / "out"):
        with pytest.raises(LineageError, match="folder: got .*, expected a folder of its own beside its members in"):
            ensemble.save_pretrained(folder)
    (root / "notes").mkdir()
    (root / "notes/README.md").write_text("mine")
    (root / "file").write_text("mine")
    for folder in (root / "notes", root / "file"):
        with pytest.raises(LineageError, match="holds something that is no ensemble .* nothing in it was touched"):
            ensemble.save_pretrained(folder)
    assert (root / "notes/README.md").read_text() == (root / "file").read_text() == "mine"
    assert not list((tmp_path / "out").iterdir()) and not (root / "gen7").exists()
    (root / "empty").mkdir()
    ensemble.save_pretrained(root / "empty")
    assert members(LineageEnsemble.from_pretrained(root / "empty")) == [1, 2, 3]


# ---- The card ----


def test_the_card_says_what_the_ensemble_is(written):
    root = written.parent
    ensemble = LineageEnsemble.from_lineage(root, "0,3", "logits")
    ensemble.save_pretrained(written, {"test": {"nll": 1.25, "perplexity": None, "tokens": 12_345}}, ensemble_card)
    text = (written / "README.md").read_text()
    card = ModelCard(text)
    held = card.data.to_dict()
    results = held.pop("model-index")[0]["results"]
    assert [metric["value"] for metric in results[0]["metrics"]] == [1.25]
    assert held == {
        "library_name": "born_again",
        "pipeline_tag": "text-generation",
        "tags": ["born-again-networks", "knowledge-distillation", "ensemble", "text-generation"],
        "born_again": {
            "members": [0, 3],
            "average": "logits",
            "weights_sha256": [member.weights_sha256 for member in ensemble.members],
        },
    }
    lines = card.text.splitlines()
    assert "# tiny, ensemble of gen0, gen3" in lines and "The mean of the logits (equation 4" in text
    assert [line for line in lines if line.startswith("- ")] == [
        "- gen0: label, seed 42",
        "- gen3: ban+l, seed 45",
        "- test nll: 1.2500",
        "- test perplexity: not finite",
        "- test tokens: 12,345",
        "- gen0: CPU; 1 seconds of training",
        "- gen3: CPU; 1 seconds of training",
    ]


@pytest.mark.parametrize("kind", ["image", "lstm"])
def test_the_example_of_the_card_runs(folders, kind, tmp_path):
    folder = copy(folders[kind], tmp_path / "lineage")
    ensemble = LineageEnsemble.from_lineage(folder)
    ensemble.save_pretrained(folder / "ensemble", write_card=ensemble_card)
    text = (folder / "ensemble/README.md").read_text()
    assert "Not measured." in text
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder / "ensemble"), 1)
    names = {"pixel_values" if kind == "image" else "input_ids": inputs(kind)}
    exec(code, names)
    assert torch.equal(names["logits"], ensemble(inputs(kind)).logits)


def test_text_of_users_stays_text_on_the_card(folders):
    content = Manifest.read(folders["image"]).content
    harm = "<script>\n---\n# *x*"
    content = {**content, "name": harm, "spec": {**content["spec"], "dataset": harm, "model": harm}}
    record = {"members": [1, 2], "average": "probabilities", "metrics": {}}
    card, plain = ensemble_card(content, record), ensemble_card(Manifest.read(folders["image"]).content, record)
    assert len(card.splitlines()) == len(plain.splitlines()) and "<script" not in card
    assert card.count(r"&lt;script&gt; --- # \*x\*") == 4
    assert ModelCard(card).data.to_dict() == ModelCard(plain).data.to_dict()
    assert ModelCard(card).data.pipeline_tag == "image-classification"
