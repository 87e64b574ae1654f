"""The carried state: against a plain loop, across evaluations, checkpoints, accumulation and epochs."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments, language_model, sentences
from torch import nn
from transformers import TrainerCallback
from windows import STREAMS, TOKENS, WINDOW, WORDS, lstm, streams, text, trainer, weights

from born_again import BornAgainLMTrainer
from born_again.data.streams import TokenStreams
from born_again.metrics import language_model_metrics
from born_again.objectives import objective_items


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small gain nothing from a second one."""
    torch.set_num_threads(1)


def batches(data: TokenStreams) -> list[dict[str, torch.Tensor]]:
    rows = data.streams
    return [data.__getitems__(range(rows * window, rows * (window + 1))) for window in range(data.windows)]


def plain_loop(student, teacher, data, objective, accumulate=1, epochs=2, lr=0.5, clip=0.25):
    """What a language modeller would write by hand: truncated backpropagation, two states, a mean over tokens."""
    student.train()
    teacher = None if teacher is None else teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    steps = epochs * math.ceil(data.windows / accumulate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        ours = theirs = None
        windows = batches(data)
        for start in range(0, len(windows), accumulate):
            total, weight = 0.0, 0.0
            for batch in windows[start : start + accumulate]:
                output = student(batch["input_ids"], state=ours)
                ours = tuple(part.detach() for part in output.state)
                answer = None
                if teacher is not None:
                    with torch.no_grad():
                        answered = teacher(batch["input_ids"], state=theirs)
                    theirs, answer = answered.state, answered.logits.flatten(0, 1)
                losses, weights = objective_items(
                    objective, output.logits.flatten(0, 1), answer, batch["labels"].flatten()
                )
                total, weight = total + (losses * weights).sum(), weight + weights.sum()
            optimizer.zero_grad()
            (total / weight).backward()
            nn.utils.clip_grad_norm_(student.parameters(), clip)
            optimizer.step()
            schedule.step()
    return student


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", ["label", "ban", "ban+l", "cwtm"])
def test_training_is_a_plain_loop_over_carried_windows(tmp_path, objective, accumulate):
    taught = objective != "label"
    expected = plain_loop(lstm(1), lstm(2, units=6) if taught else None, streams(), objective, accumulate)
    ours = trainer(
        tmp_path,
        lstm(1),
        lstm(2, units=6) if taught else None,
        objective=objective if taught else "ban+l",
        gradient_accumulation_steps=accumulate,
    )
    ours.train()
    assert not torch.allclose(weights(ours.model), weights(lstm(1)), atol=1e-3)
    torch.testing.assert_close(weights(ours.model), weights(expected), rtol=0, atol=1e-10)


def test_a_state_that_was_not_carried_would_be_seen(tmp_path):
    """The twin above can fail: windows read from a zero state give other weights."""
    carried = plain_loop(lstm(1), None, streams(), "label")
    forgetful = lstm(1)
    forward = forgetful.forward
    forgetful.forward = lambda input_ids, state=None: forward(input_ids)
    plain_loop(forgetful, None, streams(), "label")
    assert (weights(carried) - weights(forgetful)).abs().max() > 1e-4


class Spy(nn.Module):
    """An LSTM that remembers the states it was called with."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.seen = inner, inner.config, []

    def forward(self, input_ids, state=None):
        output = self.inner(input_ids, state=state)
        self.seen.append((self.training, state, output.state))
        return output


def test_each_network_gets_its_own_state_detached_and_anew_in_every_epoch(tmp_path):
    student, teachers = Spy(lstm(1)), [Spy(lstm(2)), Spy(lstm(3))]
    trainer(tmp_path, student, teachers).train()
    per_epoch = streams().windows
    for network in (student, *teachers):
        training = [(before, after) for trains, before, after in network.seen if trains]
        read = training if network is student else [seen[1:] for seen in network.seen[-2 * per_epoch :]]
        assert len(read) == 2 * per_epoch
        for step, (before, _) in enumerate(read):
            if step % per_epoch == 0:
                assert before is None
                continue
            for part, left in zip(before, read[step - 1][1], strict=True):
                assert part.equal(left) and not part.requires_grad
    ours, theirs = student.seen[-1][2], teachers[0].seen[-1][2]
    assert not any(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("objective", ["ban+l", "cwtm"])
def test_evaluation_between_windows_changes_nothing(tmp_path, objective):
    def trained(folder, **changes):
        ours = trainer(folder, lstm(1, dropout=0.4), lstm(2), objective=objective, **changes)
        ours.train()
        return ours

    without = trained(tmp_path / "without")
    # Another text, another number of streams, in the middle of epochs and of accumulations.
    between = trained(tmp_path / "between", eval_strategy="steps", eval_steps=2)
    assert len([entry for entry in between.state.log_history if "eval_loss" in entry]) == 9
    assert weights(between.model).equal(weights(without.model))


@pytest.mark.slow_but_for("ban+l-2")
@pytest.mark.parametrize(
    ("objective", "accumulate"), [("label", 1), ("ban+l", 1), ("ban+l", 2), ("cwtm", 2), ("dkpp", 1)]
)
def test_resume_in_the_middle_of_an_epoch_is_bit_equal(tmp_path, objective, accumulate):
    taught = objective != "label"

    def new(folder, **changes):
        return trainer(
            folder,
            lstm(1, dropout=0.4, recurrent_dropconnect=0.2, locked_dropout_states=0.1),
            lstm(2) if taught else None,
            objective=objective if taught else "ban+l",
            gradient_accumulation_steps=accumulate,
            save_strategy="steps",
            save_steps=3,
            **changes,
        )

    whole = new(tmp_path / "whole")
    whole.train()
    steps = whole.state.global_step
    assert steps == 2 * math.ceil(streams().windows / accumulate)
    # In the first epoch, at its end or just after it, in the second.
    for step in sorted({3, -(-steps // 6) * 3, steps // 6 * 3 + 3} - {steps}):
        again = new(tmp_path / f"again{step}")
        again.model.apply(lambda module: [parameter.data.zero_() for parameter in module.parameters(recurse=False)])
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.state.global_step == steps
        assert weights(again.model).equal(weights(whole.model)), step


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_checkpoint_without_its_state_is_refused(tmp_path):
    first = trainer(tmp_path, lstm(1), save_strategy="steps", save_steps=4, callbacks=[StopAt(4)])
    first.train()
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "carried_state_0_of_1.safetensors").unlink()
    with pytest.raises(
        ValueError, match="checkpoint-4 has no carried_state_0_of_1.safetensors, expected the state of every process"
    ):
        trainer(tmp_path, lstm(1)).train(resume_from_checkpoint=str(checkpoint))


# ---- Evaluation ----


@pytest.mark.parametrize("taught", [False, True])
def test_evaluation_is_one_forward_over_each_stream(tmp_path, taught):
    ours = trainer(tmp_path, lstm(1, dropout=0.5), lstm(2) if taught else None)
    data = ours.eval_dataset
    inputs = torch.cat([batch["input_ids"] for batch in batches(data)], 1)
    labels = torch.cat([batch["labels"] for batch in batches(data)], 1)
    with torch.no_grad():
        logits = ours.model.eval()(inputs).logits
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    metrics = ours.evaluate()
    assert metrics["eval_tokens"] == TOKENS == (labels != -100).sum()
    assert metrics["eval_loss"] == metrics["eval_nll"] == pytest.approx(nll, abs=1e-10)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll), abs=1e-9)
    # Not a mean over batches, of which the last is smaller.
    by_batch = [
        F.cross_entropy(
            logits[:, a : a + WINDOW].flatten(0, 1), labels[:, a : a + WINDOW].flatten(), ignore_index=-100
        )
        for a in range(0, data.length, WINDOW)
    ]
    assert abs(nll - torch.stack(by_batch).mean().item()) > 1e-6
    # And again the same, with and without training in between.
    assert ours.evaluate()["eval_loss"] == metrics["eval_loss"]
    ours.train()
    assert ours.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"] != metrics["eval_loss"]


def test_predict_gives_the_loss_of_every_token_and_never_logits(tmp_path):
    ours = trainer(tmp_path, lstm(1), compute_metrics=language_model_metrics())
    data = streams(seed=7)
    output = ours.predict(data)
    assert output.predictions.shape == output.label_ids.shape == (len(data), WINDOW)
    counted = output.label_ids != -100
    assert counted.sum() == TOKENS == output.metrics["test_tokens"]
    assert output.predictions[counted].mean() == pytest.approx(output.metrics["test_nll"], abs=1e-10)
    assert output.metrics["test_loss"] == output.metrics["test_nll"] == ours.evaluate(data)["eval_loss"]
    assert list(output.label_ids[:STREAMS][0]) == data.__getitem__(0)["labels"].tolist()


def test_evaluation_keeps_no_logits(tmp_path):
    class Watch(Spy):
        largest = 0

        def forward(self, input_ids, state=None):
            output = super().forward(input_ids, state)
            Watch.largest = max(Watch.largest, output.logits.numel())
            return output

    held = []
    ours = trainer(tmp_path, Watch(lstm(1)))
    step = ours.prediction_step

    def spied(*args, **kwargs):
        result = step(*args, **kwargs)
        held.append(max((part.numel() for part in result if part is not None), default=0))
        return result

    ours.prediction_step = spied
    ours.evaluate()
    ours.predict(streams(seed=7))
    assert max(held) == STREAMS * WINDOW and Watch.largest == STREAMS * WINDOW * WORDS


def test_the_state_is_not_gathered_by_a_stock_trainer():
    assert "state" in lstm(1).config.keys_to_ignore_at_inference


# ---- Networks without a state ----


class Windows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_transformers_read_every_window_on_its_own(tmp_path):
    data = TokenStreams(text() % 16, STREAMS, WINDOW, before=0)
    ours = trainer(tmp_path, language_model(1), language_model(2), train=data, evaluated=data, num_train_epochs=1)
    before = language_model(1)
    nll = [
        F.cross_entropy(
            before(batch["input_ids"]).logits.flatten(0, 1),
            batch["labels"].flatten(),
            reduction="sum",
            ignore_index=-100,
        )
        for batch in batches(data)
    ]
    assert ours.evaluate()["eval_loss"] == pytest.approx(sum(nll).item() / TOKENS, abs=1e-10)
    first = []
    ours.add_callback(type("First", (TrainerCallback,), {"on_step_end": lambda *a, **k: first.append(1)}))
    ours.train()
    assert len(first) == data.windows and ours._carried.student is None
    assert ours.evaluate()["eval_loss"] < sum(nll).item() / TOKENS


def test_padded_sentences_are_shifted_as_transformers_shifts_them(tmp_path):
    data = sentences("next")
    ours = BornAgainLMTrainer(
        language_model(1),
        arguments(tmp_path, objective="ban+l", per_device_eval_batch_size=4, teacher_accuracy_samples=2048),
        teacher=language_model(2),
        train_dataset=data,
        eval_dataset=data,
    )
    total = tokens = 0
    for row in data:
        batch = {name: value[None] for name, value in row.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = language_model(1)(**batch).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100).item()
        tokens += int((labels != -100).sum())
    metrics = ours.evaluate()
    assert metrics["eval_tokens"] == tokens
    assert metrics["eval_loss"] == pytest.approx(total / tokens, abs=1e-10)
    ours.train()
    assert ours.teacher_train_metrics["tokens"] == tokens


def test_the_train_metrics_of_the_teacher_are_its_perplexity(tmp_path):
    ours = trainer(tmp_path, lstm(1), lstm(2), teacher_accuracy_samples=2048)
    twin = trainer(tmp_path, lstm(2), evaluated=streams())
    ours.train()
    assert ours.teacher_train_metrics == pytest.approx(
        {"nll": twin.evaluate()["eval_nll"], "perplexity": twin.evaluate()["eval_perplexity"], "tokens": TOKENS}
    )


@pytest.mark.parametrize("objective", ["ban", "dkpp"])
def test_a_recurrent_student_without_labels_is_warned_of(tmp_path, caplog, objective):
    with caplog.at_level("WARNING"):
        trainer(tmp_path, lstm(1), lstm(2), objective=objective).train()
    assert "only 'ban+l' worked in the paper" in caplog.text
