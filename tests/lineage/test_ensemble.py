"""An ensemble of generations is the mean of its members: in memory or one by one, and measured as one of them."""

import math
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lineage_folders import LABELS, WORDS, inputs, lineage, members, network

import born_again
from born_again import LineageEnsemble, load_generation
from born_again.data.streams import TokenStreams
from born_again.lineage import ensemble as ensemble_module
from born_again.lineage.evaluation import evaluate_classifier, evaluate_language_model
from born_again.lineage.manifest import LineageError
from born_again.lineage.members import Member
from born_again.teacher import carries_state

KINDS = ["image", "lstm", "gpt2"]
GENERATIONS = 4


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A teacher and three students of each kind; read only."""
    root = tmp_path_factory.mktemp("lineages")
    return {kind: lineage(root / kind, [network(kind, seed) for seed in range(GENERATIONS)]) for kind in KINDS}


@torch.no_grad()
def by_hand(folder: Path, indices, average: str, x: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, or logits, of members loaded one by one, in float64."""
    x = x.double() if x.is_floating_point() else x
    outputs = [load_generation(folder / f"gen{index}").double()(x).logits for index in indices]
    if average == "logits":
        return sum(outputs) / len(outputs)
    return (sum(output.softmax(-1) for output in outputs) / len(outputs)).log()


# ---- The mean ----


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_the_mean_computed_by_hand(folders, kind, average):
    ensemble = LineageEnsemble.from_lineage(folders[kind], "1,2,3", average).double()
    x = inputs(kind)
    found = ensemble(x.double() if kind == "image" else x).logits
    expected = by_hand(folders[kind], [1, 2, 3], average, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert not found.requires_grad
    if average == "probabilities":
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(found.shape[:-1], dtype=torch.float64))
    # The two means differ, and no member alone is either.
    other = "logits" if average == "probabilities" else "probabilities"
    twin = by_hand(folders[kind], [1, 2, 3], other, x)
    assert (found.softmax(-1) - twin.softmax(-1)).abs().max() > 1e-3
    for index in (1, 2, 3):
        assert not torch.allclose(found, by_hand(folders[kind], [index], average, x), atol=1e-3)


def test_inputs_may_be_given_by_name(folders):
    for kind, name in (("image", "pixel_values"), ("lstm", "input_ids"), ("gpt2", "input_ids")):
        ensemble = LineageEnsemble.from_lineage(folders[kind], [1])
        assert torch.equal(ensemble(**{name: inputs(kind)}).logits, ensemble(inputs(kind)).logits)


def test_half_precision_is_averaged_in_single(folders):
    for average in ("probabilities", "logits"):
        ensemble = LineageEnsemble.from_lineage(folders["lstm"], average=average).bfloat16()
        assert ensemble(inputs("lstm")).logits.dtype == torch.float32


def test_it_never_leaves_eval_mode(folders):
    ensemble = LineageEnsemble.from_lineage(folders["lstm"]).train()
    assert not any(module.training for module in ensemble.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    assert torch.equal(ensemble(inputs("lstm")).logits, ensemble(inputs("lstm")).logits)


@pytest.mark.parametrize("name", ["labels", "return_dict", "past_key_values"])
def test_inputs_that_have_no_meaning_are_refused(folders, name):
    ensemble = LineageEnsemble.from_lineage(folders["gpt2"])
    with pytest.raises(ValueError, match=f"{name}: got one, expected the inputs alone; an ensemble returns logits"):
        ensemble(inputs("gpt2"), **{name: None})


# ---- Which members ----


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("last 1", [3]),
        ("last 2", [2, 3]),
        ("last 3", [1, 2, 3]),
        ("all", [0, 1, 2, 3]),
        ("0,1,2", [0, 1, 2]),
        ("3, 1", [3, 1]),
        ([2, 0], [2, 0]),
        ((1,), [1]),
    ],
)
def test_members_are_those_asked_for(folders, asked, expected):
    assert members(LineageEnsemble.from_lineage(folders["lstm"], asked)) == expected


def test_three_students_are_the_default(folders):
    assert members(LineageEnsemble.from_lineage(folders["lstm"])) == [1, 2, 3]


@pytest.mark.parametrize(
    "asked", ["", "last", "last 0", "last -1", "last three", "gen1", "../gen1", "1,", "1,1", "-1", [-1], [1.0], [True]]
    + [["1"], ["../gen1"], [2, 2], 3, None, "1" * 9],
)  # fmt: skip
def test_members_that_cannot_be_understood(folders, asked):
    with pytest.raises(ValueError, match=r"members: got .*, expected 'last 3' \(students\), 'all', or indices"):
        LineageEnsemble.from_lineage(folders["lstm"], asked)


def test_members_that_are_not_finished(tmp_path):
    folder = lineage(tmp_path, [network("lstm", seed) for seed in range(4)], finished=3)
    assert members(LineageEnsemble.from_lineage(folder, "last 2")) == [1, 2]
    assert members(LineageEnsemble.from_lineage(folder, "all")) == [0, 1, 2]
    with pytest.raises(LineageError, match="members: got 'last 3', and .*lineage.json has 2 finished students; train"):
        LineageEnsemble.from_lineage(folder)
    for asked in ("1,3", [9], []):
        with pytest.raises(LineageError, match=r"expected one or more of the finished generations \[0, 1, 2\] of"):
            LineageEnsemble.from_lineage(folder, asked)


def test_a_folder_without_a_lineage_and_an_average_that_is_none(folders, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="output_dir: .* has no lineage.json, expected the folder of a lineage"
    ):
        LineageEnsemble.from_lineage(tmp_path)
    with pytest.raises(ValueError, match="average: got 'median', expected 'probabilities' or 'logits'"):
        LineageEnsemble.from_lineage(folders["lstm"], average="median")
    with pytest.raises(ValueError, match="members: got none, expected at least one; from_lineage finds"):
        LineageEnsemble(folders["lstm"], [])
    with pytest.raises(ValueError, match="generation: got '/../gen1', expected a whole number from 0 to"):
        Member("/../gen1", "")


def test_members_of_different_kinds_labels_or_words(tmp_path):
    def refused(name, pair, message, **more):
        folder = lineage(tmp_path / name, [network("lstm", 0), *pair], **more)
        with pytest.raises(LineageError, match=message):
            LineageEnsemble.from_lineage(folder, "1,2", sequential=name == "labels")

    image, lstm, gpt2 = (network(kind, 0) for kind in KINDS)
    refused("kinds", [lstm, image], "generation 1 is a language model that carries a state, generation 2 an image")
    refused("states", [gpt2, lstm], "generation 1 is a language model without a state, generation 2 .* that carries a")
    other = network("image", 1, labels=["a", "x", "c"])
    refused(
        "labels", [image, other], "class 1 is 'b' for generation 1, 'x' for generation 2; expected the same labels"
    )
    more = network("image", 1, labels=[*LABELS, "d"])
    refused("classes", [image, more], "class 3 is None for generation 1, 'd' for generation 2")
    refused(
        "words",
        [lstm, network("lstm", 1, words=7)],
        "generation 1 has a vocabulary of 6 tokens, generation 2 of 7; expected the same",
    )
    tokenizers = [WORDS, WORDS, [WORDS[1], WORDS[0], *WORDS[2:]]]
    refused("tokens", [lstm, lstm], "generation 1 and generation 2 do not have the same vocabulary: .*'cat' for id 0",
            words=tokenizers)  # fmt: skip
    (tmp_path / "tokens/gen2/tokenizer.json").write_text("{")
    with pytest.raises(LineageError, match="gen2.tokenizer.json: is no tokenizer .* restore it from a copy"):
        LineageEnsemble.from_lineage(tmp_path / "tokens", "1,2")
    (tmp_path / "tokens/gen2/tokenizer.json").unlink()
    assert members(LineageEnsemble.from_lineage(tmp_path / "tokens", "1,2")) == [1, 2]


# ---- The carried state ----


def test_only_members_that_carry_a_state_make_an_ensemble_that_does(folders):
    for sequential in (False, True):
        carries = {k: carries_state(LineageEnsemble.from_lineage(folders[k], sequential=sequential)) for k in KINDS}
        assert carries == {"image": False, "lstm": True, "gpt2": False}


def test_each_member_carries_its_own_state_whatever_its_size(tmp_path):
    networks = [network("lstm", 0), network("lstm", 1, layers=1), network("lstm", 2, layers=3)]
    ensemble = LineageEnsemble.from_lineage(lineage(tmp_path, networks), "0,1,2").double()
    ids = inputs("lstm")
    whole = ensemble(ids)
    first = ensemble(ids[:, :2])
    second = ensemble(ids[:, 2:], state=first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, rtol=0, atol=1e-12)
    assert not torch.allclose(ensemble(ids[:, 2:]).logits, second.logits, atol=1e-3)
    states = [part for member in networks for part in member.double()(ids).state]
    assert len(whole.state) == len(states) == 4 + 2 + 6
    for found, expected in zip(whole.state, states, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"state: got 4 tensors, expected 12 from members with \[4, 2, 6\]; pass what"
    ):
        ensemble(ids, state=whole.state[:4])


def test_a_state_for_members_without_one(folders):
    ensemble = LineageEnsemble.from_lineage(folders["gpt2"])
    assert ensemble(inputs("gpt2")).state is None
    with pytest.raises(ValueError, match=r"state: got 1 tensors, expected none from members with \[0, 0, 0\]"):
        ensemble(inputs("gpt2"), state=(torch.ones(1),))


# ---- One member in memory ----


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_is_the_same_bit_for_bit_with_one_member_alive(folders, kind, monkeypatch):
    alive, most = [], []

    def load(folder):
        most.append(sum(parameter() is not None for parameter in alive))
        model = load_generation(folder)
        alive.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    together = LineageEnsemble.from_lineage(folders[kind])
    monkeypatch.setattr(ensemble_module, "load_generation", load)
    one_by_one = LineageEnsemble.from_lineage(folders[kind], sequential=True)
    assert list(one_by_one.parameters()) == [] and len(list(together.parameters())) > 0
    x = inputs(kind)
    first, expected = one_by_one(x), together(x)
    assert torch.equal(first.logits, expected.logits)
    if kind == "lstm":
        again = one_by_one(x, state=first.state)
        assert torch.equal(again.logits, together(x, state=expected.state).logits)
    one_by_one, together = one_by_one.double(), together.double()
    if kind == "image":
        x = x.double()
        for ensemble in (one_by_one, together):
            ensemble.to(memory_format=torch.channels_last)
    assert torch.equal(one_by_one(x).logits, together(x).logits)
    assert together(x).logits.dtype == torch.float64
    assert len(most) >= 9 and set(most) == {0}, "a member was alive when the next was read"
    assert not any(parameter() is not None for parameter in alive)


# ---- Measured as a generation is ----


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_accuracy_is_that_of_the_mean(folders, average):
    x = inputs("image", rows=24)
    labels = torch.randint(len(LABELS), (24,), generator=torch.Generator().manual_seed(6))
    data = [{"pixel_values": x[row], "labels": labels[row]} for row in range(24)]

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    expected = by_hand(folders["image"], [1, 2, 3], average, x)
    accuracy = expected.argmax(-1).eq(labels).double().mean().item()
    for sequential in (False, True):
        ensemble = LineageEnsemble.from_lineage(folders["image"], "last 3", average, sequential)
        found = evaluate_classifier(ensemble, data, collate, batch_size=16)
        assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert found["nll"] == pytest.approx(F.cross_entropy(expected, labels).item(), abs=1e-5)
    for index in (1, 2, 3):
        alone = evaluate_classifier(load_generation(folders["image"] / f"gen{index}"), data, collate)
        assert abs(alone["nll"] - found["nll"]) > 1e-3


@pytest.mark.parametrize("kind", ["lstm", "gpt2"])
def test_perplexity_is_that_of_the_mean(folders, kind):
    tokens = torch.randint(len(WORDS), (29,), generator=torch.Generator().manual_seed(7))
    # One stream: what carries a state reads the text in one, the other window by window.
    windows = TokenStreams(tokens, 1, 6, before=2)
    whole = [windows[i]["input_ids"] for i in range(len(windows))]
    parts = [torch.cat(whole)] if kind == "lstm" else whole
    logits = torch.cat([by_hand(folders[kind], [1, 2, 3], "probabilities", part[None])[0] for part in parts])
    nll = F.cross_entropy(logits, tokens).item()
    ensemble = LineageEnsemble.from_lineage(folders[kind]).double()
    found = evaluate_language_model(ensemble, windows)
    assert found["nll"] == pytest.approx(nll, abs=1e-10)
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-10) and found["tokens"] == 29


def test_it_is_a_public_name():
    assert born_again.LineageEnsemble is LineageEnsemble
