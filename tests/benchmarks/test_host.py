"""What a step dispatches and calls, counted: the bounds that keep the host's time from creeping back."""

import pytest
import torch
from transformers import Trainer

from tests.benchmarks.host import LAST_COUNTED, TASKS, VARIANTS, count


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def per_step(task, variant, calls):
    counter = count(TASKS[task](LAST_COUNTED + 1), VARIANTS[variant], calls)
    assert counter.counts
    return counter.counts.total() / counter.steps


@pytest.mark.parametrize("task", TASKS)
def test_a_taught_step_dispatches_hardly_more_than_a_bare_loop(task):
    loop, ours = (per_step(task, variant, calls=False) for variant in ("loop, taught", "ours, taught"))
    assert loop < ours <= 1.1 * loop


@pytest.mark.parametrize("task", ["mlp", "wide_resnet"])
def test_a_step_on_labels_dispatches_less_than_trainers(task):
    loop, stock, ours = (
        per_step(task, variant, calls=False) for variant in ("loop, labels", "Trainer", "ours, labels")
    )
    assert loop < ours < stock


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="an older Trainer takes its own steps")
def test_beyond_a_bare_loop_a_step_calls_less_than_half_of_what_trainers_calls():
    loop, stock, ours = (
        per_step("mlp", variant, calls=True) for variant in ("loop, labels", "Trainer", "ours, labels")
    )
    assert ours - loop < 0.5 * (stock - loop)


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="an older Trainer takes its own steps")
@pytest.mark.parametrize("task", ["mlp", "lstm"])
def test_a_teacher_adds_few_calls(task):
    labels, taught = (
        per_step(task, f"ours, {what}", calls=True) - per_step(task, f"loop, {what}", calls=True)
        for what in ("labels", "taught")
    )
    assert taught - labels < 200
