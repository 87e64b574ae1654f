"""Networks small enough to train in a moment, data for them, and arguments without noise."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from born_again import BornAgainTrainingArguments

CLASSES = 4
WORDS = 23


def arguments(folder, **changes):
    """Plain SGD on the CPU, silent, without checkpoints."""
    settings = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,  # of which the fixed permutation is not the identity
    }
    return BornAgainTrainingArguments(output_dir=str(folder), **{**settings, **changes})


class Network(nn.Module):
    """A classifier of vectors whose forward knows no labels, in float64 and without BatchNorm."""

    def __init__(self, seed: int, returns: str = "dict", dropout: float = 0.0, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden = nn.Linear(5, 12, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(12, classes, dtype=torch.float64)
        self.returns = returns
        self.calls: list[torch.Tensor] = []

    def forward(self, x):
        self.calls.append(x)
        logits = self.out(self.dropout(torch.tanh(self.hidden(x))))
        return {"dict": {"logits": logits}, "tuple": (logits, x), "tensor": logits}[self.returns]


def vectors(rows: int = 24, ignored: tuple[int, ...] = ()) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    labels[list(ignored)] = -100
    return [{"x": x[row], "labels": labels[row]} for row in range(rows)]


def _bert_config(seed: int) -> BertConfig:
    torch.manual_seed(seed)
    return BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def sequence_classifier(seed: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(_bert_config(seed)).double()


def token_classifier(seed: int) -> BertForTokenClassification:
    return BertForTokenClassification(_bert_config(seed)).double()


def language_model(seed: int, words: int = WORDS) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=words,
        n_positions=12,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


def llama(seed: int) -> LlamaForCausalLM:
    """A language model whose class name says so, which Trainer needs to count its labels right."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).double()


def sentences(labels: str, rows: int = 22) -> list[dict[str, torch.Tensor]]:
    """Padded token ids; `labels` says of what: "sequence", "token" (-100 on padding and elsewhere), "next" word."""
    generator = torch.Generator().manual_seed(2)
    data = []
    for _ in range(rows):
        length = int(torch.randint(4, 11, (), generator=generator))
        ids = torch.zeros(10, dtype=torch.int64)
        ids[:length] = torch.randint(1, WORDS, (length,), generator=generator)
        mask = (torch.arange(10) < length).long()
        if labels == "sequence":
            target = ids[:length].sum() % CLASSES
        elif labels == "token":
            target = (ids % CLASSES).where((mask == 1) & (ids % 5 != 0), -100)
        else:
            target = ids.where(mask == 1, -100)
        data.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    return data
