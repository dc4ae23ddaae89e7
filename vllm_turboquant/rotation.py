"""The fast orthogonal transforms of the format: Hadamard times a fixed random sign diagonal."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_turboquant.layout import MAX_GROUP


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis by the unnormalized Sylvester-Hadamard matrix.

    Butterflies run from the largest stride to the smallest, each output one addition or
    subtraction. Every kernel keeps this order, so results are equal bit for bit in the same
    precision.

    Args:
        x: [..., n], n a power of two, any floating dtype.

    Returns:
        [..., n], same dtype: sqrt(n) times the orthonormal transform.
    """
    n = x.shape[-1]
    stride = n // 2
    while stride:
        pairs = x.reshape(*x.shape[:-1], n // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2).reshape(*x.shape[:-1], n)
        stride //= 2
    return x


def sign_diagonal(name: str, size: int) -> Tensor:
    """Fixed pseudo-random signs: coordinate j takes bit j % 8 of byte j // 8 of SHA-256(name).

    A hash and not a generator's stream, so that the format does not depend on a library's version.

    Args:
        name: What the diagonal is for.
        size: At most 256.

    Returns:
        [size] float32 of +1 (bit set) and -1.
    """
    digest = torch.tensor(list(hashlib.sha256(name.encode()).digest()), dtype=torch.uint8)
    bits = (digest[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:size].to(torch.float32) * 2 - 1


@dataclass(frozen=True)
class Rotation:
    """The three sign diagonals that turn the Hadamard matrix into rotations.

    With H orthonormal: keys are rotated by H D1, key residuals projected by H D2, values rotated by
    H D3. A diagonal longer than a group is cut to it.

    Attributes:
        key: [>= group] float32 of +-1, D1.
        residual: [>= group] float32 of +-1, D2.
        value: [>= group] float32 of +-1, D3.
    """

    key: Tensor
    residual: Tensor
    value: Tensor

    @staticmethod
    def random(size: int, generator: torch.Generator) -> Rotation:
        """Draw independent diagonals, to average over rotations."""

        def draw() -> Tensor:
            return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0

        return Rotation(draw(), draw(), draw())


#: The rotation of the format.
ROTATION = Rotation(
    key=sign_diagonal("turboquant3 key", MAX_GROUP),
    residual=sign_diagonal("turboquant3 residual", MAX_GROUP),
    value=sign_diagonal("turboquant3 value", MAX_GROUP),
)
