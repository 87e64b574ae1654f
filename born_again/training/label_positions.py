"""Which token each position of a text predicts, according to the labels, the student and its teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from born_again.objectives import IGNORED
from born_again.teacher import FrozenTeacher, vocabulary_size
from born_again.teacher.inputs import decoder_inputs, unwrapped
from born_again.training.network_loss import network_loss

# Labels from which on it is no chance that all are the ids: of the tokens that BERT's masking counts, a tenth are.
_ENOUGH = 8
_TO_SHIFT = (
    "expected the token after each position, labels[:, :-1] = input_ids[:, 1:] and -100 in the last, as "
    "born_again.data.streams.TokenStreams makes them for BornAgainLMTrainer; or a forward that takes labels and "
    "computes the loss that is meant"
)


class LabelPositionsMixin:
    """The part of BornAgainTrainer that detects, on the first batch, how student and teachers use labels."""

    def _detect_label_handling(self, inputs: Mapping[str, Any], labels: Tensor) -> None:
        """Detects on the first batch how the student's own loss, which is not used, comes from its logits.

        Raises:
            ValueError: it is more than a cross-entropy and an auxiliary loss, which would be lost. A teacher that
                predicts other tokens at its positions. Labels from which the student would learn to copy its input.
        """
        student, sharded = self._bare_student(), self.is_sharded
        batch, labels = self._prepare_inputs(inputs), self._prepare_input(labels)
        inputs = self._inputs_of_student(batch)
        weight = next(student.parameters(), labels)
        if weight.device != labels.device or (sharded and not self.accelerator._models):
            return  # not prepared yet, as where the teacher is measured first: a later batch tells
        with self.accelerator.autocast():
            found = network_loss(student, inputs, labels, self.label_names[0], self.model_wrapped if sharded else None)
        if not self._reads_streams:
            self._detect_label_shift(student, found.shifts_labels, self._student_inputs.main(inputs), batch, labels)
        self._network_loss = found

    def _detect_label_shift(
        self, student: nn.Module, shift: bool | None, ids: Any, batch: Mapping[str, Any], labels: Tensor
    ) -> None:
        if self.teacher is not None:
            check_decoder_inputs(student, self._teachers, batch, labels)
            with self._teacher_autocast():
                shift = shift_beside(self._frozen_teacher(), student, shift, batch, labels, ids)
        if shift is not None:
            self._shifts_labels = shift
        if (warning := copied_labels(student, self._shifts_labels or shift, ids, labels)) is not None:
            self._warn(warning)

    def _auxiliary_loss(self, outputs: Any) -> Tensor | None:
        """What the student would have added to its loss: a mixture of experts the balance of its router."""
        weight = 0.0 if self._network_loss is None else self._network_loss.auxiliary_weight
        return weight * outputs["aux_loss"] if weight else None


def shift_beside(
    teacher: FrozenTeacher,
    student: nn.Module,
    own: bool | None,
    inputs: Mapping[str, Any],
    labels: Tensor,
    ids: Any,
) -> bool | None:
    """Whether a student and all of its teachers compare the logits at position i with the label at i + 1.

    Args:
        teacher: placed on the device of the batch.
        student: unwrapped.
        own: of the student, see `born_again.training.network_loss.NetworkLoss.shifts_labels`.
        inputs: a batch without labels.
        labels: those of the batch.
        ids: the student's token ids, which tell whether the labels are already those of the position after.

    Returns:
        None where nobody tells.

    Raises:
        ValueError: they do not agree, so that the student would be taught to predict other tokens than its
            labels.
    """
    said = {} if own is None else {own: f"the student, {_kind(student)}"}
    if labels.dim() != 2:
        return own
    for index, module in enumerate(teacher.modules):
        if vocabulary_size(module) is None or type(unwrapped(module)) is type(unwrapped(student)):
            continue
        teacher.prepare(inputs)
        network = teacher.modules[index]  # perhaps a folded copy
        try:
            with teacher.precision_context():
                shift = network_loss(network, teacher.arguments(index, inputs), labels).shifts_labels
        except ValueError:
            continue  # a loss that is more than that of its labels is of no interest in a teacher
        if shift is not None:
            said.setdefault(shift, f"the teacher, {_kind(network)}")
    if len(said) < 2:
        return next(iter(said), None)
    if labels_behind(ids, labels) == 1:
        return False  # all read labels that are shifted in the data
    raise ValueError(
        f"teacher: {said[True]} predicts at each position the token after it, and {said[False]} that of the position "
        "itself, so the student would be taught to predict other tokens than its labels are; expected a teacher and a "
        "student that both are causal language models, or both are not."
    )


def copied_labels(student: nn.Module, shift: bool | None, ids: Any, labels: Tensor) -> str | None:
    """A warning where a network would learn to copy its input, since the labels are its token ids.

    Args:
        student: unwrapped.
        shift: see `shift_beside`.
        ids: its token ids, or whatever it reads.
        labels: of the same batch.

    Returns:
        A warning, where the network's own loss says that this may be meant; None where all is well.

    Raises:
        ValueError: nothing says so.
    """
    behind = labels_behind(ids, labels)
    if shift and behind == 1:
        return (
            f"labels: are already the token after each position, and {_kind(student)} shifts them once more: it is "
            "trained to predict the token after the next. Give it labels equal to input_ids."
        )
    if shift or behind != 0 or getattr(getattr(student, "config", None), "is_encoder_decoder", False):
        return None
    text = f"labels: are the token ids that {_kind(student)} reads at the same positions"
    if shift is None:
        raise ValueError(
            f"{text}, and neither it, whose forward computes no loss of them, nor a teacher shifts them: it would "
            f"learn to copy its input; {_TO_SHIFT}."
        )
    return (
        f"{text}, which its own loss does not shift: it learns to copy its input. If that is not meant: {_TO_SHIFT}."
    )


def labels_behind(ids: Any, labels: Tensor) -> int | None:
    """How many positions behind the token ids the labels are: 0 or 1, None for other labels and for few.

    Args:
        ids: (rows, time) int64, or anything else.
        labels: (rows, time), -100 where ignored.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or labels.dim() != 2 or ids.shape != labels.shape:
        return None
    for behind in (0, 1):
        here = labels[:, : labels.shape[1] - behind]
        counted = here != IGNORED
        if counted.sum() >= _ENOUGH and (here == ids[:, behind:])[counted].all():
            return behind
    return None


def check_decoder_inputs(
    student: nn.Module, teachers: Sequence[nn.Module], inputs: Mapping[str, Any], labels: Tensor
) -> None:
    """Refuses decoder inputs in a batch that were made for one encoder-decoder and would be read by another kind.

    Args:
        student: unwrapped.
        teachers: beside it.
        inputs: a batch without labels.
        labels: those of the batch.

    Raises:
        ValueError: the networks make other decoder inputs of labels, as with another decoder_start_token_id.
    """
    if inputs.get("decoder_input_ids") is None:
        return
    first = None
    for role, network in (("student", student), *(("teacher", module) for module in teachers)):
        made = decoder_inputs(network, {}, labels[:1].clamp_min(0)).get("decoder_input_ids")
        if made is None:
            continue
        first = first or (role, network, made)
        if not made.equal(first[2]):
            begin = [f"{_kind(of)} (the {whose}) with {ids[0, :2].tolist()}" for whose, of, ids in
                     (first, (role, network, made))]  # fmt: skip
            raise ValueError(
                "teacher: a batch has decoder_input_ids, and teacher and student make other ones of its labels: those "
                f"of {begin[0]} begin, those of {begin[1]}; expected none in the batch, so that each network is given "
                "its own (DataCollatorForSeq2Seq without model), or one decoder_start_token_id in both configs."
            )


def _kind(network: nn.Module) -> str:
    return type(unwrapped(network)).__name__
