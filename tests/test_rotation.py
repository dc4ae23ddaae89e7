"""The Hadamard transform, its order of additions, and the fixed diagonals of the format."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.reference import rotate_query
from vllm_turboquant.rotation import ROTATION, Rotation, hadamard, sign_diagonal

# D1, D2 and D3 as integers: coordinate j is +1 where bit j is set.
PINNED = {
    "key": 0x04EF5DA78235350E6A7CA8862CC9860E,
    "residual": 0xCAA1661A33CE8266FB30EFF09DCED6DF,
    "value": 0xBD3614C9FAFA90856B563E17C748A7DD,
}


def sylvester(n: int) -> Tensor:
    """The [n, n] Sylvester-Hadamard matrix by its recursion."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return torch.from_numpy(matrix)


@pytest.mark.parametrize("n", [1, 2, 4, 64, 128])
def test_matrix(n: int) -> None:
    matrix = hadamard(torch.eye(n, dtype=torch.float64))
    assert torch.equal(matrix, sylvester(n))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [64, 128])
def test_integers_are_exact(n: int, dtype: torch.dtype) -> None:
    """Sums of n integers below 2^16 fit a float32 mantissa, so no order may round."""
    x = (torch.arange(6 * n).view(2, 3, n) * 40503 % 65537 - 32768).to(dtype)
    got = hadamard(x)
    assert got.dtype == dtype
    assert torch.equal(got.double(), x.double() @ sylvester(n))


def butterflies(x: np.ndarray, strides: list[int]) -> np.ndarray:
    """One scalar addition or subtraction at a time, in float32."""
    x = x.copy()
    for stride in strides:
        for j in range(len(x)):
            if not j & stride:
                x[j], x[j + stride] = x[j] + x[j + stride], x[j] - x[j + stride]
    return x


@pytest.mark.parametrize("n", [64, 128])
def test_order_of_additions(n: int) -> None:
    """Bit for bit the largest stride first; the opposite order rounds differently on this input."""
    x = np.sin(np.arange(1, n + 1)).astype(np.float32)
    strides = [n >> level for level in range(1, n.bit_length())]
    assert strides[0] == n // 2 and strides[-1] == 1
    got = hadamard(torch.from_numpy(x)).numpy()
    assert got.tobytes() == butterflies(x, strides).tobytes()
    assert got.tobytes() != butterflies(x, strides[::-1]).tobytes()


# log2(d) butterfly levels, the division by sqrt(d), the norm itself: each rounds once, by 2^-24.
ROTATION_ERROR = (7 + 3) * 2**-24


@settings(max_examples=50)
@given(
    values=st.lists(
        st.floats(-100, 100, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6),
        min_size=128,
        max_size=128,
    ),
    head_dim=st.sampled_from([64, 128]),
)
def test_norms_and_distances_are_preserved(values: list[float], head_dim: int) -> None:
    layout = SlotLayout(head_dim)
    a, b = torch.tensor(values)[:head_dim], torch.tensor(values).flip(0)[:head_dim].contiguous()
    for difference in (a, a - b):
        length = difference.double().norm()
        for rotated in rotate_query(difference, layout):
            assert abs(rotated.double().norm() - length) <= 2 * ROTATION_ERROR * length
    reach = a.double().norm() + b.double().norm()
    for image_a, image_b in zip(rotate_query(a, layout), rotate_query(b, layout), strict=True):
        distance = (image_a.double() - image_b.double()).norm()
        assert abs(distance - (a.double() - b.double()).norm()) <= 2 * ROTATION_ERROR * reach


@pytest.mark.parametrize("head_dim", [64, 128, 256, 384])
def test_query_rotation_is_the_matrix_product(head_dim: int) -> None:
    layout = SlotLayout(head_dim)
    d = layout.group
    query = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(head_dim)).double()
    h = sylvester(d) / math.sqrt(d)
    r1 = h @ torch.diag(ROTATION.key[:d].double())
    r2 = h @ torch.diag(ROTATION.residual[:d].double())
    assert torch.allclose(r1 @ r1.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=d * 2**-53)
    groups = query.unflatten(-1, (layout.num_groups, d))
    q1, q2 = rotate_query(query, layout)
    # d products and sums of float64, relative to the norm of the group.
    bound = d * 2**-53 * groups.norm(dim=-1).max()
    assert (q1 - (groups @ r1.T).flatten(-2)).abs().max() <= bound
    assert (q2 - (groups @ r1.T @ r2.T).flatten(-2)).abs().max() <= 2 * bound


@pytest.mark.parametrize("name", PINNED)
def test_diagonals_are_pinned(name: str) -> None:
    diagonal = getattr(ROTATION, name)
    assert diagonal.dtype == torch.float32
    assert diagonal.shape == (128,)
    assert set(diagonal.tolist()) == {-1.0, 1.0}
    bits = sum(1 << j for j, sign in enumerate(diagonal.tolist()) if sign > 0)
    assert bits == PINNED[name]
    digest = hashlib.sha256(f"turboquant3 {name}".encode()).digest()
    assert bits == int.from_bytes(digest[:16], "little")


@pytest.mark.parametrize("size", [64, 128])
def test_diagonals_look_random(size: int) -> None:
    """Sums of the signs, and of products of two diagonals, are within 3.3 standard deviations."""
    d1, d2, d3 = (getattr(ROTATION, name)[:size] for name in PINNED)
    for signs in (d1, d2, d3, d1 * d2, d1 * d3, d2 * d3):
        assert abs(signs.sum().item()) <= 3.3 * math.sqrt(size)


def test_sign_diagonal_is_cut_not_redrawn() -> None:
    assert torch.equal(sign_diagonal("any", 256)[:64], sign_diagonal("any", 64))
    assert sign_diagonal("any", 256).shape == (256,)
    assert not torch.equal(sign_diagonal("any", 128), sign_diagonal("other", 128))


def test_random_rotations() -> None:
    first = Rotation.random(128, torch.Generator().manual_seed(1))
    again = Rotation.random(128, torch.Generator().manual_seed(1))
    other = Rotation.random(128, torch.Generator().manual_seed(2))
    for name in PINNED:
        assert set(getattr(first, name).tolist()) == {-1.0, 1.0}
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.key, first.residual)
    assert not torch.equal(first.key, first.value)
