"""Measured means with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is NaN where there is one value only."""

    mean: float
    error: float

    @staticmethod
    def of(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
        """Weighted mean of independent values, its error from their spread.

        Args:
            values: What was measured.
            weights: How much each counts, such as the tokens it is a mean over; all the same if
                None.
        """
        data = torch.tensor(values, dtype=torch.float64)
        weight = torch.ones_like(data) if weights is None else torch.tensor(weights).double()
        weight /= weight.sum()
        mean = float((weight * data).sum())
        if len(data) < 2:
            return Estimate(mean, math.nan)
        spread = float((weight * (data - mean)).norm())
        return Estimate(mean, spread * math.sqrt(len(data) / (len(data) - 1)))
