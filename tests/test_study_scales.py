"""The three scales that scripts/study_scales.py compares do what they are named for."""

from __future__ import annotations

import pytest
import study_scales
import torch
from torch import Tensor

from vllm_turboquant.estimate import Estimate


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1)


@pytest.fixture(scope="module")
def values() -> Tensor:
    return torch.randn(400, 2, 128, generator=torch.Generator().manual_seed(0))


def coded(x: Tensor, part: str, scale: str) -> Tensor:
    quantize = getattr(study_scales, f"{part}_{scale}")
    key, value = quantize(x, x)
    untouched, replaced = (key, value) if part == "values" else (value, key)
    assert torch.equal(untouched, x)
    return replaced


def test_unbiased_keeps_inner_products(values: Tensor) -> None:
    decoded = coded(values, "values", "unbiased")
    torch.testing.assert_close(dot(values, decoded), dot(values, values), rtol=1e-3, atol=0)


def test_norm_keeps_norms(values: Tensor) -> None:
    decoded = coded(values, "values", "norm")
    torch.testing.assert_close(decoded.norm(dim=-1), values.norm(dim=-1), rtol=1e-3, atol=0)


def test_least_squares_leaves_an_error_orthogonal_to_the_code(values: Tensor) -> None:
    decoded = coded(values, "values", "least_squares")
    assert (dot(values - decoded, decoded) / dot(values, values)).abs().max() < 1e-3


@pytest.mark.parametrize("scale", study_scales.SCALES)
def test_keys_do_not_pay_for_their_mean(values: Tensor, scale: str) -> None:
    keys = values + 20
    error = (coded(keys, "keys", scale) - keys).square().sum(dim=-1) / 128
    assert Estimate.of(error.flatten().tolist()).mean == pytest.approx(0.043, rel=0.1)
