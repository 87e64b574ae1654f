"""Prints the table of examples/accelerate/README.md: what the paper's networks and two larger ones need, computed.

python -m tests.benchmarks.plan
"""

from __future__ import annotations

from collections.abc import Iterator

from born_again.report.plan import PlannedStep, plan

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8}
ONE_BILLION = {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
ONE_BILLION["tie_word_embeddings"] = True
EIGHT_BILLION = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
# Name: the model, its batch on few and on 64 processes, and what else makes the step.
NETWORKS = {
    **{
        f"{name}, CIFAR-100": (f"{name}_cifar", 128, 128, {"classes": 100})
        for name in ("densenet112_33", "densenet90_60", "densenet80_80", "densenet80_120", "wide_resnet28_10")
    },
    "lstm-large, 35 tokens": ("lstm-large", 32, 64, {"optimizer": "sgd"}),
    "char-cnn-lstm, 35 tokens": ("char-cnn-lstm", 32, 64, {"optimizer": "sgd"}),
    "1 B causal LM, 2,048 tokens": ("llama", 64, 64, {"model_args": ONE_BILLION}),
    "8 B causal LM, 2,048 tokens": ("llama", 64, 64, {"model_args": EIGHT_BILLION}),
}
LARGE = {"optimizer": "adamw", "vocabulary": 128256, "window": 2048, "gradient_checkpointing": True}
PROCESSES = (1, 8, 64)


def planned(name: str, processes: int, engine: str) -> PlannedStep:
    """The step of a row: one row of a causal LM in a micro-batch, all rows of another network at once."""
    model, few, many, others = NETWORKS[name]
    batch = few if processes < PROCESSES[-1] else many
    if model == "llama":
        sharded = {} if engine == "ddp" else {"teacher_placement": "sharded"}
        others = {**LARGE, **others, **sharded, "accumulation": batch // processes}
    return PlannedStep(model, batch, processes=processes, engine=engine, **others)


def rows() -> Iterator[str]:
    yield (
        "| network | parameters | engine | "
        + " | ".join(f"{count} GPU{'s' if count > 1 else ''}: GiB, sent MiB" for count in PROCESSES)
        + " |"
    )
    yield "|---" * (3 + len(PROCESSES)) + "|"
    for name, (model, *_) in NETWORKS.items():
        for engine in ("ddp", "fsdp2") if model == "llama" else ("ddp",):
            cells, size = [], 0
            for processes in PROCESSES:
                content = plan(planned(name, processes, engine))
                size, peak = content["parameters"], content["memory"]["peak"] / 2**30
                cells.append(f"{peak:,.1f}, {content['communication']['total'] / 2**20:,.0f}")
            yield f"| {name} | {size / 1e6:,.1f} M | {engine} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
