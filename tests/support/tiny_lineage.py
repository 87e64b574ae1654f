"""A lineage of three generations that is trained in a moment."""

from __future__ import annotations

import torch
from helpers import arguments, sentences, sequence_classifier
from transformers import AutoModelForSequenceClassification, TrainerCallback

from born_again import BornAgainTrainer, LineageRunner, LineageSpec
from born_again.lineage.manifest import Manifest

STEPS = 6


class Crash(TrainerCallback):
    """What kill -9 leaves behind, as far as one process can show it."""

    def __init__(self, generation, step):
        self.generation, self.step = generation, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.output_dir.endswith(f"gen{self.generation}"):
            raise KeyboardInterrupt


def spec(**changes):
    values = {
        "name": "tiny-words",
        "model": "bert",
        "dataset": "words",
        "generations": 2,
        "objective": "ban+l",
        "seed": 3,
    }
    return LineageSpec(**{**values, **changes})


def runner(folder, *, crash=None, built=None, sentences_of="sequence", changes=(), **options):
    data = sentences(sentences_of)
    asked = options.pop("spec", spec())
    options.setdefault("data", {"sha256": "a", "rows": {"train": 22}})

    def build_student(generation):
        if built is not None:
            built.append(generation)
        model = sequence_classifier(torch.initial_seed())
        model.dropout.p = 0.2
        return model

    def build_trainer(student, teacher, generation):
        args = arguments(
            generation.checkpoint_dir,
            seed=generation.seed,
            **{
                "objective": asked.objective,
                "max_steps": STEPS,
                "save_strategy": "steps",
                "save_steps": 2,
                **dict(changes),
            },
        )
        callbacks = [] if crash is None else [crash]
        return BornAgainTrainer(
            student, args, teacher=teacher, train_dataset=data, eval_dataset={"test": data}, callbacks=callbacks
        )

    return LineageRunner(
        asked,
        folder,
        build_student=build_student,
        build_trainer=build_trainer,
        load_teacher=AutoModelForSequenceClassification.from_pretrained,
        **options,
    )


def hashes(folder):
    return [record["weights_sha256"] for record in Manifest.read(folder).generations]
