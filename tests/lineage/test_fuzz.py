"""Whatever stands in lineage.json, ensemble.json or config.json, the answer is a reading or an error of ours."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import content, record, training

from born_again.lineage.manifest import LineageError, Manifest
from born_again.lineage.members import read_ensemble

WORDS = ["the", "cat", "<eos>", "sat", "<unk>"]
NUMBERS = [0, -1, 1, 2, 3, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
TEXTS = ["", "0", "../../x", "/etc/passwd", "a" * 64, "a" * 1000, "\ud800", "\x00", "float16", "gpt2", "finished"]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from([[], {}, [[]], [None], [1, 2], {"a": {}}, {"0": "a"}, [[[["x"]]]], ["../../x"]]),
    st.integers(),
    st.text(max_size=5),
)


def many(count):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def places(value, path=()):
    """Every place in a JSON value, the whole first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def mutations(draw, original):
    """A JSON text with one to three values replaced, taken out, renamed or written twice."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            value = copy.deepcopy(draw(JUNK)) if draw(st.integers(0, 9)) == 0 else value
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key, what = path[-1], draw(st.sampled_from(["replace", "replace", "delete", "rename", "copy"]))
        if what == "delete":
            del parent[key]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=3))] = parent.pop(key)
        elif what == "copy" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(draw(JUNK))
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def damages(draw, original: bytes):
    """Bytes of which some were overwritten, lost, repeated or added."""
    raw = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(raw) - 1, 0)))
        part = slice(start, start + draw(st.integers(0, 40)))
        raw[part] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(raw[part]) * 2), st.just(b"[" * 5000)))
    return bytes(raw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def answer(folder: Path, raw: bytes) -> None:
    """A manifest that can be used and written again, or a LineageError that names the file; nothing else."""
    path = folder / "lineage.json"
    path.write_bytes(raw)
    try:
        manifest = Manifest.read(folder)
    except LineageError as error:
        assert str(path) in str(error) and len(str(error)) < 10_000
        str(error).encode()  # it can be printed
        return
    assert manifest.spec.name == manifest.content["name"] and "/" not in manifest.spec.name
    for index, known in enumerate(manifest.generations):
        assert known["index"] == index and known["seconds"] >= 0 and known["objective"]
        assert known["status"] == "training" or len(known["weights_sha256"]) == 64
    manifest.save()
    assert Manifest.read(folder).content == manifest.content


HUB = {"status": "published", "repo": "a/b-gen0", "commit": "1" * 40, "message": None, "card_sha256": "2" * 64}
MANIFEST = content(
    record(0, hub=HUB),
    record(1, checkpoints=["checkpoint-2"]),
    training(2),
    hub={"namespace": "a", "pattern": "{name}-gen{index}", "private": False, "ensemble": HUB, "newest": "a/b-gen0"},
    ensembles=[
        {"members": [0, 1], "average": "probabilities", "weights_sha256": ["0" * 64, "1" * 64], "metrics": {}},
    ],
    restart={"from_generation": 1},
)
RAW = json.dumps(MANIFEST, indent=2).encode()


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("texts", [mutations(MANIFEST), damages(RAW)], ids=["values", "bytes"])
def test_any_manifest_is_read_or_refused(folder, texts, count):
    many(count)(given(texts)(lambda raw: answer(folder, raw)))()


def test_the_mutations_reach_both_answers(folder):
    """Else the test above would hold for a reader that refuses everything."""
    found = set()

    def read(raw):
        (folder / "lineage.json").write_bytes(raw)
        try:
            Manifest.read(folder)
        except LineageError:
            found.add("refused")
        else:
            found.add("read")

    many(100)(given(mutations(MANIFEST))(read))()
    assert found == {"read", "refused"}


ENSEMBLE = {
    "format": "born_again.ensemble",
    "version": 1,
    "average": "probabilities",
    "members": [
        {
            "generation": index,
            "folder": f"../gen{index}",
            "weights_sha256": f"{index}" * 64,
            "repo": f"a/b-gen{index}",
            "commit": "c" * 40,
        }
        for index in (1, 2)
    ],
}


def names_members_or_refuses(folder: Path, raw: bytes, from_hub: bool) -> None:
    """Members in the folders beside it, or in plain repositories; never a path that leads elsewhere."""
    path = folder / "ensemble.json"
    path.write_bytes(raw)
    try:
        members, average = read_ensemble(path, from_hub)
    except LineageError as error:
        assert str(path) in str(error) and len(str(error)) < 10_000
        str(error).encode()
        return
    assert average in ("probabilities", "logits") and members
    for member in members:
        assert type(member.generation) is int and member.generation >= 0 and len(member.weights_sha256) == 64
        assert not from_hub or (member.repo.count("/") == 1 and ".." not in member.repo and len(member.commit) == 40)


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("from_hub", [False, True])
@pytest.mark.parametrize("how", [mutations, damages], ids=["values", "bytes"])
def test_any_ensemble_is_read_or_refused(tmp_path, how, from_hub, count):
    texts = how(ENSEMBLE if how is mutations else json.dumps(ENSEMBLE).encode())
    many(count)(given(texts)(lambda raw: names_members_or_refuses(tmp_path, raw, from_hub)))()


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """Folders of untrained models, as a lineage leaves them."""
    import torch

    from born_again.models.image_classifier import create_image_classifier, save_image_classifier
    from born_again.models.language_models import create_language_model

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("generations")
    create_language_model("test-lstm", WORDS).save_pretrained(root / "lstm")
    image = create_image_classifier("test_wide_resnet_cifar", ["a", "b"], [0.5] * 3, [0.25] * 3)
    save_image_classifier(image, root / "image")
    return root


def loads_or_refuses(folder: Path, raw: bytes) -> None:
    from torch import nn

    import born_again

    (folder / "config.json").write_bytes(raw)
    try:
        model = born_again.load_generation(folder)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error)
        return
    assert isinstance(model, nn.Module) and not model.training


@pytest.mark.parametrize("count", [25, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", [mutations, damages], ids=["values", "bytes"])
@pytest.mark.parametrize("kind", ["lstm", "image"])
def test_any_configuration_loads_or_is_refused(generations, tmp_path, kind, how, count):
    folder = tmp_path / kind
    shutil.copytree(generations / kind, folder)
    raw = (folder / "config.json").read_bytes()
    given_texts = mutations(json.loads(raw)) if how is mutations else damages(raw)
    many(count)(given(given_texts)(lambda text: loads_or_refuses(folder, text)))()
