"""Lineages of tiny networks on an engine, for test_engines.py.

torchrun --nproc_per_node N tests/support/engine_lineages.py FOLDER ENGINE PART...
"""

import os
import signal
import sys
from pathlib import Path

import torch
from engines import prepare
from helpers import arguments, language_model, sentences
from processes import leave
from tiny_lineage import Crash
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from born_again import (
    BornAgainLMTrainer,
    BornAgainTrainer,
    LineageRunner,
    LineageSpec,
    create_image_classifier,
)
from born_again.models.image_classifier import save_image_classifier
from born_again.training.sharding import local_part

STEPS = 6
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def dtype_of(changes: dict) -> torch.dtype:
    """That of the weights: DeepSpeed trains in float32 at most."""
    return changes.pop("dtype", torch.float32 if "deepspeed" in changes else torch.float64)


def settings(**changes) -> dict:
    return {
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,  # else gradients of almost zero, with their rounding, move weights as others do
        "learning_rate": 0.01,
        "objective": "ban+l",
        "max_steps": STEPS,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 8 // PROCESSES,
        "per_device_eval_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        **changes,
    }


def text_lineage(folder: Path, generations: int = 1, callbacks=(), **changes) -> LineageRunner:
    """Of a GPT-2 with tied embeddings, on texts of their own lengths."""
    data, dtype = sentences("next", 24), dtype_of(changes)

    def build_trainer(student, teacher, generation):
        args = arguments(generation.checkpoint_dir, **settings(seed=generation.seed, **changes))
        return BornAgainLMTrainer(
            student,
            args,
            teacher=teacher,
            train_dataset=data,
            eval_dataset={"test": data},
            callbacks=list(callbacks),
        )

    return LineageRunner(
        LineageSpec("tiny", "gpt2", "words", generations=generations, objective="ban+l", seed=3),
        folder,
        build_student=lambda generation: language_model(torch.initial_seed()).to(dtype),
        build_trainer=build_trainer,
        load_teacher=AutoModelForCausalLM.from_pretrained,
        data={"sha256": "a", "rows": {"train": 24}},
    )


def image_lineage(folder: Path, **changes) -> LineageRunner:
    """Of a vision transformer of timm, one student."""
    generator, dtype = torch.Generator().manual_seed(1), dtype_of(changes)
    data = [
        {
            "pixel_values": torch.randn(3, 32, 32, dtype=torch.float64, generator=generator).to(dtype),
            "labels": torch.tensor(row % 3),
        }
        for row in range(16)
    ]

    def build_trainer(student, teacher, generation):
        args = arguments(
            generation.checkpoint_dir,
            **settings(seed=generation.seed, learning_rate=1e-3, channels_last=True, **changes),
        )
        return BornAgainTrainer(student, args, teacher=teacher, train_dataset=data, eval_dataset={"test": data})

    return LineageRunner(
        LineageSpec("tiny", "test_vit", "noise", generations=1, objective="ban+l", seed=3),
        folder,
        build_student=lambda generation: create_image_classifier(
            "test_vit", list("abc"), [0.5] * 3, [0.2] * 3, img_size=32, depth=2
        ).to(dtype),
        build_trainer=build_trainer,
        load_teacher=AutoModelForImageClassification.from_pretrained,
        save_student=save_image_classifier,
        data={"sha256": "a", "rows": {"train": 16}},
    )


def finished(lineage: LineageRunner) -> dict:
    """What a lineage ended with; resumed where a crash ends it."""
    try:
        manifest = lineage.run()
    except KeyboardInterrupt:
        return {"crashed": torch.tensor(1)}
    keys = ("weights_sha256", "parameters", "metrics", "teacher_fit", "train_fit")
    return {"records": [{key: record.get(key) for key in keys} for record in manifest.generations]}


def crashed_and_resumed(folder: Path, generation: int, **changes) -> dict:
    first = finished(text_lineage(folder, callbacks=[Crash(generation, 5)], **changes))
    assert "crashed" in first
    return finished(text_lineage(folder, **changes))


class Kill(Crash):
    """kill -9 of the last process, while the others train on."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == PROCESSES - 1:
            try:
                super().on_step_end(args, state, control, **kwargs)
            except KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGKILL)


def is_in_shards(parameter: torch.Tensor) -> bool:
    """Where ZeRO-2 keeps the optimizer state in shards, weights are whole."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def trainer_of(folder: Path, **changes) -> BornAgainLMTrainer:
    data, dtype = sentences("next", 24), dtype_of(changes)
    args = arguments(folder, **settings(save_strategy="no", **changes))
    student, teacher = (language_model(seed).to(dtype) for seed in (1, 2))
    return BornAgainLMTrainer(student, args, teacher=teacher, train_dataset=data, eval_dataset=data)


def measured_first(folder: Path, **changes) -> dict:
    """A training that is evaluated before it begins, and where its teacher is."""
    trainer = trainer_of(folder, **changes)
    found = {"before": trainer.evaluate()["eval_loss"], "again": trainer.evaluate()["eval_loss"]}
    trainer.train()
    found["after"] = trainer.evaluate()["eval_loss"]
    found["student_in_shards"] = any(map(is_in_shards, trainer.model.parameters()))
    found["teacher_in_shards"] = any(map(is_in_shards, trainer.teacher.modules[0].parameters()))
    trainer.teacher.check_against(trainer.model)  # as a student of model_init is
    found["student_fit"] = BornAgainTrainer.evaluate_student(trainer)
    found["infinite"] = refused_weights(trainer)
    return found


def refused_weights(trainer: BornAgainLMTrainer) -> str:
    """What is raised on this process where the last one alone has an infinite weight."""
    last = local_part(trainer.model.transformer.h[0].mlp.c_proj.weight)
    with torch.no_grad():
        last.view(-1)[-1] = torch.inf if trainer.args.process_index == PROCESSES - 1 else 0.0
    try:
        trainer._check_weights()
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def narrow(folder: Path, **changes) -> dict:
    """In bfloat16: a lineage of images, and evaluations before and after a training."""
    changes |= {"bf16": True, "dtype": torch.float32}
    found = finished(image_lineage(folder, **changes))
    trainer = trainer_of(folder / "measured", **changes)
    found["before"] = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {**found, "after": trainer.evaluate()["eval_loss"]}


PARTS = {
    "text": lambda folder, **engine: finished(text_lineage(folder, generations=2, **engine)),
    "sgd": lambda folder, **engine: finished(text_lineage(folder, generations=0, optim="sgd", **engine)),
    "crashed": lambda folder, **engine: crashed_and_resumed(folder, 1, **engine),
    "sgd crashed": lambda folder, **engine: crashed_and_resumed(folder, 0, generations=0, optim="sgd", **engine),
    "images": lambda folder, **engine: finished(image_lineage(folder, **engine)),
    "killed": lambda folder, **engine: finished(
        text_lineage(folder.parent / "text", callbacks=[Kill(1, 5)], **engine)
    ),
    "narrow": narrow,
    "measured": measured_first,
    "sharded": lambda folder, **engine: measured_first(folder, teacher_placement="sharded", **engine),
}


def main(folder: Path, engine: str, parts: list[str]) -> None:
    torch.set_num_threads(1)
    options = prepare(engine)
    arguments(folder, **options)  # which makes the process group
    leave({part: PARTS[part](folder / part, **options) for part in parts}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
