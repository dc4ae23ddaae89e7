"""The arithmetic of the evaluation: divergences, errors, hidden states, naive codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vllm_turboquant.estimate import Estimate
from vllm_turboquant.evaluation import naive
from vllm_turboquant.evaluation.fidelity import (
    CHUNK_ROWS,
    NUM_PARTS,
    compare_logits,
    score_window,
)
from vllm_turboquant.evaluation.recording import Recording


def logits(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, 100, generator=generator, dtype=torch.float64)


def test_scores_equal_those_of_torch() -> None:
    p, q = logits(50, 0), logits(50, 1)
    targets = torch.arange(50)
    scores = compare_logits(p.float(), q.float(), targets)
    log_p, log_q = log_softmax(p, -1), log_softmax(q, -1)
    want = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(scores.kl, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        scores.nll, cross_entropy(q, targets, reduction="none"), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        scores.reference_nll, cross_entropy(p, targets, reduction="none"), rtol=1e-5, atol=0
    )
    assert scores.agreement.tolist() == (p.argmax(-1) == q.argmax(-1)).double().tolist()


def test_equal_logits_are_at_distance_zero() -> None:
    scores = compare_logits(logits(9, 0), logits(9, 0), torch.zeros(9, dtype=torch.int64))
    assert scores.kl.tolist() == [0.0] * 9
    assert scores.agreement.tolist() == [1.0] * 9


def test_tokens_that_the_reference_excludes_add_nothing() -> None:
    p, q = logits(4, 0), logits(4, 1)
    p[:, 7] = q[:, 7] = -torch.inf
    kept = [i for i in range(100) if i != 7]
    targets = torch.zeros(4, dtype=torch.int64)
    got = compare_logits(p, q, targets).kl
    torch.testing.assert_close(
        got, compare_logits(p[:, kept], q[:, kept], targets).kl, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("context", [5, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 50])
def test_a_window_scored_in_chunks_is_the_mean_over_its_tokens(context: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 100).requires_grad_(False)
    nn.init.normal_(head.weight, std=0.25, generator=generator)
    reference, other = torch.randn(2, context, 16, generator=generator)
    tokens = torch.randint(100, (context,), generator=generator)
    scores = score_window(head, reference, other, tokens)
    assert scores is not None
    whole = compare_logits(head(reference[:-1]), head(other[:-1]), tokens[1:])
    assert sum(scores["sizes"]) == context - 1
    assert len(scores["sizes"]) == min(NUM_PARTS, context - 1)
    for name in ("kl", "nll", "reference_nll", "agreement"):
        got = Estimate.of(scores[name], scores["sizes"]).mean
        assert got == pytest.approx(float(getattr(whole, name).mean()), rel=1e-5)


def test_ranks_without_logits_take_part_and_return_nothing() -> None:
    calls: list[int] = []
    hidden = torch.zeros(CHUNK_ROWS + 9, 4)
    tokens = torch.zeros(len(hidden), dtype=torch.int64)
    assert score_window(lambda rows: calls.append(len(rows)), hidden, hidden, tokens) is None
    assert calls == [CHUNK_ROWS, CHUNK_ROWS, 8, 8]


def test_estimate() -> None:
    equal = Estimate.of([1.0, 2.0, 6.0], [5, 5, 5])
    assert equal.mean == pytest.approx(3)
    assert equal.error == pytest.approx(math.sqrt(7 / 3))  # sample variance 7, of three values
    assert Estimate.of([1.0, 4.0], [2, 1]).mean == pytest.approx(2)
    assert math.isnan(Estimate.of([1.0], [5]).error)


@pytest.mark.parametrize("in_lockstep", [False, True])
def test_hidden_states_are_put_together_in_the_order_of_the_engine(in_lockstep: bool) -> None:
    windows = [[5, 6, 7, 8], [9, 5, 6, 7], [1, 2, 3, 4]]
    hidden = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    recording = Recording.expect(windows, in_lockstep)
    steps = (
        [(slice(None), i) for i in range(4)]
        if in_lockstep
        else [(i, rows) for i in range(3) for rows in (slice(0, 3), slice(3, 4))]
    )
    for step in steps:
        ids = torch.tensor(windows)[step].int().reshape(-1)
        positions = torch.arange(4).expand(3, 4)[step].reshape(-1)
        recording.take(hidden[step].reshape(-1, 8), ids, positions)
    assert torch.equal(recording.complete(), hidden)


@pytest.mark.parametrize(
    ("ids", "positions"),
    [([5, 7], [0, 1]), ([5, 6], [1, 2]), ([5, 6, 7, 8, 9], [0, 1, 2, 3, 4])],
    ids=["other tokens", "other positions", "too many"],
)
def test_rows_that_are_not_the_windows_are_refused(ids: list[int], positions: list[int]) -> None:
    recording = Recording.expect([[5, 6, 7, 8]], in_lockstep=False)
    with pytest.raises(RuntimeError, match="not the next tokens of the windows"):
        recording.take(torch.zeros(len(ids), 8), torch.tensor(ids), torch.tensor(positions))


def test_missing_rows_are_refused() -> None:
    recording = Recording.expect([[5, 6, 7]], in_lockstep=False)
    recording.take(torch.zeros(2, 8), torch.tensor([5, 6]), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="2 of 3 rows of hidden states came"):
        recording.complete()


@pytest.mark.parametrize("bits", [4, 8])
def test_naive_codes_err_by_half_a_step_at_most_and_use_it(bits: int) -> None:
    x = torch.randn(500, 3, 64, generator=torch.Generator().manual_seed(0))
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (naive.quantize(x, bits) - x) / step
    assert error.abs().max() <= 0.5 + 1e-4
    assert float(error.square().mean()) == pytest.approx(1 / 12, rel=0.03)  # uniform


def test_naive_codes_keep_zero_the_largest_and_the_dtype() -> None:
    x = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    x[1, 0, 3] = -2.5
    for key, value in (naive.int8(x, x), naive.int4(x, x)):
        assert torch.equal(key, x) and torch.equal(value, x)
        assert key.dtype == value.dtype == torch.bfloat16
