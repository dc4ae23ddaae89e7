"""Bits, bytes and offsets of a turboquant3 cache block: the only Python source of them.

A *slot* is what one token of one KV head occupies. A head is coded in *groups* of at most 128
coordinates, each alone, so slot bytes are proportional to head_dim. The slots of one (block, KV
head) form one contiguous region, stored as a structure of arrays so that every kernel reads long
runs:

    key_index    [block_size, head_dim / 4]    uint8    2-bit codes, coordinate j at bits 2 (j % 4)
    key_sign     [block_size, head_dim / 8]    uint8    1-bit signs, coordinate j at bit j % 8
    value_index  [block_size, head_dim / 4]    uint8    as key_index
    key_scale    [num_groups, block_size]      float16  little-endian
    value_scale  [num_groups, block_size]      float16  little-endian

A sign bit of 1 stands for +1. Sixteen tokens of one KV head that are also kept in 8 bits, a *unit*
(``reference_recent.py``), are a structure of arrays, too:

    key          [16, head_dim]                int8
    value        [16, head_dim]                int8
    key_scale    [num_groups, 16]              float16
    value_scale  [num_groups, 16]              float16

``csrc/core/layout.h`` mirrors this file for the kernels; a test
holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

MAX_GROUP = 128
MAX_HEAD_DIM = 512
UNIT_TOKENS = 16
#: Positions that share a center of keys, in frames that have several; see ``frame.py``.
SPAN_TOKENS = 512
BLOCK_SIZE_MULTIPLE = UNIT_TOKENS
SUPPORTED_HEAD_DIMS = "64, 128, 256, 384, 512"


@dataclass(frozen=True)
class Section:
    """One array of a block region.

    Attributes:
        name: Name in the table at the top of this file.
        offset_bytes: Start of the array inside the region.
        size_bytes: Length of the array.
    """

    name: str
    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        """First byte after the array."""
        return self.offset_bytes + self.size_bytes


@dataclass(frozen=True)
class SlotLayout:
    """Layout of the turboquant3 format for one head size.

    Args:
        head_dim: 64, or a multiple of 128 up to 512.

    Raises:
        ValueError: ``head_dim`` is none of these; the message names it and the accepted ones.
    """

    head_dim: int

    index_bits: ClassVar[int] = 2
    sign_bits: ClassVar[int] = 1
    scale_bytes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.supports(self.head_dim):
            raise ValueError(
                f"turboquant3 does not support head_dim {self.head_dim}; "
                f"supported: {SUPPORTED_HEAD_DIMS}"
            )

    @staticmethod
    def supports(head_dim: int) -> bool:
        """Whether the format is defined for ``head_dim``."""
        return head_dim == 64 or (0 < head_dim <= MAX_HEAD_DIM and head_dim % MAX_GROUP == 0)

    @property
    def group(self) -> int:
        """Coordinates that share a scale and are rotated together."""
        return min(self.head_dim, MAX_GROUP)

    @property
    def num_groups(self) -> int:
        """Groups per head."""
        return self.head_dim // self.group

    @property
    def index_bytes(self) -> int:
        """Bytes of the 2-bit codes of one vector."""
        return self.head_dim * self.index_bits // 8

    @property
    def sign_bytes(self) -> int:
        """Bytes of the 1-bit residual signs of one key."""
        return self.head_dim * self.sign_bits // 8

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales of one vector."""
        return self.num_groups * self.scale_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token of one KV head, key and value together."""
        return 2 * self.index_bytes + self.sign_bytes + 2 * self.scales_bytes

    def compression(self, element_bytes: int = 2) -> float:
        """Bytes of an uncompressed slot over ``slot_bytes``.

        Args:
            element_bytes: Bytes of one uncompressed coordinate; 2 for bfloat16 and float16.
        """
        return 2 * self.head_dim * element_bytes / self.slot_bytes

    @property
    def unit_bytes(self) -> int:
        """Bytes of the 8-bit copies of a unit of one KV head."""
        return list(self.recent_sections().values())[-1].end_bytes

    def recent_sections(self) -> dict[str, Section]:
        """Arrays of a unit's 8-bit copies, in storage order."""
        return _consecutive(
            key=UNIT_TOKENS * self.head_dim,
            value=UNIT_TOKENS * self.head_dim,
            key_scale=UNIT_TOKENS * self.scales_bytes,
            value_scale=UNIT_TOKENS * self.scales_bytes,
        )

    def sections(self, block_size: int) -> dict[str, Section]:
        """Arrays of the region of one (block, KV head), in storage order.

        Args:
            block_size: Tokens per block, a positive multiple of 16, so that every array starts
                16-byte aligned.

        Returns:
            Name to section. The last one ends at ``block_size * slot_bytes``.

        Raises:
            ValueError: ``block_size`` is not a positive multiple of 16.
        """
        if block_size <= 0 or block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"turboquant3 does not support block_size {block_size}; "
                f"supported: multiples of {BLOCK_SIZE_MULTIPLE}"
            )
        return _consecutive(
            key_index=block_size * self.index_bytes,
            key_sign=block_size * self.sign_bytes,
            value_index=block_size * self.index_bytes,
            key_scale=block_size * self.scales_bytes,
            value_scale=block_size * self.scales_bytes,
        )


def _consecutive(**sizes: int) -> dict[str, Section]:
    """Sections of the given sizes, one after the other."""
    ends = accumulate(sizes.values())
    return {
        name: Section(name, end - size, size)
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }
