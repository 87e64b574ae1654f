"""Streams of tokens and the small LSTMs that read them window by window."""

import torch
from helpers import arguments
from torch import nn

from born_again import BornAgainLMTrainer
from born_again.data.streams import TokenStreams, collate_windows
from born_again.models.language_configs import LstmLMConfig
from born_again.models.lstm_lm import LstmLMForCausalLM

WORDS, STREAMS, WINDOW = 17, 4, 5


# 9 windows, the last of 3 steps, of which one stream lacks 2.
TOKENS = STREAMS * (8 * WINDOW + 3) - 2


def lstm(seed: int, units: int = 8, **changes) -> LstmLMForCausalLM:
    torch.manual_seed(seed)
    return LstmLMForCausalLM(LstmLMConfig(vocab_size=WORDS, hidden_size=units, **changes)).double()


def text(tokens: int = TOKENS, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, WORDS, (tokens,), generator=torch.Generator().manual_seed(seed))


def streams(count: int = STREAMS, tokens: int = TOKENS, window: int = WINDOW, seed: int = 3) -> TokenStreams:
    return TokenStreams(text(tokens, seed), count, window, before=0)


def trainer(folder, student, teacher=None, train=None, evaluated=None, **changes) -> BornAgainLMTrainer:
    settings = {"objective": "ban+l", "per_device_train_batch_size": STREAMS, "per_device_eval_batch_size": STREAMS}
    settings |= {"max_steps": -1, "num_train_epochs": 2, "remove_unused_columns": False, "max_grad_norm": 0.25}
    keys = ("compute_metrics", "processing_class", "teacher_processing_class", "callbacks")
    own = {name: changes.pop(name) for name in keys if name in changes}
    return BornAgainLMTrainer(
        student,
        arguments(folder, **{**settings, **changes}),
        teacher=teacher,
        data_collator=collate_windows,
        train_dataset=streams() if train is None else train,
        eval_dataset=streams(seed=5) if evaluated is None else evaluated,
        **own,
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
