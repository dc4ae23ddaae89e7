"""The byte layout: sizes, sections, refusals, and every byte of packed blocks.

Expected bytes are built here from integers with ``struct``, never with the package's own packing.
"""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from torch import Tensor

from vllm_turboquant.frame import BALANCE, SINK, plain_frame
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.reference import (
    KeyCode,
    ValueCode,
    block_arrays,
    encode_keys,
    encode_values,
    load,
    pack_bits,
    store,
    unpack_bits,
)

HEAD_DIMS = (64, 128, 256, 384, 512)
BLOCK_SIZES = tuple(range(16, 257, 16))
CANARY = 0xA5

# SHA-256 of the cache that test_format_is_pinned stores. A change of one is a change of the format.
PINNED = {
    64: "3a88fc1dc31b82abbf3581153327332775dccc2249b26d778dc46719cf3947a5",
    128: "d4aa12277a0a8640ded87ebd762be74e4129c9678fd9956951ee832c4b5a254c",
    256: "cbdd29c129fe553dd55cad2594f5074beb062217b62477e2a6f6f75e1947082f",
}
# The same with a sink and a balance.
PINNED_IN_FRAME = {
    64: "4420e54228e2eb2aa5363038b7c9e8e5ceaae767d9750fb82b1a3c3f57af5a15",
    128: "3f7f1a7f48e16ecd3ad757dd833912fca397d31aabca6b4149eda3fbcd0c23c4",
    256: "c88828b6df6aee8ef4ebdf25293f6c19884e7eb5f93288fd2da2525e06509e4a",
}


@pytest.mark.parametrize(
    ("head_dim", "slot_bytes", "compression"),
    [(64, 44, 64 / 11), (128, 84, 128 / 21), (256, 168, 128 / 21), (512, 336, 128 / 21)],
)
def test_slot_bytes(head_dim: int, slot_bytes: int, compression: float) -> None:
    layout = SlotLayout(head_dim)
    assert layout.slot_bytes == slot_bytes
    assert layout.compression() == pytest.approx(compression, rel=1e-15)
    assert layout.compression(element_bytes=4) == pytest.approx(2 * compression, rel=1e-15)


def test_published_ratios() -> None:
    assert f"{SlotLayout(128).compression():.3f}" == "6.095"
    assert f"{SlotLayout(64).compression():.3f}" == "5.818"


def test_group_sizes() -> None:
    assert [(SlotLayout(d).group, SlotLayout(d).num_groups) for d in HEAD_DIMS] == [
        (64, 1),
        (128, 1),
        (128, 2),
        (128, 3),
        (128, 4),
    ]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_sections_tile_the_region(head_dim: int, block_size: int) -> None:
    layout = SlotLayout(head_dim)
    sections = layout.sections(block_size)
    assert list(sections) == ["key_index", "key_sign", "value_index", "key_scale", "value_scale"]
    end = 0
    for name, section in sections.items():
        assert section.name == name
        assert section.offset_bytes == end, "a gap or an overlap"
        assert section.offset_bytes % 16 == 0
        assert section.size_bytes > 0
        end = section.end_bytes
    assert end == layout.slot_bytes * block_size
    assert sections["key_index"].size_bytes == block_size * head_dim // 4
    assert sections["key_sign"].size_bytes == block_size * head_dim // 8
    assert sections["value_scale"].size_bytes == block_size * -(-head_dim // 128) * 2


@pytest.mark.parametrize("head_dim", [80, 96, 192, 640, 0, -64, 1, 32, -128])
def test_refused_head_dim(head_dim: int) -> None:
    assert not SlotLayout.supports(head_dim)
    with pytest.raises(ValueError) as error:
        SlotLayout(head_dim)
    assert str(error.value) == (
        f"turboquant3 does not support head_dim {head_dim}; supported: 64, 128, 256, 384, 512"
    )


def test_accepted_head_dims_are_those_of_the_message() -> None:
    assert tuple(d for d in range(-256, 2048) if SlotLayout.supports(d)) == HEAD_DIMS


@pytest.mark.parametrize("block_size", [0, 8, 24, -16, 1])
def test_refused_block_size(block_size: int) -> None:
    with pytest.raises(ValueError) as error:
        SlotLayout(128).sections(block_size)
    assert str(error.value) == (
        f"turboquant3 does not support block_size {block_size}; supported: multiples of 16"
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pack_round_trip(bits: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_bits(unpack_bits(packed, bits), bits), packed)


def test_pack_literals() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 0, 0, 0, 0, 3]), 2).tolist() == [0b00111001, 0xC0]
    signs = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0]).bool()
    assert pack_bits(signs, 1).tolist() == [0b11000001, 0b00000010]


def test_region_literals() -> None:
    """The first byte of every array of one region, offsets written out: head_dim 128, block 16."""
    layout = SlotLayout(128)
    cache = torch.zeros(1, 1, 16, 84, dtype=torch.uint8)
    for name, array in block_arrays(cache, layout).items():
        if name.endswith("_scale"):
            array[0, 0, 0, 0] = 1.0  # 0x3C00
        else:
            array[0, 0, 1, 2] = 0x77  # third byte of token 1
    region = bytes(cache.flatten().tolist())
    expected = bytearray(1344)
    expected[32 + 2] = 0x77
    expected[512 + 16 + 2] = 0x77
    expected[768 + 32 + 2] = 0x77
    expected[1280:1282] = b"\x00\x3c"
    expected[1312:1314] = b"\x00\x3c"
    assert region == bytes(expected)


def test_scale_literals() -> None:
    """A key scale's sign bit is the origin, also of 0; of a value scale, it would be a sign."""
    layout = SlotLayout(256)
    cache = torch.zeros(1, 1, 16, 168, dtype=torch.uint8)
    key_scales = struct.pack("<4H", 0x3C00, 0xBC00, 0x0000, 0x8000)  # 1, -1, 0, -0
    region = cache.view(-1)
    region[2560:2568] = torch.frombuffer(bytearray(key_scales), dtype=torch.uint8)  # group 0
    region[2592:2600] = region[2560:2568].view(torch.int16).flip(0).view(torch.uint8)  # group 1
    code, _ = load(cache, torch.tensor([0]), 4, layout)
    assert code.scale[:, 0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert not code.scale.signbit().any()
    assert code.at_sink[:, 0].tolist() == [[False, True], [True, False]] * 2


def formula_codes(layout: SlotLayout, shape: tuple[int, ...]) -> tuple[KeyCode, ValueCode]:
    """Codes that differ in every place, from integers alone; leading axes ``shape``."""

    def integers(last: int, factor: int) -> Tensor:
        count = torch.Size(shape).numel() * last
        x = torch.arange(1, count + 1, dtype=torch.int64) * factor
        return ((x ^ (x >> 7) ^ (x >> 13)) % 65521).view(*shape, last)

    def scales(factor: int) -> Tensor:
        return (integers(layout.num_groups, factor) % 2048 / 64 + 1 / 64).half()  # exact

    dim = layout.head_dim
    key = KeyCode(
        (integers(dim, 7919) % 4).to(torch.uint8),
        integers(dim, 104729) % 2 == 1,
        scales(1299709),
        integers(layout.num_groups, 15487469) % 2 == 1,
    )
    return key, ValueCode((integers(dim, 15485863) % 4).to(torch.uint8), scales(32452843))


def pack_region(key: KeyCode, value: ValueCode) -> bytes:
    """Pack the codes of one (block, KV head), leading axis [block_size], in plain Python."""

    def fields(rows: list[list[int]], bits: int) -> bytes:
        out = bytearray()
        for row in rows:
            number = 0
            for j, code in enumerate(row):
                number |= int(code) << (bits * j)
            out += number.to_bytes(len(row) * bits // 8, "little")
        return bytes(out)

    def scales(rows: list[list[float]]) -> bytes:
        by_group = [row[group] for group in range(len(rows[0])) for row in rows]
        return struct.pack(f"<{len(by_group)}e", *by_group)

    signed = key.scale * (1 - 2 * key.at_sink.half())  # -0 where a scale of 0 is at the sink
    return (
        fields(key.index.tolist(), 2)
        + fields(key.sign.tolist(), 1)
        + fields(value.index.tolist(), 2)
        + scales(signed.tolist())
        + scales(value.scale.tolist())
    )


def pack_cache(key: KeyCode, value: ValueCode) -> bytes:
    """Pack codes with leading axes [num_blocks, block_size, num_kv_heads] in plain Python."""
    num_blocks, _, num_heads = key.index.shape[:3]
    return b"".join(
        pack_region(
            KeyCode(*(part[b, :, h] for part in vars(key).values())),
            ValueCode(value.index[b, :, h], value.scale[b, :, h]),
        )
        for b in range(num_blocks)
        for h in range(num_heads)
    )


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_golden_bytes_are_read_back(head_dim: int, block_size: int) -> None:
    """Bytes packed by hand, through ``load``, are the codes they were packed from."""
    layout = SlotLayout(head_dim)
    key, value = formula_codes(layout, (3, block_size, 2))  # [num_blocks, block_size, num_kv_heads]
    flat = torch.frombuffer(bytearray(pack_cache(key, value)), dtype=torch.uint8)
    cache = flat.view(3, 2, block_size, layout.slot_bytes)
    order = [2, 0, 1]
    got_key, got_value = load(cache, torch.tensor(order), 3 * block_size - 5, layout)
    for got, expected in (
        (got_key.index, key.index),
        (got_key.sign, key.sign),
        (got_key.scale, key.scale),
        (got_key.at_sink, key.at_sink),
        (got_value.index, value.index),
        (got_value.scale, value.scale),
    ):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected[order].flatten(0, 1)[:-5])


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_golden_bytes_are_stored(head_dim: int, block_size: int) -> None:
    """Every byte that ``store`` writes, and no other, is where the layout says."""
    layout = SlotLayout(head_dim)
    num_blocks, num_heads = 3, 2
    key, value, center = formula_tensors(num_blocks * block_size, num_heads, head_dim)
    key_frame = formula_frame(center)
    cache = torch.full(
        (num_blocks, num_heads, block_size, layout.slot_bytes), CANARY, dtype=torch.uint8
    )
    block_order = torch.tensor([1, 2])  # block 0 stays untouched
    slots = (block_order[:, None] * block_size + torch.arange(block_size)).flatten()
    rows = slots.flip(0)  # row t of the input goes to slot rows[t]
    store(key[: len(rows)], value[: len(rows)], key_frame, cache, rows)
    coded_key = encode_keys(key[: len(rows)].flip(0), key_frame, layout)
    assert coded_key.at_sink.any() and not coded_key.at_sink.all()
    coded_value = encode_values(value[: len(rows)].flip(0), layout)
    shape = (2, block_size, num_heads)
    expected = bytes([CANARY]) * (num_heads * block_size * layout.slot_bytes) + pack_cache(
        KeyCode(*(part.unflatten(0, shape[:2]) for part in vars(coded_key).values())),
        ValueCode(*(part.unflatten(0, shape[:2]) for part in vars(coded_value).values())),
    )
    assert bytes(cache.flatten().tolist()) == expected


def formula_tensors(
    num_tokens: int, num_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and a center from integers: exact in float32, every coordinate different."""

    def integers(count: int, factor: int) -> Tensor:
        x = torch.arange(1, count + 1, dtype=torch.int64) * factor
        return (x ^ (x >> 9)) % 4093 - 2046

    count = num_tokens * num_heads * head_dim
    shape = (num_tokens, num_heads, head_dim)
    key = (integers(count, 6700417) / 256.0).float().view(shape)
    value = (integers(count, 2971215) / 1024.0).float().view(shape)
    center = (integers(num_heads * head_dim, 3571) / 512.0).float().view(shape[1:])
    return key, value, center


def formula_frame(center: Tensor) -> Tensor:
    """A sink and a balance for ``center``, exact in float32, with keys around both origins."""
    frame = plain_frame(center)
    j = torch.arange(center.numel()).view_as(center)
    frame[:, SINK] += (j * 7919 % 31 - 15) / 16.0
    frame[:, BALANCE] = (j * 3571 % 61 + 4) / 16.0
    return frame


def digest(key: Tensor, value: Tensor, key_frame: Tensor) -> str:
    """SHA-256 of two blocks that hold 32 tokens of two heads."""
    cache = torch.zeros(2, 2, 16, SlotLayout(key.shape[-1]).slot_bytes, dtype=torch.uint8)
    store(key, value, key_frame, cache, torch.arange(32))
    return hashlib.sha256(bytes(cache.flatten().tolist())).hexdigest()


@pytest.mark.parametrize("head_dim", PINNED)
def test_format_is_pinned(head_dim: int) -> None:
    """No change of rotation, codebook, scale, packing or order goes unnoticed."""
    key, value, center = formula_tensors(32, 2, head_dim)
    assert digest(key, value, plain_frame(center)) == PINNED[head_dim]


@pytest.mark.parametrize("head_dim", PINNED_IN_FRAME)
def test_format_is_pinned_in_a_frame(head_dim: int) -> None:
    """Nor does one of the choice of an origin, or of the balance."""
    key, value, center = formula_tensors(32, 2, head_dim)
    assert digest(key, value, formula_frame(center)) == PINNED_IN_FRAME[head_dim]
