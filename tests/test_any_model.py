"""`Lineage`: any network of transformers or timm, in the arguments of Trainer."""

import json

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from any_lineage import STEPS, classifier, lineage, pixels, rows
from helpers import CLASSES, WORDS, arguments, language_model, token_classifier
from huggingface_hub import PyTorchModelHubMixin
from tiny_lineage import Crash, hashes
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from born_again import BornAgainTrainer, LineageRunner, LineageSpec, load_generation
from born_again.data.text import word_tokenizer
from born_again.lineage.manifest import LineageError


def test_a_lineage_of_a_text_classifier_is_that_of_its_runner_by_hand(tmp_path):
    """Same weights as with factories of one's own; cards, predictions, ensembles; metrics as evaluated by hand."""
    share = {"compute_metrics": lambda p: {"share_of_0": (p.predictions.argmax(-1) == 0).mean()}}
    own = lineage(tmp_path / "own", report=True, **share)
    manifest = own.run()
    data = rows().with_format("torch")

    def build_trainer(student, teacher, generation):
        args = arguments(generation.checkpoint_dir, seed=generation.seed, max_steps=STEPS, objective="ban+l")
        return BornAgainTrainer(student, args, teacher=teacher, train_dataset=data, eval_dataset=data)

    spec = LineageSpec("by-hand", "bert", "words", generations=2, objective="ban+l", seed=own.args.seed)
    LineageRunner(
        spec,
        tmp_path / "hand",
        build_student=lambda generation: classifier(),
        build_trainer=build_trainer,
        load_teacher=BertForSequenceClassification.from_pretrained,
    ).run()
    assert hashes(tmp_path / "own") == hashes(tmp_path / "hand")

    spec = manifest.spec
    assert (spec.task, spec.starting_point, spec.model) == (
        "text-classification",
        None,
        "BertForSequenceClassification",
    )
    assert spec.model_args["hidden_size"] == 16 and manifest.content["data"]["rows"] == {"train": 22, "test": 22}
    batch = data[:]
    for record in manifest.generations:
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "own" / f"gen{record['index']}").eval()
        with torch.no_grad():
            logits = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        measured = record["metrics"]["test"]
        assert measured["nll"] == pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-5)
        assert measured["accuracy"] == (logits.argmax(-1) == batch["labels"]).double().mean().item()
        assert measured["share_of_0"] == pytest.approx((logits.argmax(-1) == 0).double().mean().item())
        assert own.evaluate(record["index"])["test"] == measured
    assert manifest.content["ensembles"][0]["members"] == [1, 2]
    ensemble = own.ensemble("1,2")
    assert own.evaluate(ensemble)["test"] == manifest.content["ensembles"][0]["metrics"]["test"]
    assert isinstance(load_generation(tmp_path / "own" / "gen1"), BertForSequenceClassification)
    card = (tmp_path / "own" / "gen1" / "README.md").read_text()
    assert "trained from scratch" in card and "AutoModelForSequenceClassification" in card
    assert "own-data" in (tmp_path / "own" / "report.html").read_text() and "../report.png" in card
    assert "pipeline_tag: text-classification" in card and (tmp_path / "own/gen1/predictions.safetensors").is_file()
    assert "classes: 4 (LABEL\\_0" in card and "0 (teacher)" in own.results()


def test_after_a_crash_the_same_call_reaches_the_same_weights(tmp_path):
    whole = lineage(tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        lineage(tmp_path / "cut", callbacks=[Crash(1, 3)]).run()
    resumed = lineage(tmp_path / "cut").run()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    assert [own["metrics"] for own in resumed.generations] == [own["metrics"] for own in whole.generations]
    assert resumed.content["data"] == whole.content["data"] and resumed.spec == whole.spec


def test_after_a_crash_weights_that_are_saved_by_other_names_are_restored_too(tmp_path):
    data = pixels(count=24)
    lineage(tmp_path / "whole", vit, data=data, generations=1).run()
    with pytest.raises(KeyboardInterrupt):
        lineage(tmp_path / "cut", vit, data=data, generations=1, callbacks=[Crash(1, 3)]).run()
    lineage(tmp_path / "cut", vit, data=data, generations=1).run()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_the_best_weights_are_those_of_its_evaluation(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.5}
    own = lineage(
        tmp_path,
        vit,
        data=pixels(),
        generations=0,
        changes={**changes, "load_best_model_at_end": True},
        keep_checkpoints=True,
    )
    manifest = own.run()
    [state] = [path for path in tmp_path.rglob("trainer_state.json") if path.parent.name == f"checkpoint-{STEPS}"]
    log = json.loads(state.read_text())["log_history"]
    losses = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert losses.index(min(losses)) < STEPS - 1  # not the last
    assert manifest.generations[0]["metrics"]["test"]["nll"] == pytest.approx(min(losses), rel=1e-5)


class Noisy(torch.utils.data.Dataset):
    """Rows that are augmented at random when they are read."""

    def __init__(self):
        self.rows = pixels(count=24).with_format("torch")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"pixel_values": row["pixel_values"] + torch.randn(3, 8, 8), "labels": int(row["labels"])}


@pytest.mark.parametrize("drawn", ["masks", "rows"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_after_a_crash_the_data_are_drawn_as_without_it(tmp_path, drawn, workers):
    """By a collator and by a dataset, in a second epoch and the middle of one; by workers as without."""
    if drawn == "masks":
        make, options = masked, {"data": rows("next").remove_columns("labels"), "data_collator": masking()}
    else:
        make, options = vit, {"data": Noisy(), "eval_dataset": pixels()}
    options |= {"generations": 1}
    changes = {"max_steps": 9, "save_steps": 7}
    lineage(tmp_path / "whole", make, changes=changes, **options).run()
    changes["dataloader_num_workers"] = workers
    with pytest.raises(KeyboardInterrupt):
        lineage(tmp_path / "cut", make, changes=changes, callbacks=[Crash(1, 8)], **options).run()
    lineage(tmp_path / "cut", make, changes=changes, **options).run()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def vit(**changes):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
        **changes,
    )
    return ViTForImageClassification(config)


def masked():
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    return BertForMaskedLM(config)


def masking():
    words = word_tokenizer([f"w{index}" for index in range(WORDS - 2)] + ["<unk>", "<eos>"])
    words.add_special_tokens({"mask_token": "w1", "pad_token": "w0"})
    return DataCollatorForLanguageModeling(words, mlm_probability=0.3)


@pytest.mark.parametrize(
    ("task", "make", "kind", "options"),
    [
        ("token-classification", lambda: token_classifier(torch.initial_seed()).float(), "token", {}),
        ("text-generation", lambda: language_model(torch.initial_seed()).float(), "next", {}),
        ("fill-mask", masked, "next", {"data_collator": masking()}),
        ("image-classification", vit, None, {}),
    ],
)
def test_tasks(tmp_path, task, make, kind, options):
    data = pixels() if kind is None else rows(kind)
    if task == "fill-mask":
        data = data.remove_columns("labels")
    own = lineage(tmp_path, make, data=data, generations=1, eval_dataset={"validation": data, "test": data}, **options)
    manifest = own.run()
    assert own.task == manifest.spec.task == task
    metrics = manifest.generations[1]["metrics"]
    assert metrics["validation"] == metrics["test"] and np.isfinite(metrics["test"]["nll"])
    is_language = task in ("text-generation", "fill-mask")
    assert set(metrics["test"]) == (
        {"nll", "perplexity", "tokens"} if is_language else {"accuracy", "error", "nll", "ece"}
    )
    if task == "text-generation":  # position i is of the token after it
        counted = sum(sum(label != -100 for label in row[1:]) for row in data["labels"])
        assert metrics["test"]["tokens"] == counted
    assert own.evaluate(1)["test"] == metrics["test"]  # also where masks are drawn
    card = (tmp_path / "gen1" / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    assert isinstance(load_generation(tmp_path / "gen1"), type(make()))


def test_a_network_of_timm_is_saved_as_an_image_classifier_of_either_library(tmp_path):
    def make():
        return timm.create_model("test_resnet", num_classes=3)

    manifest = lineage(tmp_path, make, data=pixels(32, 6), generations=1, changes={"max_steps": 1}).run()
    assert (manifest.spec.model, manifest.spec.task) == ("test_resnet", "image-classification")
    again = timm.create_model(f"local-dir:{tmp_path / 'gen1'}", pretrained=True).eval()
    loaded = load_generation(tmp_path / "gen1")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), loaded(x).logits)
    assert list(loaded.config.id2label.values()) == ["cat", "dog", "owl"]  # of the dataset
    assert manifest.content["data"]["label_names"] == ["cat", "dog", "owl"]
    assert "classes: 3 (cat, dog, owl)" in (tmp_path / "gen1" / "README.md").read_text()


def test_of_timm_the_network_itself_is_trained_and_one_made_with_arguments_is_refused():
    from born_again.models.image_classifier import wrap_timm_network

    network = timm.create_model("test_vit", num_classes=3, proj_drop_rate=0.5)
    assert wrap_timm_network(network).timm_model is network  # whose dropout is no part of a configuration
    with pytest.raises(ValueError, match="made with arguments of its own .* create_image_classifier"):
        wrap_timm_network(timm.create_model("test_vit", num_classes=3, depth=2))
    with pytest.raises(ValueError, match="made with arguments of its own"):
        wrap_timm_network(timm.create_model("test_vit", num_classes=3, act_layer="relu"))  # of the same shapes


class OwnNetwork(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 6):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, CLASSES))

    def forward(self, x):
        return self.layers(x)


def own_rows(count=16):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(5, generator=generator), "labels": torch.tensor(i % CLASSES)} for i in range(count)]


def test_a_module_with_the_mixin_of_the_hub(tmp_path):
    own = lineage(tmp_path, OwnNetwork, data=own_rows(), task="text-classification")
    manifest = own.run()
    assert [type(own.load(index)) for index in range(3)] == [OwnNetwork] * 3
    assert manifest.content["ensembles"][0]["metrics"]["test"]["nll"] > 0
    card = (tmp_path / "gen0" / "README.md").read_text()
    assert "OwnNetwork, whose" in card and "library_name: pytorch\n" in card and "- transformers\n" not in card
    with pytest.raises(LineageError, match="the data is not what"):
        lineage(tmp_path, OwnNetwork, data=own_rows(15), task="text-classification")
    with pytest.raises(ValueError, match="OwnNetwork, which transformers has for no task that it knows"):
        lineage(tmp_path / "b", OwnNetwork, data=own_rows())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with a network trained for another task: another number of classes."""
    folder = tmp_path_factory.mktemp("pretrained") / "encoder"
    model = classifier()
    model.classifier = nn.Linear(16, 2)
    model.config.num_labels = 2
    model.save_pretrained(folder)
    return folder


def test_a_pretrained_starting_point_is_found_out_and_the_cards_say_so(tmp_path, pretrained):
    def make():
        return AutoModelForSequenceClassification.from_pretrained(
            pretrained, num_labels=CLASSES, ignore_mismatched_sizes=True
        )

    own = lineage(tmp_path, make, generations=1)
    assert own.starting_point == str(pretrained)
    own.run()
    for index in (0, 1):
        card = (tmp_path / f"gen{index}" / "README.md").read_text()
        assert "fine-tuned from pretrained weights (encoder, as every generation of the lineage)" in " ".join(
            card.split()
        )
        assert "trained from scratch" not in card
    trained = lambda: AutoModelForSequenceClassification.from_pretrained(tmp_path / "gen0")  # noqa: E731
    with pytest.raises(ValueError, match="a generation of a lineage, so every student would start where its teacher"):
        lineage(tmp_path / "b", trained)

    def complete():
        model = make()
        with torch.no_grad():
            model.classifier.weight.fill_(0.0)[:, 0] = torch.arange(CLASSES, dtype=torch.float32)
        return model

    with pytest.raises(ValueError, match="its classifier too, so every student"):
        lineage(tmp_path / "c", complete)
    assert lineage(tmp_path / "c", complete, pretrained=True).starting_point == str(pretrained)
    with pytest.raises(ValueError, match="no weights of two calls of model_init are the same"):
        lineage(tmp_path / "d", pretrained=True)


def test_students_of_peft_are_saved_merged(tmp_path, pretrained):
    peft = pytest.importorskip("peft")

    def make():
        base = AutoModelForSequenceClassification.from_pretrained(
            pretrained, num_labels=CLASSES, ignore_mismatched_sizes=True
        )
        config = peft.LoraConfig(
            r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False
        )
        return peft.get_peft_model(base, config)

    own = lineage(tmp_path, make, generations=1)
    manifest = own.run()
    assert manifest.spec.model_args["peft"] == {"default": "LORA"} and own.starting_point == str(pretrained)
    names = AutoModelForSequenceClassification.from_pretrained(tmp_path / "gen1").state_dict()
    assert not any("lora" in name for name in names)
    assert manifest.generations[1]["metrics"]["test"] == own.evaluate(1)["test"]


def test_a_teacher_by_its_folder(tmp_path):
    lineage(tmp_path / "first", generations=0).run()
    folder = tmp_path / "first" / "gen0"
    own = lineage(tmp_path / "second", teacher=str(folder), generations=1)
    assert own.run().generations[0]["weights_sha256"] == hashes(tmp_path / "first")[0]
    trainer = BornAgainTrainer(classifier(), arguments(tmp_path / "third"), teacher=str(folder))
    assert isinstance(trainer.teacher.modules[0], BertForSequenceClassification)
    with pytest.raises(ValueError, match="teacher: .*first' is the folder of a lineage.*gen0"):
        BornAgainTrainer(classifier(), arguments(tmp_path / "third"), teacher=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="teacher: 'no/where' cannot be loaded"):
        BornAgainTrainer(classifier(), arguments(tmp_path / "third"), teacher=["no/where"])
    with pytest.raises(TypeError, match="teacher: got BertForSequenceClassification, expected the folder"):
        lineage(tmp_path / "fourth", teacher=classifier())


def question_answerer():
    return BertForQuestionAnswering(masked().config)


def seq2seq():
    return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4))


def several_labels():
    model = classifier()
    model.config.problem_type = "multi_label_classification"
    return model


ONE = classifier()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (question_answerer, ValueError, "is for question answering, expected .* served are image, sequence and token"),
        (seq2seq, ValueError, "for sequence to sequence, expected .*SequenceClassification"),
        (several_labels, ValueError, "multi_label_classification.* in a lineage"),
        (lambda: ONE, ValueError, "returned the same object at two calls, expected a new network"),
        (lambda: nn.Linear(5, CLASSES), ValueError, "a plain nn.Module, expected .*PyTorchModelHubMixin"),
        (lambda: "bert", TypeError, "model_init: returned str, expected a network"),
        (ONE, TypeError, "model_init: got BertForSequenceClassification, expected a function"),
    ],
)
def test_networks_that_are_refused_before_anything_is_written(tmp_path, make, error, match):
    with pytest.raises(error, match=match):
        lineage(tmp_path / "new", make)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data": rows().remove_columns("labels")}, "expected 'labels' among them"),
        ({"data": rows("token")}, "one label for each row of logits"),
        ({"data": rows().map(lambda row: {"labels": 9})}, "expected class numbers 0 to 3"),
        ({"data": rows().to_iterable_dataset()}, "a stream, whose rows cannot be looked at.*data_fingerprint"),
        ({"eval_dataset": {}}, "eval_dataset: got {}, expected a dataset"),
        ({"eval_dataset": {"train": rows()}}, "got a split 'train'"),
        ({"changes": {"push_to_hub": True}}, "push_to_hub: got True without"),
    ],
)
def test_data_and_arguments_that_are_refused_before_anything_is_written(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        lineage(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_stream_with_a_fingerprint_of_ones_own(tmp_path):
    stream = rows().to_iterable_dataset()
    lineage(tmp_path, data=stream, data_fingerprint="words 1", generations=0).run()
    with pytest.raises(LineageError, match="the data is not what"):
        lineage(tmp_path, data=stream, data_fingerprint="words 2", generations=0)


def test_another_architecture_or_argument_in_the_folder_is_refused(tmp_path):
    lineage(tmp_path, generations=0).run()
    with pytest.raises(LineageError, match="model_args.hidden_dropout_prob"):
        lineage(
            tmp_path,
            lambda: BertForSequenceClassification(
                BertConfig(**{**classifier().config.to_dict(), "hidden_dropout_prob": 0.3})
            ),
        )
    with pytest.raises(LineageError, match="training.learning_rate"):
        lineage(tmp_path, changes={"learning_rate": 0.1})


@pytest.mark.parametrize("names", [("validation",), ("test", "validation"), ("test", "dev", "other")])
@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_the_best_weights_are_chosen_on_the_split_that_is_no_test(tmp_path, names, metric):
    """eval_loss, accuracy and early stopping read one split, as where Trainer is given it alone."""
    chosen = {"validation": rows().select(range(10)), "dev": rows().select(range(10))}
    data = {name: chosen.get(name, rows().select(range(10, 22))) for name in names}
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "learning_rate": 0.5,
    }
    own = lineage(tmp_path, eval_dataset=data, generations=1, changes=changes, callbacks=[EarlyStoppingCallback(3)])
    trainers = []
    build, own.runner.build_trainer = (
        own.runner.build_trainer,
        lambda *given: trainers.append(build(*given)) or trainers[-1],
    )
    manifest = own.run()
    split = "test" if names == ("validation",) else names[1]
    for trainer, record in zip(trainers, manifest.generations, strict=True):
        assert len(trainer.eval_dataset) == 10
        logged = [entry[f"eval_{metric or 'loss'}"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(logged) == 2
        found = record["metrics"][split]["accuracy" if metric else "nll"]
        assert found == pytest.approx((max if metric else min)(logged), rel=1e-5)


def test_what_is_chosen_by_a_test_split_is_said_and_a_metric_that_nobody_computes_refused(tmp_path, caplog):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    data = {"validation": rows(), "test": rows()}
    lineage(tmp_path / "a", eval_dataset=data, changes=changes)
    assert "weights are chosen on" not in caplog.text
    lineage(tmp_path / "b", changes=changes)
    assert "weights are chosen on the split 'test', whose metrics are reported too" in caplog.text
    with pytest.raises(ValueError, match="metric_for_best_model: got 'f1' without compute_metrics"):
        lineage(tmp_path / "c", eval_dataset=data, changes={**changes, "metric_for_best_model": "f1"})
    named = lineage(tmp_path / "d", eval_dataset=data, changes={**changes, "metric_for_best_model": "validation_loss"})
    assert named._chosen_on == (None, data)  # as Trainer names them


NAMES = ["bad", "fair", "good", "great"]


def named(names=NAMES, count=22):
    return rows().select(range(count)).cast_column("labels", datasets.ClassLabel(names=names))


def labelled(label, count=4):
    return (
        rows().select(range(count)).map(lambda row, index: {"labels": label if index == 3 else 0}, with_indices=True)
    )


def with_names(names):
    def make():
        model = classifier()
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
        return model

    return make


def test_classes_are_called_as_in_the_dataset(tmp_path):
    manifest = lineage(tmp_path, data=named(), generations=0, changes={"max_steps": 1}).run()
    assert BertConfig.from_pretrained(tmp_path / "gen0").id2label == dict(enumerate(NAMES))
    assert manifest.content["data"]["label_names"] == NAMES
    path = tmp_path / "lineage.json"  # of an earlier version, which left the default names
    path.write_text(path.read_text().replace('"label_names": [', '"label_names": ["other",'))
    lineage(tmp_path, data=named(), generations=0, changes={"max_steps": 1})


@pytest.mark.parametrize(
    ("make", "data", "evaluation", "match"),
    [
        (classifier, rows(), labelled(4), "labels: got 4 in the split 'dev', expected class numbers 0 to 3"),
        (classifier, labelled(-1), rows(), "labels: got -1 in the split 'train', expected"),
        (classifier, rows(), list(labelled(7).with_format("torch")), "labels: got 7 in the split 'dev'"),
        (classifier, named(), named(NAMES[::-1]), "the split 'dev' are great, good, .* train_dataset bad, fair"),
        (with_names(NAMES[::-1]), named(), named(), "network are great, good, .*'train' bad, fair, .* same order"),
    ],
)
def test_labels_of_any_row_and_names_of_classes_are_checked_at_the_start(tmp_path, make, data, evaluation, match):
    with pytest.raises(ValueError, match=match):
        lineage(tmp_path / "new", make, data=data, eval_dataset={"test": data, "dev": evaluation})
    assert not (tmp_path / "new").exists()


def test_labels_that_are_worth_a_warning_or_changed_later(tmp_path, caplog):
    data = named().filter(lambda row: row["labels"] != 2)
    lineage(tmp_path / "a", with_names(["a", "b", "c", "d"]), data=data, eval_dataset=named())
    assert "no row of train_dataset has the classes c, which the split 'test' has" in caplog.text
    assert "network are called a, b, c, d, and of the dataset bad, fair, good, great" in caplog.text
    # Numbered from 1 in the table, and from 0 by a transform: what is read counts.
    stored = rows().map(lambda row: {"labels": row["labels"] + 1})
    shifted = stored.with_transform(lambda batch: {**batch, "labels": [label - 1 for label in batch["labels"]]})
    lineage(tmp_path / "b", data=shifted)


def test_a_transform_of_columns_that_trainer_removes(tmp_path):
    data = rows().rename_column("input_ids", "ids")
    read = data.with_transform(lambda batch: {"input_ids": batch["ids"], "labels": batch["labels"]})
    with pytest.raises(ValueError, match="reads the column 'ids', which is removed before, .*remove_unused_columns=F"):
        lineage(tmp_path, data=read, data_collator=default_data_collator)
    equal = read.select([0, 0])
    lineage(tmp_path, data=equal, data_collator=default_data_collator, changes={"remove_unused_columns": False})


def test_a_cache_that_the_data_do_not_allow_is_refused_before_the_teacher_is_trained(tmp_path):
    with pytest.raises(ValueError, match="teacher_cache: got 'memory' beside a training set .Dataset. whose samples"):
        lineage(tmp_path, changes={"teacher_cache": "memory"}).run()
    assert not (tmp_path / "gen0").exists()
