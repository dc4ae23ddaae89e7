"""Distance between two runs of a model over the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Rows of logits that exist at once: 128 rows of 262144 float32 logits are 128 MiB.
CHUNK_ROWS = 128
#: Equal parts of a window, whose means are kept: enough to see a trend and the spread.
NUM_PARTS = 16

ComputeLogits = Callable[[Tensor], "Tensor | None"]


@dataclass(frozen=True)
class TokenScores:
    """One value per predicted token, each [num_tokens] float64.

    Attributes:
        kl: Divergence of the other distribution from the reference's, in nats.
        agreement: 1 where both have the same most likely token.
        nll: Negative log-likelihood of the next token under the other distribution, in nats.
        reference_nll: The same under the reference's.
    """

    kl: Tensor
    agreement: Tensor
    nll: Tensor
    reference_nll: Tensor


def compare_logits(reference: Tensor, other: Tensor, targets: Tensor) -> TokenScores:
    """Compare two next-token distributions row by row.

    Args:
        reference: [num_tokens, vocab_size] logits of any floating dtype.
        other: As ``reference``.
        targets: [num_tokens] int64, the token that follows.
    """
    log_p = reference.float().log_softmax(dim=-1)
    log_q = other.float().log_softmax(dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    # A token of probability 0 adds nothing, whatever the other run thinks of it.
    terms = torch.where(log_p == -torch.inf, 0.0, terms)
    rows = targets[:, None]
    return TokenScores(
        kl=terms.sum(dim=-1, dtype=torch.float64),
        agreement=(log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double(),
        nll=-log_q.gather(1, rows)[:, 0].double(),
        reference_nll=-log_p.gather(1, rows)[:, 0].double(),
    )


def score_window(
    compute_logits: ComputeLogits, reference: Tensor, other: Tensor, tokens: Tensor
) -> dict[str, Any] | None:
    """Score one window from hidden states, a few rows of logits at a time.

    Args:
        compute_logits: Maps [rows, hidden_size] to [rows, vocab_size], or to None on the ranks of a
            tensor-parallel model that do not get the logits; these have to call it all the same.
        reference: [context, hidden_size], the reference's hidden states.
        other: As ``reference``.
        tokens: [context] int64, the window.

    Returns:
        The fields of ``plan.WindowScore``; None where there are no logits.
    """
    parts: list[TokenScores] = []
    for first in range(0, len(tokens) - 1, CHUNK_ROWS):
        rows = slice(first, min(first + CHUNK_ROWS, len(tokens) - 1))
        targets = tokens[rows.start + 1 : rows.stop + 1]
        logits = compute_logits(reference[rows]), compute_logits(other[rows])
        if logits[0] is not None and logits[1] is not None:
            parts.append(compare_logits(logits[0], logits[1], targets))
    if not parts:
        return None
    values = {
        name: torch.cat([getattr(part, name) for part in parts]).chunk(NUM_PARTS)
        for name in ("kl", "agreement", "nll", "reference_nll")
    }
    means = {name: [float(part.mean()) for part in split] for name, split in values.items()}
    return {"sizes": [len(part) for part in values["kl"]], **means}
