"""A folded teacher, or one in float32, has the logits that it has under autocast, and is a private copy."""

import copy

import pytest
import torch
from helpers import (
    Network,
    arguments,
    language_model,
    llama,
    sentences,
    sequence_classifier,
    vectors,
)
from torch import nn

from born_again import BornAgainLMTrainer, BornAgainTrainer, LstmLMConfig, LstmLMForCausalLM, create_image_classifier
from born_again.data.streams import TokenStreams, collate_windows
from born_again.teacher import FrozenTeacher, mean_log_probabilities

CPU = torch.device("cpu")


def classifier(name="test_wide_resnet_cifar", seed=1):
    torch.manual_seed(seed)
    network = create_image_classifier(name, [str(label) for label in range(10)], (0.5,) * 3, (0.25,) * 3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a training leaves it
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return network


def recurrent(seed=1):
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=23, embedding_size=16, hidden_size=24, num_layers=2))


def pixels(rows=8):
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


def words(rows=4):
    return {"input_ids": torch.randint(1, 23, (rows, 10), generator=torch.Generator().manual_seed(2))}


CASES = {
    "wide-resnet": (classifier, pixels),
    "densenet": (lambda: classifier("test_densenet_cifar"), pixels),
    "lstm": (recurrent, words),
    "gpt2": (lambda: language_model(1).float(), words),
    "llama": (lambda: llama(1).float(), words),
    "bert": (lambda: sequence_classifier(1).float(), words),
}


def answers(network, inputs, precision, dtype=None, calls=1):
    """The logits as a trainer gets them, in the autocast of a bf16 student where a dtype is given."""
    teacher = FrozenTeacher(network).set_precision(precision, dtype).to(CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        return [teacher(inputs) for _ in range(calls)][-1]


@pytest.mark.parametrize("case", CASES)
def test_the_forms_agree(case):
    network, inputs = (make() for make in CASES[case])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = network.eval()(**inputs).logits.detach()
    folded = answers(network, inputs, "inference", calls=2)
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    full = answers(network, inputs, "float32", torch.bfloat16)
    assert full.dtype == torch.float32 and torch.equal(full, plain)
    small = answers(network, inputs, "inference", torch.bfloat16)
    assert small.dtype == torch.bfloat16
    error, usual = (small - plain).norm(), (answers(network, inputs, "autocast", torch.bfloat16) - plain).norm()
    assert 0 < error < 2 * usual  # as near to float32 as autocast is
    after = network.state_dict()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())


def test_each_member_of_an_ensemble_is_folded():
    members, inputs = [classifier(seed=1), classifier("test_densenet_cifar", seed=2)], pixels()
    teacher = FrozenTeacher(members).set_precision("inference").to(CPU, torch.channels_last)
    expected = mean_log_probabilities([member(**inputs).logits for member in members])
    torch.testing.assert_close(teacher(inputs), expected, rtol=1e-5, atol=1e-5)
    norms = [sum(isinstance(part, nn.BatchNorm2d) for part in module.modules()) for module in members]
    left = [sum(isinstance(part, nn.BatchNorm2d) for part in module.modules()) for module in teacher.modules]
    assert all(a < b for a, b in zip(left, norms, strict=True))
    assert not {id(module) for module in teacher.modules} & {id(module) for module in members}


def test_what_needs_its_digits_keeps_them():
    teacher = FrozenTeacher(classifier()).set_precision("inference", torch.bfloat16).to(CPU)
    teacher(pixels())
    kinds = {nn.BatchNorm2d: torch.float32, nn.Conv2d: torch.bfloat16, nn.Linear: torch.bfloat16}
    for kind, dtype in kinds.items():
        assert {part.weight.dtype for part in teacher.modules[0].modules() if isinstance(part, kind)} == {dtype}
    teacher = FrozenTeacher(llama(1).float()).set_precision("inference", torch.bfloat16).to(CPU)
    teacher(words())
    assert teacher.modules[0].model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_state_is_carried_in_the_dtype_of_the_folded_copy():
    network, inputs = recurrent(), words()
    teacher = FrozenTeacher(network).set_precision("inference", torch.bfloat16).to(CPU)
    first = {"input_ids": inputs["input_ids"][:, :5]}
    second = {"input_ids": inputs["input_ids"][:, 5:]}
    _, states = teacher.forward_with_states(first, [None])
    assert {part.dtype for part in states[0]} == {torch.bfloat16}
    parts, _ = teacher.forward_with_states(second, states)
    torch.testing.assert_close(parts, teacher(inputs)[:, 5:], rtol=0.02, atol=0.002)
    # A state of another dtype, such as one that autocast left, is taken too.
    again, _ = teacher.forward_with_states(second, [tuple(part.float() for part in states[0])])
    assert torch.equal(again, parts)


def test_float32_widens_a_private_copy_of_narrow_weights():
    network = classifier().to(torch.bfloat16)
    teacher = FrozenTeacher(network).set_precision("float32", torch.bfloat16).to(CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(pixels()).dtype == torch.float32
    assert next(network.parameters()).dtype == torch.bfloat16


def test_a_teacher_that_cannot_be_copied_is_refused():
    class Stubborn(Network):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    teacher = FrozenTeacher(Stubborn(1)).set_precision("inference").to(CPU)
    with pytest.raises(ValueError, match="teacher_precision: .* Stubborn cannot be copied .no copies.; expected"):
        teacher({"x": vectors()[0]["x"]})


def test_the_trainer_passes_it_on(tmp_path):
    weights = {}
    for precision in ("autocast", "inference", "float32"):
        seen = []
        teacher = sequence_classifier(2).float()
        teacher.classifier.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.dtype))
        student = sequence_classifier(1).float()
        args = arguments(tmp_path, bf16=True, teacher_precision=precision)
        BornAgainTrainer(student, args, train_dataset=sentences("sequence"), teacher=teacher).train()
        assert set(seen) == {torch.float32 if precision == "float32" else torch.bfloat16}
        assert next(teacher.parameters()).dtype == torch.float32
        weights[precision] = student.classifier.weight.detach()
    assert len({weight.numpy().tobytes() for weight in weights.values()}) == 3
    spread = (weights["autocast"] - weights["float32"]).norm()
    assert (weights["inference"] - weights["float32"]).norm() < 3 * spread


def test_a_language_model_resumes_to_the_bit_with_its_teachers_state(tmp_path):
    data = TokenStreams(torch.randint(23, (4 * 7 * 6,)), 4, 7, before=0)
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        settings = {"objective": "ban+l", "save_strategy": "steps", "save_steps": 4, "max_steps": 6}
        args = arguments(
            tmp_path,
            bf16=True,
            teacher_precision="inference",
            per_device_train_batch_size=4,
            remove_unused_columns=False,
            **settings,
        )
        trainer = BornAgainLMTrainer(
            recurrent(1), args, teacher=recurrent(2), train_dataset=data, data_collator=collate_windows
        )
        trainer.train(resume_from_checkpoint=resume)
        weights.append(copy.deepcopy(trainer.model.state_dict()))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_it_is_part_of_the_experiment_and_checked(tmp_path):
    assert "teacher_precision" not in arguments(tmp_path).weight_affecting()
    assert arguments(tmp_path, teacher_precision="inference").weight_affecting()["teacher_precision"] == "inference"
    message = "teacher_precision: got 'inferense', expected one of 'autocast', 'inference', 'float32'; did you mean"
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, teacher_precision="inferense")
