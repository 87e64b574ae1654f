"""Arrangements in which a state would meet another stream's words, teachers with other words, and the plateau."""

import pytest
import torch
from helpers import arguments, vectors
from torch import nn
from transformers import TrainerCallback
from windows import STREAMS, TOKENS, lstm, streams, text, trainer, weights

from born_again import BornAgainLMTrainer, BornAgainTrainingArguments
from born_again.data.text import word_tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_shuffled_dataset_is_refused_for_a_network_with_a_state(tmp_path):
    rows = [{"input_ids": text(8), "labels": text(8)} for _ in range(8)]
    ours = BornAgainLMTrainer(lstm(1), arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    with pytest.raises(
        ValueError, match="train_dataset: got list, which has no `streams`.*would be shuffled.*Streams"
    ):
        ours.train()
    with pytest.raises(ValueError, match="eval_dataset: got list, which has no `streams`"):
        ours.evaluate()
    with pytest.raises(ValueError, match="eval_dataset: got list, which has no `streams`"):
        ours.predict(rows)


def test_a_state_of_the_teacher_alone_needs_streams_too(tmp_path):
    rows = [{"input_ids": text(8), "labels": text(8)} for _ in range(8)]

    class Stateless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lstm(1)
            self.config = self.inner.config

        def forward(self, input_ids):
            return self.inner(input_ids).logits

    ours = BornAgainLMTrainer(Stateless(), arguments(tmp_path), teacher=lstm(2), train_dataset=rows)
    with pytest.raises(ValueError, match="has no `streams`"):
        ours.train()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_batches_that_are_not_one_window_of_every_stream_are_refused(tmp_path, split):
    ours = trainer(tmp_path, lstm(1), **{f"per_device_{split}_batch_size": 2})
    run = ours.train if split == "train" else ours.evaluate
    with pytest.raises(ValueError, match=f"per_device_{split}_batch_size: got 2 for 4 streams, expected 4"):
        run()


@pytest.mark.parametrize("name", ["auto_find_batch_size", "ignore_data_skip"])
def test_settings_that_lose_the_place_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: got True, expected False for a network that carries a state"):
        trainer(tmp_path, lstm(1), **{name: True}).get_train_dataloader()


class Processes:
    """Arguments as one of several processes sees them."""

    def __init__(self, args, world_size):
        self._args, self.world_size = args, world_size

    def __getattr__(self, name):
        return getattr(self._args, name)


def test_arrangements_of_processes_are_refused_with_the_setting_that_is_right(tmp_path):
    ours = trainer(tmp_path, lstm(1))
    ours.args = Processes(ours.args, 2)
    with pytest.raises(ValueError, match="got split_batches=False.*on 2 processes.*expected split_batches=True"):
        ours.get_train_dataloader()
    ours.args.accelerator_config.split_batches = True
    ours.args.accelerator_config.dispatch_batches = True
    with pytest.raises(ValueError, match="dispatch_batches=True on 2 processes.*dispatch_batches=None"):
        ours.get_eval_dataloader()
    ours.args.accelerator_config.dispatch_batches = None
    ours.args = Processes(ours.args, 3)
    with pytest.raises(ValueError, match="got 4 streams on 3 processes, expected a multiple of 3"):
        ours.get_train_dataloader()


def test_networks_without_a_state_may_read_anything(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lstm(1)
            self.config = self.inner.config

        def forward(self, input_ids):
            return self.inner(input_ids).logits

    rows = [{"input_ids": text(8, seed), "labels": text(8, seed + 1)} for seed in range(8)]
    ours = BornAgainLMTrainer(Plain(), arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    ours.train()
    assert ours.evaluate()["eval_tokens"] == 64


# ---- Teachers with other words ----


def test_a_teacher_with_another_number_of_words_is_refused(tmp_path):
    other = lstm(2)
    other.resize_token_embeddings(19)
    with pytest.raises(ValueError, match="teacher: has 19 tokens, the student 17"):
        trainer(tmp_path, lstm(1), other)


def test_a_teacher_with_other_words_is_refused(tmp_path):
    words = ["<eos>", *(f"word{index}" for index in range(16))]
    ours = word_tokenizer(words)
    swapped = word_tokenizer([*words[:3], words[4], words[3], *words[5:]])

    def pair(theirs):
        return trainer(
            tmp_path, lstm(1), lstm(2), processing_class=ours, teacher_processing_class=theirs
        )  # fmt: skip

    pair(word_tokenizer(words))
    with pytest.raises(ValueError, match="its tokenizer has 'word3' for id 3, the student's 'word2'.*one tokenizer"):
        pair(swapped)
    with pytest.raises(ValueError, match="its tokenizer has 16 tokens, the student's 17"):
        pair(word_tokenizer(words[:-1]))


# ---- The plateau ----


class Scores(TrainerCallback):
    """Puts chosen validation scores in the place of the measured ones, and keeps the learning rate of every step."""

    def __init__(self, scores):
        self.scores, self.rates = list(scores), []

    def attach(self, ours):
        evaluate = ours.evaluate

        def scored(*args, **kwargs):
            metrics = evaluate(*args, **kwargs)
            metrics["eval_perplexity"] = self.scores.pop(0)
            return metrics

        ours.evaluate = scored
        ours.add_callback(self)
        return ours

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


PLATEAU = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "metric_for_best_model": "perplexity",
    "greater_is_better": False,
    "num_train_epochs": 6,
    "learning_rate": 0.8,
    "lr_scheduler_type": "linear",
}


@pytest.mark.parametrize(
    ("factor", "gain", "scores", "rates"),
    [
        # Quartered whenever validation does not fall.
        (0.25, 0.0, [90, 80, 80, 79.9, 85, 70], [0.8, 0.8, 0.8, 0.2, 0.2, 0.05]),
        # Halved below a gain of 0.5 over the best so far.
        (0.5, 0.5, [90, 80, 79.8, 79.4, 70, 69.6], [0.8, 0.8, 0.8, 0.4, 0.4, 0.4]),
    ],
)
def test_the_learning_rate_falls_where_validation_stops_falling(tmp_path, factor, gain, scores, rates):
    settings = {**PLATEAU, "lr_plateau_factor": factor, "lr_plateau_gain": gain}

    def new():
        return trainer(tmp_path, lstm(1), **settings)

    watch = Scores(scores)
    whole = watch.attach(new())
    whole.train()
    windows = streams().windows
    assert watch.rates[::windows] == pytest.approx(rates)
    # And it survives a resume at the end of the third epoch.
    resumed = Scores(scores[3:])
    again = resumed.attach(new())
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{3 * windows}"))
    assert resumed.rates == watch.rates[3 * windows :]
    assert weights(again.model).equal(weights(whole.model))


def test_plateau_arguments_are_checked(tmp_path):
    def args(**changes):
        return arguments(tmp_path, **{"eval_strategy": "epoch", **changes})

    for factor in (0, 1, -0.5, 2):
        with pytest.raises(ValueError, match="lr_plateau_factor: got .*, expected a number between 0 and 1"):
            args(lr_plateau_factor=factor)
    for gain in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="lr_plateau_gain: got .*, expected a finite number of 0 or more"):
            args(lr_plateau_factor=0.5, lr_plateau_gain=gain)
    with pytest.raises(ValueError, match="lr_plateau_gain: got 0.5 without lr_plateau_factor"):
        args(lr_plateau_gain=0.5)
    with pytest.raises(ValueError, match="eval_strategy 'no'.*use eval_strategy='epoch'"):
        args(lr_plateau_factor=0.5, eval_strategy="no")
    with pytest.raises(ValueError, match="expected one of the two schedules"):
        args(lr_plateau_factor=0.5, lr_milestones=[0.5])
    with pytest.raises(ValueError, match="lr_plateau_factor: got 0.5 and lr_scheduler_type 'cosine'"):
        args(lr_plateau_factor=0.5, lr_scheduler_type="cosine")


def test_the_plateau_is_that_of_the_evaluation_loss_by_default(tmp_path):
    args = arguments(tmp_path, eval_strategy="epoch", lr_plateau_factor=0.5, lr_plateau_gain=0.1)
    assert args.metric_for_best_model == "loss" and args.greater_is_better is False
    assert args.lr_scheduler_kwargs["mode"] == "min" and args.lr_scheduler_kwargs["threshold"] == 0.1
    up = arguments(
        tmp_path,
        eval_strategy="epoch",
        lr_plateau_factor=0.5,
        metric_for_best_model="accuracy",
        greater_is_better=True,
    )
    assert up.lr_scheduler_kwargs["mode"] == "max"


def test_evaluations_decide_weights_where_the_learning_rate_hangs_on_them(tmp_path):
    def weight_affecting(**changes):
        return BornAgainTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **changes).weight_affecting()

    plain = weight_affecting(eval_strategy="epoch", per_device_eval_batch_size=3)
    assert not {"eval_strategy", "per_device_eval_batch_size"} & set(plain)
    for changes in ({"lr_plateau_factor": 0.5}, {"load_best_model_at_end": True, "save_strategy": "epoch"}):
        chosen = weight_affecting(eval_strategy="epoch", per_device_eval_batch_size=3, **changes)
        assert chosen["per_device_eval_batch_size"] == 3 and "epoch" in str(chosen["eval_strategy"])


def test_the_vectors_of_other_tests_are_no_text(tmp_path):
    """A batch without labels is named, also in evaluation."""
    rows = [{"x": row["x"]} for row in vectors(8)]

    class Reads(nn.Module):
        def forward(self, x):
            return x

    ours = BornAgainLMTrainer(Reads(), arguments(tmp_path, remove_unused_columns=False), eval_dataset=rows)
    with pytest.raises(ValueError, match="labels: a batch has only the keys x"):
        ours.evaluate()


def test_the_text_of_these_tests_has_a_ragged_end():
    data = streams()
    assert data.length % data.window and TOKENS % STREAMS


def test_settings_that_another_loss_would_read_are_refused_without_a_teacher_too(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor: got 1.5 in BornAgainLMTrainer, expected 0 to 1"):
        trainer(tmp_path, lstm(1), label_smoothing_factor=1.5)
