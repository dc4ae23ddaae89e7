"""The hidden states of windows of text, put together from the steps of an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Recording:
    """Final hidden states of windows that the engine computes next.

    Attributes:
        tokens: [num_windows, context] int64.
        order: [num_windows * context] int64, rows of ``tokens``, flattened, as they will come: one
            window after the other, or one token of each window a step.
        hidden: [num_windows, context, hidden_size]; None before the first step.
        num_taken: How many rows have come.
    """

    tokens: Tensor
    order: Tensor
    hidden: Tensor | None = None
    num_taken: int = 0

    @staticmethod
    def expect(windows: list[list[int]], in_lockstep: bool) -> Recording:
        """Prepare for ``windows``, all of one length."""
        tokens = torch.tensor(windows)
        order = torch.arange(tokens.numel()).view(tokens.shape)
        return Recording(tokens, (order.T if in_lockstep else order).flatten())

    def take(self, hidden: Tensor, input_ids: Tensor | None, positions: Tensor) -> None:
        """Keep the rows of one step.

        Args:
            hidden: [rows, hidden_size].
            input_ids: [rows]; None for models that are given embeddings.
            positions: [rows], or [3, rows] for models with several kinds of positions.

        Raises:
            RuntimeError: These are not the rows that were expected next.
        """
        rows = self.order[self.num_taken : self.num_taken + len(hidden)]
        context = self.tokens.shape[1]
        is_expected = len(rows) == len(hidden) and torch.equal(
            positions.view(-1, len(hidden))[0].cpu(), rows % context
        )
        if is_expected and input_ids is not None:
            is_expected = torch.equal(input_ids.cpu().long(), self.tokens.flatten()[rows])
        if not is_expected:
            raise RuntimeError(
                f"the engine computed {len(hidden)} rows after row {self.num_taken} that are not "
                "the next tokens of the windows: it does not schedule them as this was written for"
            )
        if self.hidden is None:
            self.hidden = hidden.new_empty(*self.tokens.shape, hidden.shape[-1])
        self.hidden.view(-1, hidden.shape[-1])[rows.to(hidden.device)] = hidden
        self.num_taken += len(hidden)

    def complete(self) -> Tensor:
        """The hidden states.

        Raises:
            RuntimeError: Some are missing.
        """
        if self.hidden is None or self.num_taken < len(self.order):
            raise RuntimeError(
                f"{self.num_taken} of {len(self.order)} rows of hidden states came; is the model "
                "run with enforce_eager, and prefix caching off?"
            )
        return self.hidden
