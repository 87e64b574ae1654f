"""A card says what the manifest holds, in a form that the Hub reads, and nothing more."""

import ast
import math

import pytest
from card_manifests import (
    HUB,
    IMAGE_METRICS,
    TEXT_METRICS,
    codes,
    data_of,
    ensemble,
    external,
    manifest,
    record,
    section,
)
from huggingface_hub import EvalResult, ModelCard

from born_again.hub.model_card import ensemble_card, image_classifier_card, language_model_card
from born_again.lineage.manifest import is_repo_id

# ---- What the Hub reads ----


def test_front_matter_of_an_image_classifier():
    content = manifest()
    card = image_classifier_card(content, 1)
    held = data_of(card)
    results = held.pop("model-index")
    assert held == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["born-again-networks", "knowledge-distillation", "image-classification", "timm", "transformers"],
        "born_again": {
            "generation": 1,
            "objective": "ban+l",
            "seed": 43,
            "weights_sha256": "1a" * 32,
            "spec_sha256": content["spec_sha256"],
            "parent": {"generation": 0, "weights_sha256": "0a" * 32},
            "versions": {"python": "3.11.2", "torch": "2.15.0"},
        },
    }
    assert results[0]["name"] == "wide-resnet-digits-gen1"
    assert ModelCard(card).text.strip().startswith("# wide-resnet-digits-gen1\n")


def test_what_was_measured_is_read_back_as_it_was():
    found = ModelCard(image_classifier_card(manifest(), 2)).data.eval_results
    place = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": "digits",
        "dataset_name": "digits",
        "dataset_split": "test",
    }
    assert found == [
        EvalResult(metric_type=kind, metric_name=name, metric_value=IMAGE_METRICS["test"][key], **place)
        for kind, name, key in (
            ("accuracy", "Accuracy", "accuracy"),
            ("error", "Error (1 - accuracy)", "error"),
            ("loss", "Negative log-likelihood (nats per item)", "nll"),
            ("ece", "Expected calibration error", "ece"),
        )
    ]


def test_text_is_measured_on_two_splits_and_counts_are_no_metrics():
    card = ModelCard(language_model_card(manifest(kind="text"), 1))
    assert [(one.dataset_split, one.metric_type, one.metric_value) for one in card.data.eval_results] == [
        (split, kind, TEXT_METRICS[split][key])
        for split in ("validation", "test")
        for kind, key in (("loss", "nll"), ("perplexity", "perplexity"))
    ]
    assert {one.dataset_type for one in card.data.eval_results} == {"ptb-text-only/ptb_text_only"}
    assert card.data.datasets == ["ptb-text-only/ptb_text_only"] and card.data.library_name == "transformers"


def test_what_is_not_finite_is_no_result():
    metrics = {"validation": {"perplexity": math.inf, "nll": math.nan}, "test": {"nll": 800.0, "perplexity": None}}
    card = language_model_card(manifest(record(0, "text", metrics=metrics), kind="text"), 0)
    assert [one.metric_value for one in ModelCard(card).data.eval_results] == [800.0]
    assert "- test perplexity: not finite\n" in card


def test_without_metrics_nothing_is_claimed():
    for write in (image_classifier_card, language_model_card):
        card = write(manifest(record(0, metrics={}), record(1, metrics={})), 1)
        assert "model-index" not in data_of(card)
        for title in ("Results", "The lineage so far", "Calibration"):
            assert section(card, title) == "Not measured."
        assert "Not measured, neither on digits nor on anything else." in section(card, "Limits")
        assert "standard error" not in card and "Measured on" not in card


def test_an_unknown_metric_keeps_its_name():
    card = image_classifier_card(manifest(record(0, metrics={"test": {"f1": 0.5}})), 0)
    assert [(one.metric_type, one.metric_name) for one in ModelCard(card).data.eval_results] == [("f1", "f1")]
    assert section(card, "Calibration") == "Not measured."


def test_a_limit_of_the_measurement_is_part_of_the_result():
    card = image_classifier_card(manifest(data_args={"max_eval_samples": 256}, dataset="cifar10"), 0)
    assert ModelCard(card).data.eval_results[0].dataset_args == {"max_eval_samples": 256}
    assert "No more than 256 images were taken of each split measured." in section(card, "Limits")


@pytest.mark.parametrize(
    ("dataset", "data", "shown", "hub_id"),
    [
        ("cifar10", {}, "cifar10", "uoft-cs/cifar10"),
        ("cifar100", {}, "cifar100", "uoft-cs/cifar100"),
        ("ptb", {}, "ptb", "ptb-text-only/ptb_text_only"),
        ("zalando/fashion", {"image_column": "image", "revision": "c0ffee"}, "zalando/fashion", "zalando/fashion"),
        ("zalando/fashion", {"image_column": "image", "revision": None}, "fashion", None),
        ("someone/words", {}, "someone/words", "someone/words"),
        ("digits", {"image_column": None, "revision": None}, "digits", None),
        ("grammar", {}, "grammar", None),
        ("/home/someone/secret/my data", {}, "my data", None),
        ("~/secret/mine/", {}, "mine", None),
        ("../secret/mine", {}, "mine", None),
        ("C:\\Users\\someone\\mine", {}, "mine", None),
        ("./cifar10", {}, "cifar10", None),
        ("secret/deep/mine", {}, "mine", None),
        ("..", {}, "a local folder", None),
    ],
)
def test_a_dataset_is_a_hub_id_or_a_name_and_never_a_path(dataset, data, shown, hub_id):
    card = image_classifier_card(manifest(dataset=dataset, data=data), 1)
    assert data_of(card).get("datasets") == ([hub_id] if hub_id else None)
    result = ModelCard(card).data.eval_results[0]
    assert (result.dataset_name, result.dataset_type) == (shown, hub_id or shown)
    assert result.dataset_revision == (data.get("revision") if hub_id else None)
    assert "secret" not in card and "someone" not in card.replace("someone/words", "")


def test_a_folder_called_as_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "someone" / "words").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = language_model_card(manifest(kind="text", dataset="someone/words"), 0)
    assert "datasets" not in data_of(card) and "someone" not in card


# ---- On the Hub ----


def test_a_published_student_names_its_parent():
    parent = {"status": "published", "repo": "born-again/wide-resnet-digits-gen0", "commit": "c0ffee" * 6 + "abcd"}
    content = manifest(record(0, hub=parent), record(1), record(2), hub={**HUB, "license": "apache-2.0"})
    card = image_classifier_card(content, 1)
    held = data_of(card)
    assert held["base_model"] == parent["repo"] and held["license"] == "apache-2.0"
    assert "base_model_relation" not in held and "new_version" not in held
    assert held["born_again"]["parent"] == {
        "generation": 0,
        "weights_sha256": "0a" * 32,
        "repo": parent["repo"],
        "commit": parent["commit"],
    }
    said = " ".join(card.split())
    assert "trained from scratch on digits with another seed, taught by generation 0" in said
    assert f"Its teacher is [{parent['repo']}](https://huggingface.co/{parent['repo']}) at commit c0ffee" in said
    assert "no weights were taken from it" in said
    # Not published itself, it is known by where it is going to be.
    assert data_of(image_classifier_card(content, 2))["base_model"] == "born-again/wide-resnet-digits-gen1"
    assert "base_model" not in data_of(image_classifier_card(content, 0))


def test_examples_load_from_the_hub_where_that_is_known():
    code = "\n".join(codes(image_classifier_card(manifest(hub=HUB), 1)))
    repo = "born-again/wide-resnet-digits-gen1"
    assert f'timm.create_model("hf-hub:{repo}", pretrained=True)' in code and "FOLDER" not in code
    assert code.count(f'from_pretrained("{repo}")') == 2 and f'load_generation("{repo}")' in code
    assert f'from_pretrained("{repo}", trust_remote_code=True)' in code
    branch = "\n".join(codes(image_classifier_card(manifest(hub={**HUB, "branch": "dev"}), 1)))
    assert f'"hf-hub:{repo}@dev"' in branch and branch.count(f'"{repo}", revision="dev"') == 5
    text = "\n".join(codes(language_model_card(manifest(kind="text", hub=HUB), 0)))
    assert text.count('"born-again/lstm-small-ptb-gen0"') == 5


def test_a_private_repository_says_so():
    assert "hf auth login" in image_classifier_card(manifest(hub={**HUB, "private": True}), 0)
    assert "hf auth login" not in image_classifier_card(manifest(hub=HUB), 0)


def test_older_generations_point_to_the_newest():
    hub = {**HUB, "newest": "born-again/wide-resnet-digits-gen2"}
    newer = [data_of(image_classifier_card(manifest(hub=hub), index)).get("new_version") for index in range(3)]
    assert newer == ["born-again/wide-resnet-digits-gen2"] * 2 + [None]


@pytest.mark.parametrize(
    "hub",
    [
        {"namespace": "a b"},
        {"namespace": "<script>"},
        {"namespace": 'x", evil("'},
        {"namespace": "x", "pattern": "{name.__class__}"},
        {"namespace": "x", "pattern": 7, "branch": '"); evil("', "newest": "\n# x", "license": None},
        {"namespace": None},
        {},
    ],
)
def test_what_is_no_repository_is_not_named(hub):
    card = image_classifier_card(manifest(hub=hub), 1)
    names = [value for name, value in data_of(card).items() if name in ("base_model", "new_version")]
    assert all(is_repo_id(name) for name in names)
    assert "evil" not in card and "__class__" not in card and "<script" not in card
    for code in codes(card):
        ast.parse(code)


@pytest.mark.parametrize(
    ("write", "kind", "model", "alone"),
    [
        (image_classifier_card, "image", "wide_resnet16_1_cifar", "Unknown model (wide_resnet16_1_cifar)"),
        (image_classifier_card, "image", "resnet18", None),
        (language_model_card, "text", "lstm-small", "contains custom code which must be executed"),
        (language_model_card, "text", "char-cnn-lstm", "contains custom code which must be executed"),
        (language_model_card, "text", "gpt2-small", None),
        (language_model_card, "text", "someone/lstm-like", None),
    ],
)
def test_loading_without_this_package_is_explained_where_it_matters(write, kind, model, alone):
    there = " ".join(write(manifest(kind=kind, model=model, hub=HUB), 1).split())
    assert ("### Without this package" in there) == ("trust_remote_code" in there) == (alone is not None)
    assert alone is None or alone in there
    # What lies in a folder has no code beside it.
    here = write(manifest(kind=kind, model=model), 1)
    assert "trust_remote_code" not in here and ("Without `import born_again`" in here) == (alone is not None)


def test_the_text_model_of_a_folder_is_called_by_its_type():
    for model, kind in (("lstm-large", "lstm_lm"), ("char-cnn-lstm", "char_cnn_lstm")):
        assert f"model type `{kind}`" in language_model_card(manifest(kind="text", model=model), 0)


# ---- Ensembles ----


def test_front_matter_of_an_ensemble():
    hashes = ["1a" * 32, "2a" * 32]
    held = data_of(ensemble_card(manifest(), ensemble(1, 2)))
    assert held["model-index"][0]["name"] == "wide-resnet-digits, ensemble of gen1, gen2"
    assert held["library_name"] == "born_again" and held["pipeline_tag"] == "image-classification"
    assert held["born_again"] == {"members": [1, 2], "average": "probabilities", "weights_sha256": hashes}
    assert "base_model" not in held
    commits = [None, "c0ffee00", None]
    generations = [record(index, hub={"commit": commit}) for index, commit in enumerate(commits)]
    content = manifest(*generations, hub={**HUB, "branch": "dev"})
    card = ensemble_card(content, ensemble(1, 2))
    held = data_of(card)
    assert held["base_model"] == ["born-again/wide-resnet-digits-gen1", "born-again/wide-resnet-digits-gen2"]
    assert held["born_again"]["commits"] == ["c0ffee00", None]
    assert 'from_pretrained("born-again/wide-resnet-digits-ensemble", revision="dev")' in card
    assert "FOLDER" not in card and "[born-again/wide-resnet-digits-gen1](https://huggingface.co/" in card


def test_an_ensemble_is_compared_with_its_members():
    metrics = {"test": {**IMAGE_METRICS["test"], "accuracy": 0.95}}
    table = section(ensemble_card(manifest(), ensemble(1, 2, metrics=metrics)), "The lineage")
    row = next(line for line in table.splitlines() if "mean of 1, 2" in line)
    assert "95.00" in row and row.split("|")[-2].strip() == "+2.50"
    assert "ensemble is over the newest of its members" in table


def test_an_ensemble_of_text_and_one_that_was_not_measured():
    text = ensemble_card(manifest(kind="text"), ensemble(0, 1, metrics=TEXT_METRICS))
    assert data_of(text)["pipeline_tag"] == "text-generation" and "input_ids" in text
    card = ensemble_card(manifest(external(), record(1)), ensemble(0, 1, metrics={}))
    assert section(card, "Results").startswith("Not measured.") and "model-index" not in data_of(card)
    assert "- gen0: trained elsewhere\n- gen1: ban+l, seed 43\n" in card


def test_each_card_names_the_architecture_of_its_generation():
    students = {"student_model": "densenet90_60_cifar", "student_model_args": {"depth": 172, "growth_rate": 30}}
    content = manifest(**students, model_args={"proj_drop_rate": 0.3})
    cards = [" ".join(image_classifier_card(content, index).split()) for index in range(3)]
    teacher, own = "wide\\_resnet16\\_1\\_cifar", "densenet90\\_60\\_cifar"
    assert f"A {teacher} trained" in cards[0]
    assert f"- architecture: {teacher} (proj\\_drop\\_rate 0.3); 175,066 parameters" in cards[0]
    assert f"A {own} trained from scratch on digits with another seed, taught by generation 0, a {teacher}" in cards[1]
    assert f"- architecture: {own} (depth 172, growth\\_rate 30); 175,066 parameters" in cards[1]
    assert "taught by generation 1 of the same architecture" in cards[2]
    assert all("No weights were taken from its teacher" in card for card in cards[1:])
    card = " ".join(ensemble_card(content, ensemble(1, 2)).split())
    assert f"of networks of one architecture, a {own}, trained on" in card
    card = " ".join(ensemble_card(content, ensemble(0, 1)).split())
    assert f"of networks of several architectures ({own}, {teacher}), trained on" in card


def test_a_card_says_which_weights_are_the_teachers():
    said = "Its first convolution and its classifier are its teacher's, frozen; no other weights were taken from its"
    assert said in " ".join(image_classifier_card(manifest(share_teacher_ends=True), 1).split())
