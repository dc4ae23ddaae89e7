"""Builder and implementation against exact attention over decoded keys, for named batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_turboquant import plugin, reference
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.testing import random_frame

pytestmark = pytest.mark.vllm

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 64, 32
SCALE = HEAD_DIM**-0.5
KEY_FRAME = random_frame(NUM_KV_HEADS, HEAD_DIM, torch.Generator().manual_seed(0))


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
}


def make_config(model: Path, exact_prefill: bool = True) -> VllmConfig:
    plugin.register()
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        kv_cache_dtype="turboquant3",
        additional_config={"turboquant": {"exact_prefill": exact_prefill}},
    ).create_engine_config()


def run_step(
    config: VllmConfig,
    spec: BatchSpec,
    padding: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Store the contexts and run one step through the builder and the implementation.

    Returns, on the CPU:
        Output [num_tokens + padding, num_heads, head_dim] and per request (query, key, value), the
        latter two of all its tokens.
    """
    from vllm_turboquant.attention import TurboQuant3Impl
    from vllm_turboquant.metadata import TurboQuant3MetadataBuilder

    generator = torch.Generator().manual_seed(len(spec.query_lens) + sum(spec.query_lens))
    num_blocks_each = 6
    num_reqs = len(spec.query_lens)
    cache = torch.full(
        (num_reqs * num_blocks_each + 1, NUM_KV_HEADS, BLOCK_SIZE, SlotLayout(HEAD_DIM).slot_bytes),
        0xFF,
        dtype=torch.uint8,
    )
    blocks = torch.randperm(cache.shape[0], generator=generator)[: num_reqs * num_blocks_each]
    block_table = blocks.view(num_reqs, num_blocks_each).int()

    host_table = block_table

    def slots(req: int, first: int, last: int) -> Tensor:
        position = torch.arange(first, last)
        return host_table[req, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE

    # Models are built while PyTorch's default dtype is the model's.
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(torch.bfloat16),
        torch.device(device),
    ):
        impl = TurboQuant3Impl(NUM_HEADS, HEAD_DIM, SCALE, NUM_KV_HEADS)
    impl.set_key_frame(KEY_FRAME.to(device))
    cache, block_table = cache.to(device), block_table.to(device)

    def store(key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        arguments = (key.to(device), value.to(device), cache, slot_mapping.to(device))
        impl.do_kv_cache_update(None, *arguments)

    requests, queries, keys, values, mapping = [], [], [], [], []
    for req, (context, fresh) in enumerate(zip(spec.context_lens, spec.query_lens, strict=True)):
        seq_len = context + fresh
        query = torch.randn(fresh, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype)
        key, value = torch.randn(2, seq_len, NUM_KV_HEADS, HEAD_DIM, generator=generator)
        center, sink, _ = KEY_FRAME.unbind(dim=1)
        key = key + torch.where(torch.arange(seq_len)[:, None, None] % 7 == 0, sink, center)
        key, value = key.to(dtype), value.to(dtype)
        store(key[:context], value[:context], slots(req, 0, context))
        requests.append((query, key, value))
        queries.append(query)
        keys.append(key[context:])
        values.append(value[context:])
        mapping.append(slots(req, context, seq_len))
    nothing = torch.full((padding, NUM_HEADS, HEAD_DIM), torch.nan, dtype=dtype)
    query = torch.cat([*queries, nothing])
    key = torch.cat([*keys, nothing[:, :NUM_KV_HEADS]])
    value = torch.cat([*values, nothing[:, :NUM_KV_HEADS]])
    slot_mapping = torch.cat([*mapping, torch.full((padding,), -1)])
    store(key, value, slot_mapping)

    query_lens, context_lens = torch.tensor(spec.query_lens), torch.tensor(spec.context_lens)
    query_start_loc = torch.cat([torch.zeros(1), query_lens.cumsum(0)]).int()
    seq_lens = (query_lens + context_lens).int()
    common = CommonAttentionMetadata(
        query_start_loc=query_start_loc.to(device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=num_reqs,
        num_actual_tokens=int(query_lens.sum()),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=block_table,
        slot_mapping=slot_mapping.to(device),
    )
    page = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.uint8
    )
    builder = TurboQuant3MetadataBuilder(page, [], config, torch.device(device))
    query, key, value = (x.to(device) for x in (query, key, value))
    output = torch.full_like(query, 7.0)
    impl.forward(None, query, key, value, cache, builder.build(0, common), output)
    return output.cpu(), requests


def expected(query: Tensor, key: Tensor, value: Tensor, num_exact: int) -> Tensor:
    """Attention in float64 where all but the last ``num_exact`` tokens are read from codes."""
    layout = SlotLayout(HEAD_DIM)
    first_exact = key.shape[0] - num_exact
    key_code = reference.encode_keys(key, KEY_FRAME, layout)
    decoded_key = reference.decode_keys(key_code, KEY_FRAME, layout)
    decoded_value = reference.decode_values(reference.encode_values(value, layout), layout)
    decoded_key[first_exact:] = key[first_exact:]
    decoded_value[first_exact:] = value[first_exact:]
    rows, columns = torch.arange(query.shape[0])[:, None], torch.arange(key.shape[0])
    visible = columns <= rows + key.shape[0] - query.shape[0]
    return torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1),
        decoded_key.transpose(0, 1).repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0),
        decoded_value.transpose(0, 1).repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0),
        attn_mask=visible,
        scale=SCALE,
    ).transpose(0, 1)


def check_batch(
    model: Path,
    name: str,
    exact_prefill: bool,
    bound: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    spec = BATCH_SPECS[name]
    padding = 3 if name == "padded" else 0
    config = make_config(model, exact_prefill)
    output, requests = run_step(config, spec, padding, device, dtype)
    start = 0
    for query, key, value in requests:
        rows = query.shape[0]
        num_exact = rows if exact_prefill and rows > 1 else 0
        want = expected(query, key, value, num_exact)
        error = (output[start : start + rows] - want).norm() / want.norm()
        assert error < bound, f"request at row {start}: relative error {error:.2e}"
        start += rows
    assert (output[start:] == 7.0).all(), "padding rows must stay untouched"


EXACT_OR_NOT = pytest.mark.parametrize(
    "exact_prefill", [True, False], ids=["exact", "through the cache"]
)


@EXACT_OR_NOT
@pytest.mark.parametrize("name", BATCH_SPECS)
def test_batches(tiny_llama: Path, name: str, exact_prefill: bool) -> None:
    check_batch(tiny_llama, name, exact_prefill, bound=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@EXACT_OR_NOT
@pytest.mark.parametrize("tile_tokens", [16384, 48])
@pytest.mark.parametrize("name", BATCH_SPECS)
def test_batches_on_a_gpu(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    exact_prefill: bool,
    tile_tokens: int,
) -> None:
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    from vllm_turboquant import metadata

    monkeypatch.setattr(metadata, "TILE_TOKENS", tile_tokens)
    init_workspace_manager(torch.device("cuda"))
    try:
        check_batch(tiny_llama, name, exact_prefill, 1e-2, "cuda", torch.bfloat16)
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
