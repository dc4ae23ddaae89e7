"""Builder and implementation against exact attention over what is cached, for named batches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("vllm")
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_turboquant import plugin, reference, reference_recent
from vllm_turboquant.frame import CENTER, SINK, near_origins
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.testing import random_frame

if TYPE_CHECKING:
    from vllm_turboquant.attention import TurboQuant3Impl

pytestmark = pytest.mark.vllm
on_a_cpu = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="vLLM for GPUs merges attention on GPUs only"
)

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 64, 32
SCALE = HEAD_DIM**-0.5
KEY_FRAME = random_frame(NUM_KV_HEADS, HEAD_DIM, torch.Generator().manual_seed(0), num_spans=2)


@dataclass(frozen=True)
class BatchSpec:
    """Requests of one step: tokens already in the cache, and tokens computed now."""

    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...]


BATCH_SPECS = {
    "decode": BatchSpec((40, 1, 95), (1, 1, 1)),
    "prefill": BatchSpec((0, 0), (33, 7)),
    "chunked prefill": BatchSpec((64, 17), (20, 48)),
    "prefix hit": BatchSpec((96, 0), (5, 9)),
    "mixed": BatchSpec((31, 32, 0, 50), (1, 1, 40, 2)),
    "padded": BatchSpec((31, 32, 0, 50), (1, 1, 40, 2)),
    "two spans": BatchSpec((511, 512, 600, 500), (1, 1, 1, 30)),
}


@dataclass(frozen=True)
class Step:
    """What one step gave, and what it read.

    Attributes:
        output: [num_tokens + padding, num_heads, head_dim], on the CPU.
        requests: (query, key, value) of each request, the latter two of all its tokens.
        impl: With its copies, if there are any.
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
        block_table: [num_reqs, max_blocks] int32, on the CPU.
    """

    output: Tensor
    requests: list[tuple[Tensor, Tensor, Tensor]]
    impl: TurboQuant3Impl
    kv_cache: Tensor
    block_table: Tensor

    def cached(self, req: int, num_tokens: int, *, with_copies: bool) -> tuple[Tensor, Tensor]:
        """First keys and values of a request as they can be read: [num_tokens, ...] float64."""
        cache, table, layout = self.kv_cache.cpu(), self.block_table[req], SlotLayout(HEAD_DIM)
        pool = self.impl.pool
        if pool is None or not with_copies:
            key, value = reference.load(cache, table, num_tokens, layout)
            return (
                reference.decode_keys(key, KEY_FRAME, layout, positions=torch.arange(num_tokens)),
                reference.decode_values(value, layout),
            )
        recent, unit_map = self.impl.recent.cpu(), pool.unit_map.cpu()
        return reference_recent.read(
            cache, table, num_tokens, KEY_FRAME, recent, unit_map, pool.window_units
        )


def make_config(model: Path, **options: bool | int) -> VllmConfig:
    plugin.register()
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        kv_cache_dtype="turboquant3",
        additional_config={"turboquant": options},
    ).create_engine_config()


def run_step(
    config: VllmConfig,
    spec: BatchSpec,
    padding: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    planned_for: str | None = None,
) -> Step:
    """Run one step through the builder and the implementation, after one for each context.

    The builder plans for another device where one is named.

    With a window, a layer without one has the same builder, and blocks that slid out of it are no
    longer in the block table: one of NaN, which nobody writes, takes their place.
    """
    from vllm_turboquant.attention import TurboQuant3Impl
    from vllm_turboquant.metadata import TurboQuant3Metadata, TurboQuant3MetadataBuilder
    from vllm_turboquant.recent import allocate_copies

    generator = torch.Generator().manual_seed(len(spec.query_lens) + sum(spec.query_lens))
    num_blocks_each = 20
    num_reqs = len(spec.query_lens)
    cache = torch.full(
        (num_reqs * num_blocks_each + 1, NUM_KV_HEADS, BLOCK_SIZE, SlotLayout(HEAD_DIM).slot_bytes),
        0xFF,
        dtype=torch.uint8,
    )
    blocks = torch.randperm(cache.shape[0], generator=generator)[: num_reqs * num_blocks_each]
    block_table = blocks.view(num_reqs, num_blocks_each).int()

    host_table = block_table.clone()
    nobodys = (set(range(len(cache))) - set(blocks.tolist())).pop()

    def slots(req: int, first: int, last: int) -> Tensor:
        position = torch.arange(first, last)
        return host_table[req, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE

    # Models are built while PyTorch's default dtype is the model's.
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(torch.bfloat16),
        torch.device(device),
    ):
        impl = TurboQuant3Impl(
            NUM_HEADS, HEAD_DIM, SCALE, NUM_KV_HEADS, sliding_window=sliding_window
        )
    impl.set_key_frame(KEY_FRAME.to(device))
    cache, block_table = cache.to(device), block_table.to(device)
    layer = SimpleNamespace(impl=impl, kv_cache=cache)
    allocate_copies(config, [layer], cache_bytes=2**30)
    other = SimpleNamespace(impl=SimpleNamespace(sliding_window=0))
    config.compilation_config.static_forward_context |= {"layer": layer, "other": other}
    layer_names = ["layer", "other"] if sliding_window else ["layer"]
    page = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.uint8
    )
    builder = TurboQuant3MetadataBuilder(
        page, layer_names, config, torch.device(planned_for or device)
    )
    if planned_for:
        tile = torch.full((2, 1000, NUM_KV_HEADS, HEAD_DIM), torch.nan, dtype=dtype)
        impl.scratch = SimpleNamespace(tile=lambda: tile, decode=lambda: None, tickets=None)

    def build(
        reqs: list[int],
        query_lens: Tensor,
        seq_lens: Tensor,
        slot_mapping: Tensor,
        positions: Tensor | None = None,
    ) -> TurboQuant3Metadata:
        query_start_loc = torch.cat([torch.zeros(1), query_lens.cumsum(0)]).int()
        common = CommonAttentionMetadata(
            query_start_loc=query_start_loc.to(device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=seq_lens.to(device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(reqs),
            num_actual_tokens=int(query_lens.sum()),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=block_table[reqs],
            slot_mapping=slot_mapping.to(device),
            positions=None if positions is None else positions.to(device),
        )
        return builder.build(0, common)

    def forward(query: Tensor, key: Tensor, value: Tensor, metadata: TurboQuant3Metadata) -> Tensor:
        query, key, value = (x.to(device) for x in (query, key, value))
        output = torch.full_like(query, 7.0)
        return impl.forward(None, query, key, value, cache, metadata, output)

    requests, queries, keys, values, mapping, where = [], [], [], [], [], []
    for req, (context, fresh) in enumerate(zip(spec.context_lens, spec.query_lens, strict=True)):
        seq_len = context + fresh
        query = torch.randn(fresh, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype)
        key, value = torch.randn(2, seq_len, NUM_KV_HEADS, HEAD_DIM, generator=generator)
        position = torch.arange(seq_len)
        at_sink = position[:, None, None] % 7 == 0
        key += torch.where(at_sink, KEY_FRAME[:, SINK], near_origins(KEY_FRAME, position))
        key, value = key.to(dtype), value.to(dtype)
        if context:
            length = torch.tensor([context], dtype=torch.int32)
            metadata = build([req], length, length, slots(req, 0, context))
            nobody = torch.zeros(context, NUM_HEADS, HEAD_DIM, dtype=dtype)
            forward(nobody, key[:context], value[:context], metadata)
        if sliding_window:
            num_gone = max(0, context - sliding_window + 1) // BLOCK_SIZE
            block_table[req, :num_gone] = nobodys
        requests.append((query, key, value))
        queries.append(query)
        keys.append(key[context:])
        values.append(value[context:])
        mapping.append(slots(req, context, seq_len))
        where.append(position[context:])
    nothing = torch.full((padding, NUM_HEADS, HEAD_DIM), torch.nan, dtype=dtype)
    query = torch.cat([*queries, nothing])
    key = torch.cat([*keys, nothing[:, :NUM_KV_HEADS]])
    value = torch.cat([*values, nothing[:, :NUM_KV_HEADS]])
    slot_mapping = torch.cat([*mapping, torch.full((padding,), -1)])
    query_lens, context_lens = torch.tensor(spec.query_lens), torch.tensor(spec.context_lens)
    seq_lens = (query_lens + context_lens).int()
    positions = torch.cat([*where, torch.full((padding,), 2**40)])
    metadata = build(list(range(num_reqs)), query_lens, seq_lens, slot_mapping, positions)
    without = build(list(range(num_reqs)), query_lens, seq_lens, slot_mapping).positions.cpu()
    assert torch.equal(without[: len(query) - padding], positions[: len(query) - padding])
    assert without.dtype == positions.dtype and len(without) == len(slot_mapping)
    output = forward(query, key, value, metadata)
    return Step(output.cpu(), requests, impl, cache, host_table)


def attention(
    query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None = None
) -> Tensor:
    """Causal attention in float64: [num_rows, num_heads, head_dim]."""
    rows, columns = torch.arange(query.shape[0])[:, None], torch.arange(key.shape[0])
    distance = rows + key.shape[0] - query.shape[0] - columns
    visible = (distance >= 0) & (distance < (sliding_window or len(key)))
    return torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1),
        key.double().transpose(0, 1).repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0),
        value.double().transpose(0, 1).repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0),
        attn_mask=visible,
        scale=SCALE,
    ).transpose(0, 1)


def check_batch(
    model: Path,
    name: str,
    exact_prefill: bool,
    recent_tokens: int,
    bound: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    planned_for: str | None = None,
) -> None:
    spec = BATCH_SPECS[name]
    padding = 3 if name == "padded" else 0
    config = make_config(model, exact_prefill=exact_prefill, recent_tokens=recent_tokens)
    step = run_step(config, spec, padding, device, dtype, sliding_window, planned_for)
    assert (step.impl.pool is not None) is (recent_tokens > 0)
    start = 0
    for req, (query, key, value) in enumerate(step.requests):
        rows = query.shape[0]
        num_cached = len(key) - (rows if exact_prefill and rows > 1 else 0)
        with_copies = rows == 1 or exact_prefill
        read_key, read_value = step.cached(req, num_cached, with_copies=with_copies)
        want = attention(
            query,
            torch.cat([read_key, key[num_cached:].double()]),
            torch.cat([read_value, value[num_cached:].double()]),
            sliding_window,
        )
        error = (step.output[start : start + rows] - want).norm() / want.norm()
        assert error < bound, f"request at row {start}: relative error {error:.2e}"
        start += rows
    assert (step.output[start:] == 7.0).all(), "padding rows must stay untouched"


EXACT_OR_NOT = pytest.mark.parametrize(
    "exact_prefill", [True, False], ids=["exact", "through the cache"]
)
COPIES_OR_NOT = pytest.mark.parametrize("recent_tokens", [0, 32], ids=["codes", "copies"])
#: Of one token, within a request's rows, and longer than some.
WINDOWS = pytest.mark.parametrize("sliding_window", [None, 1, 7, 40])


@on_a_cpu
@EXACT_OR_NOT
@COPIES_OR_NOT
@WINDOWS
@pytest.mark.parametrize("name", BATCH_SPECS)
def test_batches(
    tiny_llama: Path,
    name: str,
    exact_prefill: bool,
    recent_tokens: int,
    sliding_window: int | None,
) -> None:
    check_batch(tiny_llama, name, exact_prefill, recent_tokens, 1e-3, sliding_window=sliding_window)


def plain_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: tuple[Tensor, int],
    keys: tuple[Tensor, int],
    scale: float,
    out: Tensor,
    *,
    causal: bool,
    sliding_window: int = 0,
) -> Tensor:
    """What ``fresh.flash_attention`` promises, by PyTorch."""
    assert causal or not sliding_window
    lse = torch.full((query.shape[1], len(query)), torch.inf)
    assert queries[0][-1] == len(query) and keys[0][-1] == len(key)
    assert (queries[1], keys[1]) == (queries[0].diff().max(), keys[0].diff().max())
    key, value = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for x in (key, value))
    bounds = zip(pairwise(queries[0].tolist()), pairwise(keys[0].tolist()), strict=True)
    for (first, last), (begin, end) in bounds:
        if begin == end:
            out[first:last] = 0
            continue
        scores = scale * torch.einsum("qhd,thd->hqt", query[first:last], key[begin:end])
        if causal:
            visible = reference.visible_tokens(
                last - first, end - begin, sliding_window=sliding_window
            )
            scores = scores.masked_fill(~visible, -torch.inf)
        lse[:, first:last] = scores.logsumexp(dim=-1)
        weights = scores.softmax(dim=-1)
        out[first:last] = torch.einsum("hqt,thd->qhd", weights, value[begin:end])
    return lse


@on_a_cpu
@EXACT_OR_NOT
@COPIES_OR_NOT
@WINDOWS
@pytest.mark.parametrize("tile_tokens", [16384, 48])
@pytest.mark.parametrize("name", BATCH_SPECS)
def test_batches_planned_for_a_gpu(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    exact_prefill: bool,
    recent_tokens: int,
    sliding_window: int | None,
    tile_tokens: int,
) -> None:
    """The tiles of a GPU, with the operators of a CPU."""
    from vllm_turboquant import metadata, tiles, window_tiles

    monkeypatch.setattr(metadata, "TILE_TOKENS", tile_tokens)
    for module in (tiles, window_tiles):
        monkeypatch.setattr(module, "flash_attention", plain_flash_attention)
    check_batch(
        tiny_llama,
        name,
        exact_prefill,
        recent_tokens,
        1e-3,
        sliding_window=sliding_window,
        planned_for="meta",
    )


def test_decoding_reads_copies_of_the_newest_tokens(tiny_llama: Path) -> None:
    """Nearly exact where all tokens are recent, better than codes where some are."""
    errors = {}
    for recent_tokens in (0, 32, 112):
        config = make_config(tiny_llama, recent_tokens=recent_tokens)
        step = run_step(config, BATCH_SPECS["decode"])
        want = torch.cat([attention(*request) for request in step.requests])
        difference = (step.output - want).flatten(1).norm(dim=1)
        errors[recent_tokens] = difference / want.flatten(1).norm(dim=1)
    # Of 41, 2 and 96 tokens; the windows have 3 and 8 units.
    assert (errors[0] > 0.1).all()
    assert (errors[32][:2] < 0.02).all() and errors[32][2] < 0.95 * errors[0][2]
    assert (errors[112] < 0.02).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@EXACT_OR_NOT
@COPIES_OR_NOT
@WINDOWS
@pytest.mark.parametrize("tile_tokens", [16384, 48])
@pytest.mark.parametrize("name", BATCH_SPECS)
def test_batches_on_a_gpu(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    exact_prefill: bool,
    recent_tokens: int,
    sliding_window: int | None,
    tile_tokens: int,
) -> None:
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    from vllm_turboquant import metadata

    monkeypatch.setattr(metadata, "TILE_TOKENS", tile_tokens)
    init_workspace_manager(torch.device("cuda"))
    try:
        check_batch(
            tiny_llama,
            name,
            exact_prefill,
            recent_tokens,
            1e-2,
            "cuda",
            torch.bfloat16,
            sliding_window,
        )
    finally:
        reset_workspace_manager()


def test_profiling_run_gives_zeros(tiny_llama: Path) -> None:
    from vllm_turboquant.attention import TurboQuant3Impl

    with set_current_vllm_config(make_config(tiny_llama)):
        impl = TurboQuant3Impl(NUM_HEADS, HEAD_DIM, SCALE, NUM_KV_HEADS)
    query = torch.randn(3, NUM_HEADS, HEAD_DIM)
    key = torch.randn(3, NUM_KV_HEADS, HEAD_DIM)
    output = torch.full_like(query, torch.nan)
    impl.forward(None, query, key, key, torch.tensor([]), None, output)
    assert (output == 0).all()


def test_measuring_run_attends_within_the_window(tiny_llama: Path) -> None:
    from vllm_turboquant.attention import TurboQuant3Impl

    with set_current_vllm_config(make_config(tiny_llama)):
        impl = TurboQuant3Impl(NUM_HEADS, HEAD_DIM, SCALE, NUM_KV_HEADS, sliding_window=7)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(40, NUM_HEADS, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, 40, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    output, observed = torch.full_like(query, torch.nan), []
    impl.observe = lambda *query_and_key: observed.append(query_and_key)
    impl.forward(None, query, key, value, torch.tensor([]), None, output)
    assert observed == [(query, key)]
    want = attention(query, key, value, 7)
    torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5)


@on_a_cpu
def test_merge_is_attention_over_both_sets() -> None:
    from vllm_turboquant.fresh import FreshRequests, fresh_attention
    from vllm_turboquant.tiles import merge_into

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, NUM_HEADS, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, 2, 2, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    one_each = FreshRequests.of_lengths([1, 1], torch.device("cpu"))
    outs = torch.zeros(2, 2, NUM_HEADS, HEAD_DIM)
    lses = [fresh_attention(query, key[i], value[i], one_each, SCALE, outs[i]) for i in range(2)]
    out, lse = outs[0].clone(), lses[0].clone()
    second = slice(1, 2)
    merge_into(out, lse, second, outs[1][second], lses[1][:, second])
    assert torch.equal(out[0], outs[0][0]) and torch.equal(lse[:, 0], lses[0][:, 0])
    keys, values = (x[:, 1].repeat_interleave(3, 1) for x in (key, value))
    scores = torch.einsum("hd,thd->ht", query[1], keys) * SCALE
    torch.testing.assert_close(out[1], torch.einsum("ht,thd->hd", scores.softmax(-1), values))
    torch.testing.assert_close(lse[:, 1], scores.logsumexp(-1))
    nothing = torch.zeros(1, NUM_HEADS, HEAD_DIM), torch.full((NUM_HEADS, 1), -torch.inf)
    merge_into(out, lse, slice(0, 1), *nothing)
    torch.testing.assert_close(out[0], outs[0][0])


def test_scores_with_the_center_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_turboquant import attention

    impl = attention.TurboQuant3Impl(NUM_HEADS, HEAD_DIM, SCALE, NUM_KV_HEADS)
    impl.set_key_frame(KEY_FRAME)
    query = torch.randn(7, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    center = KEY_FRAME[:, CENTER].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=0)
    want = SCALE * torch.einsum("thd,hd->ht", query.double(), center.double())
    for rows in (2, 7, 512):
        monkeypatch.setattr(attention, "CENTER_ROWS", rows)
        got = impl._center_scores(query)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
