"""The permutations of DKPP: in every row all entries but the argmax are permuted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

PERMUTATIONS = ("fresh", "fixed")
# Entries from which drawing row by row is faster on a CPU than sorting random keys.
_ROW_BY_ROW = 256


def permute_all_but_argmax(logits: Tensor, permutation: str, generator: torch.Generator | None) -> Tensor:
    """Permutes, within each row, every entry but the argmax (the first of equals).

    Softmax commutes with a permutation, so permuting logits permutes probabilities.

    Args:
        logits: (items, classes).
        permutation: "fresh" or "fixed", as in `born_again.objectives.permuted_dark_knowledge_loss`.
        generator: see there.

    Returns:
        (items, classes), a new tensor.
    """
    permuted = torch.empty_like(logits)
    permute_all_but_column(logits.clone(), argmax_column(logits), permutation, generator, permuted)
    return permuted


def permute_all_but_column(
    values: Tensor, top: Tensor, permutation: str, generator: torch.Generator | None, out: Tensor
) -> None:
    """Permutes every entry of each row but that in one column.

    Args:
        values: (rows, classes), used as a workspace meanwhile and restored.
        top: (rows, 1), int64: the column of the entry that stays.
        permutation: "fresh" for one of its own for every row, each as likely as any other; "fixed" for one drawn from
            the generator's initial seed.
        generator: torch's default one when None; for "fresh" on the device of `values`. Rows permuted in several
            calls are those of one call.
        out: (rows, classes), to be filled.
    """
    last = values.shape[-1] - 1
    # The one that stays changes places with the last, the others move, and it changes back.
    staying, ending = values.gather(-1, top), values[:, -1:].clone()  # (rows, 1)
    values.scatter_(-1, top, ending)
    others = values[:, :last]
    if permutation == "fixed":
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
        order = _fixed_order(seed, last).to(values.device)
        # An index for every entry takes a CPU an eighth of the time of one for every column.
        out[:, :last] = others.gather(-1, order.expand(len(values), -1))
    elif values.device.type != "cpu" or last < _ROW_BY_ROW:
        order = torch.rand(len(values), last, generator=generator, device=values.device).argsort(-1)
        out[:, :last] = others.gather(-1, order)
    else:
        _shuffle_rows(others, out[:, :last], generator)
    values.scatter_(-1, top, staying)
    out[:, -1:] = out.gather(-1, top)
    out.scatter_(-1, top, staying)


@lru_cache(maxsize=4)
def _fixed_order(seed: int, entries: int) -> Tensor:
    return torch.randperm(entries, generator=torch.Generator().manual_seed(seed))


def _shuffle_rows(values: Tensor, shuffled: Tensor, generator: torch.Generator | None) -> None:
    """Fills `shuffled` with the entries of `values`, each row in an order of its own."""
    # Each row from a seed of its own, so that it does not matter which thread draws it.
    seeds = torch.randint(2**62, (len(values),), generator=generator).tolist()
    rows = list(zip(values.unbind(), shuffled.unbind(), seeds, strict=True))
    workers = min(torch.get_num_threads(), len(rows))

    def share(worker: int) -> None:
        own, order = torch.Generator(), torch.empty(values.shape[-1], dtype=torch.int32)
        for row, out, seed in rows[worker::workers]:
            torch.randperm(len(order), generator=own.manual_seed(seed), out=order)
            torch.index_select(row, 0, order, out=out)

    if workers <= 1:
        share(0)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(share, range(workers)))


def argmax_column(values: Tensor) -> Tensor:
    """The argmax of each row, the first of equals: (rows, 1), int64."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        # numpy's argmax is vectorised; torch's took as long as the rest of the loss.
        return torch.from_numpy(values.detach().numpy().argmax(-1)).unsqueeze(-1)
    return values.argmax(-1, keepdim=True)
