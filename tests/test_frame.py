"""Key frames: which origin a key starts from, what a balance does, and what both are good for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.vectors import normal, seeded, split
from vllm_turboquant.frame import (
    BALANCE,
    CENTER,
    FIRST_SPAN,
    SINK,
    make_frame,
    near_origins,
    num_spans,
    plain_frame,
    relative_frame,
)
from vllm_turboquant.layout import SPAN_TOKENS, SlotLayout
from vllm_turboquant.reference import (
    KeyCode,
    block_arrays,
    decode_keys,
    encode_keys,
    load,
    score_codes,
    store,
)
from vllm_turboquant.testing import random_frame

SIGN_BIT = -(2**15)  # of a float16, as int16
DOUBLE = 2**-53
# A squared distance is a sum of d = 2^7 squares in 7 levels; 32 roundings of 2^-24 cover it.
DISTANCE_ROUNDING = 2**-19


def assert_same_code(got: KeyCode, want: KeyCode) -> None:
    for name, part in vars(want).items():
        assert torch.equal(getattr(got, name), part), name


def test_parts() -> None:
    center, sink, balance = normal(3, 4, 64).double()
    frame = make_frame(center, sink, balance)
    assert frame.shape == (4, 3, 64)
    assert frame.dtype == torch.float32
    assert torch.equal(frame[:, CENTER], center.float())
    assert torch.equal(frame[:, SINK], sink.float())
    assert torch.equal(frame[:, BALANCE], balance.float())
    assert torch.equal(plain_frame(center), make_frame(center, center, torch.ones(4, 64)))
    of_spans = normal(4, 5, 64, seed=1).double()
    with_spans = make_frame(center, sink, balance, of_spans)
    assert with_spans.shape == (4, 8, 64)
    assert with_spans.dtype == torch.float32
    assert torch.equal(with_spans[:, :FIRST_SPAN], frame)
    assert torch.equal(with_spans[:, FIRST_SPAN:], of_spans.float())


def test_spans_of_a_context() -> None:
    assert [num_spans(n) for n in (0, 1, 512, 513, 8192)] == [0, 1, 1, 2, 16]


def test_positions_have_the_center_of_their_span() -> None:
    """Those past the last span have that of the last."""
    key_frame = random_frame(2, 64, seeded(1), num_spans=3)
    positions = [0, 511, 512, 1023, 1024, 1535, 1536, 10**6]
    origins = near_origins(key_frame, torch.tensor(positions))
    assert origins.shape == (8, 2, 64)
    for origin, span in zip(origins, [0, 0, 1, 1, 2, 2, 2, 2], strict=True):
        assert torch.equal(origin, key_frame[:, FIRST_SPAN + span])
    plain = key_frame[:, :FIRST_SPAN]
    for given in (torch.tensor(positions), None):
        assert torch.equal(near_origins(plain, given), plain[:, CENTER])


@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_span_is_only_another_center(head_dim: int) -> None:
    """Every key has the code, and its code stands for the key, of a frame with that center."""
    layout = SlotLayout(head_dim)
    key_frame = random_frame(2, head_dim, seeded(1), num_spans=3)
    positions = torch.randint(0, 4 * SPAN_TOKENS, (200,), generator=seeded(2))
    key = 3 * normal(200, 2, head_dim, seed=3)
    query = normal(4, 2, 3, head_dim, seed=4).double()
    code = encode_keys(key, key_frame, layout, positions=positions)
    assert code.at_sink.any() and not code.at_sink.all()
    decoded = decode_keys(code, key_frame, layout, positions=positions)
    scores = score_codes(query, code, key_frame, layout, positions)
    for span in range(3):
        its = (positions // SPAN_TOKENS).clamp(max=2) == span
        frame = key_frame[:, :FIRST_SPAN].clone()
        frame[:, CENTER] = key_frame[:, FIRST_SPAN + span]
        alone = encode_keys(key[its], frame, layout)
        assert_same_code(KeyCode(*(part[its] for part in vars(code).values())), alone)
        assert torch.equal(decoded[its], decode_keys(alone, frame, layout))
        torch.testing.assert_close(
            scores[..., its], score_codes(query, alone, frame, layout), rtol=1e-12, atol=1e-12
        )


def test_spans_around_the_center_change_nothing() -> None:
    layout = SlotLayout(128)
    key_frame, key = random_frame(2, 128, seeded(1)), 3 * normal(50, 2, 128)
    same = make_frame(*key_frame.unbind(dim=1), key_frame[:, CENTER, None].expand(-1, 4, -1))
    positions = 60 * torch.arange(50)
    want = encode_keys(key, key_frame, layout)
    assert_same_code(encode_keys(key, same, layout, positions=positions), want)
    # Without spans, positions do not matter.
    assert_same_code(encode_keys(key, key_frame, layout, positions=positions), want)


def test_spans_need_positions() -> None:
    layout = SlotLayout(64)
    key_frame, key = random_frame(1, 64, seeded(1), num_spans=1), normal(16, 1, 64)
    code = encode_keys(key, key_frame, layout, positions=torch.arange(16))
    cache = torch.zeros(1, 1, 16, layout.slot_bytes, dtype=torch.uint8)
    for run in (
        lambda: encode_keys(key, key_frame, layout),
        lambda: decode_keys(code, key_frame, layout),
        lambda: score_codes(normal(1, 1, 1, 64), code, key_frame, layout),
        lambda: store(key, key, key_frame, cache, torch.arange(16)),
    ):
        with pytest.raises(ValueError, match="centers of spans needs the positions of keys"):
            run()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_nearer_origin_is_taken_group_by_group(head_dim: int) -> None:
    """Whatever is clearly nearer in float64, both distances balanced."""
    layout = SlotLayout(head_dim)
    key_frame = random_frame(2, head_dim, seeded(1))
    center, sink, balance = key_frame.unbind(dim=1)
    way = torch.rand(2000, 2, 1, generator=seeded(2))  # from the center to the sink
    key = center + way * (sink - center) + normal(2000, 2, head_dim, seed=3) / balance
    code = encode_keys(key, key_frame, layout)

    def squares(weight: Tensor) -> tuple[Tensor, Tensor]:
        to_center, to_sink = (
            split((weight * (key - origin)).double().square(), layout).sum(dim=-1)
            for origin in (center, sink)
        )
        return to_center, to_sink

    to_center, to_sink = squares(balance)
    clear = (to_center - to_sink).abs() > DISTANCE_ROUNDING * (to_center + to_sink)
    assert clear.double().mean() > 0.99
    nearer = to_sink < to_center
    assert torch.equal(code.at_sink[clear], nearer[clear])
    assert 0.3 < nearer.double().mean() < 0.7
    # The balance decides for some of them, and groups of one key differ.
    to_center, to_sink = squares(torch.ones_like(balance))
    assert ((to_sink < to_center) != nearer).double().mean() > 0.01
    if layout.num_groups > 1:
        assert (nearer[..., 0] != nearer[..., 1]).double().mean() > 0.01


def test_ties_go_to_the_center() -> None:
    """Halfway, in numbers that float32 holds, a key starts from the center; a step on, not."""
    layout = SlotLayout(64)
    j = torch.arange(64.0)
    center, way = (3 * j - 50)[None], (j - 31)[None]
    key_frame = make_frame(center, center + 2 * way, 2.0 ** (j % 3)[None])
    halfway = center + way
    step = (j == 40).float()  # where the sink lies in the direction of larger coordinates
    code = encode_keys(torch.stack([halfway - step, halfway, halfway + step]), key_frame, layout)
    assert code.at_sink.flatten().tolist() == [False, False, True]


def test_no_key_starts_from_a_sink_that_is_the_center() -> None:
    key = torch.cat([normal(100, 2, 64) * 10.0**exponent for exponent in (-30, -3, 0, 3, 15)])
    code = encode_keys(key, plain_frame(normal(2, 64, seed=1)), SlotLayout(64))
    assert not code.at_sink.any()


@pytest.mark.parametrize("special", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_not_numbers_stay_at_the_center(special: float) -> None:
    """Their distances do not compare, and the stored bit says what the code says."""
    layout = SlotLayout(256)
    key_frame = random_frame(1, 256, seeded(1))
    key = key_frame[:, SINK].repeat(4, 1, 1)
    key[1], key[2, :, 5], key[3, :, 200] = special, special, special
    cache = torch.zeros(1, 1, 16, layout.slot_bytes, dtype=torch.uint8)
    store(key, torch.zeros_like(key), key_frame, cache, torch.arange(4))
    stored, _ = load(cache, torch.tensor([0]), 4, layout)
    for code in (encode_keys(key, key_frame, layout), stored):
        at_sink = code.at_sink[:, 0].tolist()
        assert at_sink == [[True, True], [False, False], [False, True], [True, False]]


@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_sign_of_the_stored_scale_says_which_origin(head_dim: int) -> None:
    """Also that of a scale of 0: a key that equals the sink comes back exactly."""
    layout = SlotLayout(head_dim)
    key_frame = random_frame(2, head_dim, seeded(1))
    center, sink, balance = key_frame.unbind(dim=1)
    nearby = 0.1 * normal(2, head_dim, seed=2) / balance
    mixed = torch.cat([center[:, : head_dim // 2], sink[:, head_dim // 2 :]], dim=1)
    key = torch.zeros(16, 2, head_dim)
    key[:5] = torch.stack([center, sink, center + nearby, sink + nearby, mixed])
    cache = torch.zeros(1, 2, 16, layout.slot_bytes, dtype=torch.uint8)
    store(key, torch.zeros_like(key), key_frame, cache, torch.arange(16))

    bits = block_arrays(cache, layout)["key_scale"].view(torch.int16)[0]  # [heads, groups, tokens]
    assert (bits[..., 0] == 0).all()
    assert (bits[..., 1] == SIGN_BIT).all()
    assert (bits[..., 2] > 0).all()
    assert ((bits[..., 3] < 0) & (bits[..., 3] != SIGN_BIT)).all()
    if layout.num_groups == 2:
        assert bits[..., 4].tolist() == [[0, SIGN_BIT]] * 2

    code, _ = load(cache, torch.tensor([0]), 5, layout)
    assert_same_code(code, encode_keys(key[:5], key_frame, layout))
    assert not code.scale.signbit().any()
    decoded = decode_keys(code, key_frame, layout)
    exact = [0, 1, 4] if layout.num_groups == 2 else [0, 1]
    assert torch.equal(decoded[exact], key[exact].double())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_balancing_by_powers_of_two_is_coding_stretched_keys(head_dim: int) -> None:
    """Key k with balance b has the bytes of key k b with balance 1; queries q and q / b agree."""
    layout = SlotLayout(head_dim)
    key_frame = random_frame(2, head_dim, seeded(1))
    balance = torch.randint(-3, 4, (2, head_dim), generator=seeded(2)).float().exp2()
    center, sink = key_frame[:, CENTER], key_frame[:, SINK]
    key_frame[:, BALANCE] = balance
    stretched = make_frame(center * balance, sink * balance, torch.ones_like(balance))
    at_sink = torch.arange(50)[:, None, None] % 4 == 0
    key = normal(50, 2, head_dim, seed=3) + torch.where(at_sink, sink, center)
    code = encode_keys(key, key_frame, layout)
    assert_same_code(code, encode_keys(key * balance, stretched, layout))
    assert code.at_sink.any() and not code.at_sink.all()
    unbalanced = encode_keys(key, make_frame(center, sink, torch.ones_like(balance)), layout)
    assert (unbalanced.index != code.index).double().mean() > 0.1

    decoded = decode_keys(code, key_frame, layout)
    assert torch.equal(decoded, decode_keys(code, stretched, layout) / balance)
    query = normal(3, 2, 3, head_dim, seed=4).double()
    scores = score_codes(query, code, key_frame, layout)
    size = torch.einsum(
        "qhrd,thd->qhrt", query.abs(), decoded.abs() + 2 * center.abs() + sink.abs()
    )
    exact = torch.einsum("qhrd,thd->qhrt", query, decoded)
    assert ((scores - exact).abs() <= 2 * head_dim * DOUBLE * size).all()
    of_stretched = score_codes(query / balance[:, None], code, stretched, layout)
    assert ((of_stretched - exact).abs() <= 2 * head_dim * DOUBLE * size).all()


@pytest.mark.parametrize("spans", [0, 1, 3])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_relative_frame_is_that_of_keys_less_their_center(head_dim: int, spans: int) -> None:
    """Codes made in a frame, read in its relative one, are the keys less the frame's center."""
    layout = SlotLayout(head_dim)
    key_frame = random_frame(2, head_dim, seeded(1), spans)
    origins = [row for row in range(FIRST_SPAN + spans) if row != BALANCE]
    key_frame[:, origins] = (64 * key_frame[:, origins]).round() / 64  # differences are exact
    center, sink, balance = key_frame[:, :FIRST_SPAN].unbind(dim=1)
    relative = relative_frame(key_frame)
    of_spans = key_frame[:, FIRST_SPAN:] - center[:, None]
    want = make_frame(torch.zeros_like(center), sink - center, balance, of_spans)
    assert torch.equal(relative, want)
    at_sink = torch.arange(40)[:, None, None] % 4 == 0
    positions = 40 * torch.arange(40)
    near = near_origins(key_frame, positions)
    key = normal(40, 2, head_dim, seed=2) / balance + torch.where(at_sink, sink, near)
    code = encode_keys(key, key_frame, layout, positions=positions)
    assert code.at_sink.any() and not code.at_sink.all()
    less = decode_keys(code, relative, layout, positions=positions)
    decoded = decode_keys(code, key_frame, layout, positions=positions)
    rounding = DOUBLE * (2 * less.abs() + decoded.abs())  # of three additions
    assert ((less - (decoded - center.double())).abs() <= rounding).all()


def score_error(query: Tensor, key: Tensor, key_frame: Tensor) -> float:
    """Mean squared error of <q, k^> over all queries with all keys of their head.

    Args:
        query: [num_tokens, num_kv_heads, head_dim].
        key: [seq_len, num_kv_heads, head_dim].
        key_frame: [num_kv_heads, 3, head_dim].
    """
    layout = SlotLayout(key.shape[-1])
    code = encode_keys(key, key_frame, layout)
    scores = score_codes(query[:, :, None], code, key_frame, layout)[:, :, 0]
    return (scores - torch.einsum("qhd,thd->qht", query, key)).square().mean().item()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_balance_moves_the_error_to_where_queries_are_small(head_dim: int) -> None:
    """Where queries are as strong as keys are weak, the gain is that of the equations.

    With a share D of a key's power as error, spread evenly over the d coordinates of B k, the mean
    squared error of a score is D / d * sum E q^2 / b^2 * sum b^2 E k^2 / d.
    """
    strength = 4.0 ** (torch.arange(head_dim) % 5 - 2)  # E k^2, and 1 / E q^2
    key = normal(2000, 1, head_dim, seed=1) * strength.sqrt()
    query = normal(200, 1, head_dim, seed=2) / strength.sqrt()
    zero = torch.zeros(1, head_dim)
    balance = strength.rsqrt()[None]  # makes both isotropic
    plain = score_error(query, key, plain_frame(zero))
    gain = (strength.mean() * (1 / strength).mean()).item()
    assert gain > 15
    balanced = score_error(query, key, make_frame(zero, zero, balance))
    assert plain / balanced == pytest.approx(gain, rel=0.1)
    # Stretched the wrong way, it is a loss.
    assert score_error(query, key, make_frame(zero, zero, 1 / balance)) > 10 * plain


@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_near_the_sink_are_nearly_exact(head_dim: int) -> None:
    """Their error is a share of the way from the sink, and no more of that from the center."""
    num_kv_heads = 200
    center, sink = 3 * normal(2, num_kv_heads, head_dim, seed=1)
    way = 0.1 * normal(10, num_kv_heads, head_dim, seed=2)
    query = normal(50, num_kv_heads, head_dim, seed=3)
    plain = score_error(query, sink + way, plain_frame(center))
    framed = score_error(query, sink + way, make_frame(center, sink, torch.ones_like(center)))
    gain = ((sink + way - center).square().mean() / way.square().mean()).item()
    assert gain > 1000
    assert plain / framed == pytest.approx(gain, rel=0.1)
