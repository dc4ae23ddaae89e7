"""The two algorithms of arXiv 2504.19874 as published, for comparison with the format.

    TurboQuantMse   u = sqrt(d) R x / |x|,   i = argmin_j |u - C[j]|,   x^ = |x| / sqrt(d) R^T C[i]
    TurboQuantProd  x_mse of one bit less,   r = x - x_mse,   s = sign(S r),
                    x^ = x_mse + sqrt(pi / 2) / d |r| S^T s

R is a random orthogonal matrix and C the Lloyd-Max codebook of a coordinate of u. Norms stay in
floating point and are not counted in ``bits``. Matrices are dense: this is for tests and tables,
not for speed.

Expected relative squared error over a Haar-random R, with D = D_mse(b - 1) and c1 = sqrt(d) E|e_1|
for e uniform on the sphere (c1 is the 1-bit centroid; it tends to sqrt(2 / pi)):

    TurboQuantMse                        D_mse(b)
    TurboQuantProd, Gaussian S           D (pi / 2 - 1 / d)
    TurboQuantProd, orthogonal S         D (pi / 2 + 1 - 2 sqrt(pi / 2) c1)     about D (pi / 2 - 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_turboquant.codebook import Codebook, solve_codebook
from vllm_turboquant.rotation import hadamard


@dataclass(frozen=True)
class MseCode:
    """Codes of TurboQuantMse.

    Attributes:
        index: [..., d] int64 in 0..2 ** bits - 1.
        norm: [..., 1], |x|.
    """

    index: Tensor
    norm: Tensor


@dataclass(frozen=True)
class ProdCode:
    """Codes of TurboQuantProd.

    Attributes:
        mse: Codes of one bit less per coordinate.
        sign: [..., d] of +-1, sign(S r).
        residual_norm: [..., 1], |r|.
    """

    mse: MseCode
    sign: Tensor
    residual_norm: Tensor


@dataclass(frozen=True)
class TurboQuantMse:
    """Algorithm 1: rotate at random, then quantize every coordinate alone.

    Attributes:
        bits: Bits per coordinate; 0 reconstructs the zero vector.
        rotation: [d, d] orthogonal, R.
    """

    bits: int
    rotation: Tensor

    @property
    def codebook(self) -> Codebook:
        """Lloyd-Max codebook of a coordinate of sqrt(d) R x / |x|."""
        return solve_codebook(self.bits, self.rotation.shape[-1])

    def encode(self, x: Tensor) -> MseCode:
        """Code vectors.

        Args:
            x: [..., d] in the dtype of ``rotation``, any norm, not 0.
        """
        norm = x.norm(dim=-1, keepdim=True)
        u = x @ self.rotation.T * (x.shape[-1] ** 0.5 / norm)
        boundaries = torch.tensor(self.codebook.boundaries, dtype=x.dtype)
        return MseCode(torch.bucketize(u, boundaries), norm)

    def decode(self, code: MseCode) -> Tensor:
        """Reconstruct vectors [..., d]."""
        dim = self.rotation.shape[-1]
        centroids = torch.tensor(self.codebook.centroids, dtype=self.rotation.dtype)
        return code.norm / dim**0.5 * (centroids[code.index] @ self.rotation)


@dataclass(frozen=True)
class TurboQuantProd:
    """Algorithm 2: Algorithm 1 with one bit less, then a 1-bit QJL sketch of what it left.

    With an iid Gaussian ``projection`` the inner product of any vector with the reconstruction is
    unbiased, given the codes of the first stage. With sqrt(d) times a Haar-random orthogonal one
    the residual's share of it is too large by the factor sqrt(pi / 2) c1, about 1 + 1 / (4 d).

    Attributes:
        bits: Bits per coordinate, at least 1; one of them is the sign.
        rotation: [d, d] orthogonal, R.
        projection: [d, d], S, with rows of mean squared norm d.
    """

    bits: int
    rotation: Tensor
    projection: Tensor

    @property
    def mse(self) -> TurboQuantMse:
        """The first stage."""
        return TurboQuantMse(self.bits - 1, self.rotation)

    def encode(self, x: Tensor) -> ProdCode:
        """Code vectors.

        Args:
            x: [..., d] in the dtype of ``rotation``, any norm, not 0.
        """
        code = self.mse.encode(x)
        residual = x - self.mse.decode(code)
        sign = (residual @ self.projection.T >= 0).to(x.dtype) * 2 - 1
        return ProdCode(code, sign, residual.norm(dim=-1, keepdim=True))

    def decode(self, code: ProdCode) -> Tensor:
        """Reconstruct vectors [..., d]."""
        factor = math.sqrt(math.pi / 2) / self.projection.shape[-1]
        sketch = factor * code.residual_norm * (code.sign @ self.projection)
        return self.mse.decode(code.mse) + sketch


def haar_rotation(
    dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw [dim, dim] uniformly from the orthogonal group: the rotation of the paper."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=dtype))
    return q * r.diagonal().sign()  # the signs that QR chooses are not uniform


def hadamard_rotation(
    dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw the randomized Hadamard matrix H D, [dim, dim], ``dim`` a power of two."""
    signs = torch.randint(0, 2, (dim,), generator=generator).to(dtype) * 2 - 1
    return hadamard(torch.eye(dim, dtype=dtype)) / dim**0.5 * signs


def gaussian_projection(
    dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw S of iid standard normals, [dim, dim]: the projection of arXiv 2504.19874."""
    return torch.randn(dim, dim, generator=generator, dtype=dtype)


def orthogonal_projection(
    dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw S = sqrt(dim) H D, [dim, dim]: orthogonal rows as long as Gaussian ones.

    arXiv 2406.03482, section 4.1, orthogonalizes its projections for the experiments.
    """
    return dim**0.5 * hadamard_rotation(dim, generator, dtype)
