"""What one of several processes does in test_lm_distributed.py: a lineage's language model, over its own streams.

torchrun --nproc_per_node N tests/two_lm_processes.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from helpers import arguments
from processes import leave

from born_again import BornAgainLMTrainer
from born_again.data.streams import TokenStreams, collate_windows
from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM

STREAMS, WINDOW = 8, 5
CASES = (("label", 1), ("ban+l", 1), ("cwtm", 2))  # objective, accumulated windows


def lstm(seed: int, units: int) -> LstmLMForCausalLM:
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=17, hidden_size=units)).double()


def streams(seed: int) -> TokenStreams:
    # The last window is ragged, and the last stream too short by 3: both processes must count what is there.
    tokens = torch.randint(0, 17, (STREAMS * (4 * WINDOW + 2) - 3,), generator=torch.Generator().manual_seed(seed))
    return TokenStreams(tokens, STREAMS, WINDOW, before=0)


def trained(folder: Path, objective: str, accumulate: int, resume: bool = False) -> dict[str, torch.Tensor]:
    taught = objective != "label"
    args = arguments(
        folder,
        objective=objective if taught else "ban",
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=STREAMS,
        per_device_eval_batch_size=STREAMS,
        gradient_accumulation_steps=accumulate,
        accelerator_config={"split_batches": True},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        remove_unused_columns=False,
        max_grad_norm=0.25,
        **({"ddp_backend": "gloo"} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}),
    )
    trainer = BornAgainLMTrainer(
        lstm(1, 8),
        args,
        teacher=lstm(2, 6) if taught else None,
        data_collator=collate_windows,
        train_dataset=streams(3),
        eval_dataset=streams(4),
    )
    trainer.in_lineage = True  # which has the teacher measured whatever the objective
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    after = trainer.evaluate()
    predicted = trainer.predict(streams(5))
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]),
        "wrapped": torch.tensor(isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)),
        "nll": torch.tensor([before["eval_nll"], after["eval_nll"]], dtype=torch.float64),
        "tokens": torch.tensor(after["eval_tokens"]),
        "predictions": torch.from_numpy(predicted.predictions),
        "labels": torch.from_numpy(predicted.label_ids),
        "fit": torch.tensor(trainer.teacher_train_metrics["nll"] if taught else 0.0, dtype=torch.float64),
        "fit_tokens": torch.tensor(trainer.teacher_train_metrics["tokens"] if taught else 0),
        "losses": torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for objective, accumulate in CASES:
        own = folder / f"{objective}-{accumulate}"
        results[f"{objective} {accumulate}"] = trained(own, objective, accumulate)
        results[f"{objective} {accumulate} resumed"] = trained(own, objective, accumulate, resume=True)
    leave(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
