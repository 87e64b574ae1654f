"""What one of several processes does in test_distributed.py; prints nothing, saves what it saw.

torchrun --nproc_per_node N tests/two_processes.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from helpers import Network, arguments, language_model, sentences, vectors
from processes import leave

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.objectives import OBJECTIVES

# The labels without a teacher, then with one; and an objective whose weights the student alone tells.
CASES = ("label", *OBJECTIVES, "smoothed", "annealed", "custom")


def custom(student_logits, teacher_logits, labels):
    q = student_logits.softmax(-1)
    return -(teacher_logits.softmax(-1) * q.log()).sum(-1), 1 - q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def first_step(folder: Path, objective: str, evaluate_first: bool) -> dict[str, torch.Tensor]:
    """Gradient that the first of two optimizer steps saw, weights after both, and evaluations before and after."""
    processes, taught = int(os.environ.get("WORLD_SIZE", "1")), objective != "label"
    args = arguments(
        folder,
        objective={"smoothed": "ban+l"}.get(objective, objective if objective in OBJECTIVES else "ban"),
        label_smoothing_factor=0.2 if objective == "smoothed" else 0.0,
        teacher_annealing=objective == "annealed",
        loss_normalization="step",
        max_steps=3,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=8 // processes,
        logging_steps=1,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
        **({"permutation": "fixed"} if objective == "dkpp" else {}),
    )
    data = vectors(24, ignored=(3, 4, 11, 17))
    teacher = Network(2) if taught else None
    function = custom if objective == "custom" else None
    trainer = BornAgainTrainer(
        Network(1), args, train_dataset=data, eval_dataset=data, teacher=teacher, objective=function
    )
    trainer.in_lineage = True  # which has the teacher measured whatever the objective
    seen: dict[str, torch.Tensor] = {}
    if evaluate_first:
        seen["eval_loss_before"] = torch.tensor(trainer.evaluate()["eval_loss"])

    def keep(optimizer, *_):
        if "gradient" not in seen:
            seen["gradient"] = torch.cat(
                [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
            )

    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    seen["wrapped"] = torch.tensor(isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel))
    seen["weights"] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    seen["eval_loss"] = torch.tensor(trainer.evaluate()["eval_loss"])
    seen["fit"] = torch.tensor(trainer.teacher_train_metrics["accuracy"] if taught else 0.0)
    # 21 rows: two processes read some of them twice to fill the last batch.
    trainer.train_dataset, ragged = data[:21], trainer.predict(data[:21])
    seen["ragged_loss"] = torch.tensor(ragged.metrics["test_loss"])
    seen["ragged_fit"] = torch.tensor(trainer.evaluate_teacher()["accuracy"] if taught else 0.0)
    names = ["loss", *(["kd_loss", "teacher_agreement"] if taught else [])]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen["logged"] = torch.tensor([[entry[name] for name in names] for entry in logged])
    return seen


def of_sentences(folder: Path) -> dict[str, torch.Tensor]:
    """What a language model and its teacher are measured at on 21 sentences of their own lengths."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(
        folder,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=8 // processes,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
    )
    data = sentences("next", 21)
    trainer = BornAgainLMTrainer(language_model(1), args, train_dataset=data, teacher=language_model(2))
    fit, metrics = trainer.evaluate_teacher(), trainer.evaluate(data)
    return {
        "fit": torch.tensor([fit["nll"], fit["tokens"]], dtype=torch.float64),
        "eval": torch.tensor([metrics["eval_nll"], metrics["eval_tokens"]], dtype=torch.float64),
    }


def main(folder: Path) -> None:
    results = {
        f"{objective} {evaluate_first}": first_step(folder, objective, evaluate_first)
        for objective in CASES
        for evaluate_first in (False, True)
    }
    leave({**results, "sentences": of_sentences(folder)}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
