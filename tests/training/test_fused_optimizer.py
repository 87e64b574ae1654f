"""The fused form of the optimizer: the same update but for rounding, chosen once for a lineage."""

from types import SimpleNamespace

import pytest
import torch
from helpers import Network, arguments, vectors
from torch import nn

from born_again import BornAgainTrainer, LineageSpec
from born_again.hub import launch
from born_again.hub.launch import LineageFlags, resume_lineage
from born_again.lineage.machine import describe_computation
from born_again.lineage.manifest import Manifest
from born_again.training.fused_optimizer import _align_gradients, should_fuse

KINDS = {
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "weight_decay": 5e-4},
    "adamw": {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1},
}


def trained(folder, **changes):
    trainer = BornAgainTrainer(Network(1), arguments(folder, **changes), train_dataset=vectors(), teacher=Network(2))
    trainer.train()
    return trainer, nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_the_optimizer_but_for_rounding(tmp_path, kind):
    plain, expected = trained(tmp_path, **KINDS[kind])
    fused, weights = trained(tmp_path, **KINDS[kind], fused_optimizer=True)
    assert [one.optimizer.optimizer.defaults["fused"] for one in (plain, fused)] == [None, True]
    start = nn.utils.parameters_to_vector(Network(1).parameters()).detach()
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-14)  # in float64
    assert (weights - start).abs().max() > 1e-3
    assert describe_computation(fused.args).count("fused optimizer") == 1
    assert "fused" not in describe_computation(plain.args)
    assert fused.args.weight_affecting() == {**plain.args.weight_affecting(), "fused_optimizer": True}


def test_a_fused_optimizer_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fused_optimizer: got True with optim 'adafactor', expected 'sgd' or 'adamw"):
        arguments(tmp_path, optim="adafactor", fused_optimizer=True)


@pytest.mark.parametrize(
    ("device", "precision", "optim", "expected"),
    [
        ("cuda", "bf16", "sgd", True),
        ("cuda", "no", "adamw_torch", True),
        ("cuda", "fp16", "sgd", False),
        ("cuda", "bf16", "adamw_torch_fused", False),  # is already
        ("cuda", "bf16", "adafactor", False),
        ("cpu", "bf16", "sgd", False),  # whose lineages go on to the same weights
    ],
)
def test_where_a_new_lineage_has_it(device, precision, optim, expected):
    args = SimpleNamespace(device=torch.device(device), mixed_precision=precision, optim=optim)
    assert should_fuse(args) is expected


@pytest.mark.parametrize("begun", [None, False, True])
@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("given", [None, False, True])
def test_a_lineage_goes_on_as_it_was_begun(tmp_path, monkeypatch, begun, here, given):
    monkeypatch.setattr(launch, "should_fuse", lambda args: here)
    if begun is not None:  # None begins one
        training = {"learning_rate": 0.1, **({"fused_optimizer": True} if begun else {})}
        Manifest.create(tmp_path, LineageSpec("tiny", "bert", "words", training=training), {}).save()
    flags = LineageFlags(name="tiny")
    flags.given = frozenset() if given is None else frozenset({"fused_optimizer"})
    args = arguments(tmp_path, **({} if given is None else {"fused_optimizer": given}))
    resume_lineage(flags, args)
    expected = given if given is not None else here if begun is None else begun
    assert args.fused_optimizer is expected


def test_gradients_get_the_strides_of_their_parameters():
    """A product of this shape gives a gradient other strides in an axis of length 1."""
    weight = nn.Parameter(torch.zeros(2, 1, 100))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    _align_gradients(optimizer)
    torch.bmm(torch.rand(2, 10, 100), weight.transpose(1, 2)).sum().backward()
    gradient = weight.grad.clone()
    assert weight.grad.stride() != weight.stride()
    optimizer.step()
    assert weight.grad.stride() == weight.stride() and torch.equal(weight.grad, gradient)
    assert torch.equal(weight.detach(), -0.1 * gradient)


@pytest.mark.parametrize("begun", [False, True])
def test_a_training_that_goes_on_in_another_form_says_so(tmp_path, begun, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, **KINDS["sgd"], **saving, fused_optimizer=begun)
    assert "fused_optimizer: got" not in caplog.text
    args = arguments(tmp_path, **KINDS["sgd"], fused_optimizer=not begun)
    trainer = BornAgainTrainer(Network(1), args, train_dataset=vectors(), teacher=Network(2))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert f"fused_optimizer: got {not begun}, but " in caplog.text and f"written with {begun}" in caplog.text
