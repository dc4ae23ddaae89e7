"""Random schedules of requests over a pool of blocks, of the kinds that an engine makes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_turboquant.testing import POISON_BLOCK

MOST_TOKENS = 230  # of a request
MOST_ROWS = 4  # of a decode step, speculative ones included


@dataclass(eq=False)
class Request:
    """A sequence of tokens and the blocks that hold it.

    Attributes:
        tokens: Names of the tokens; a token that replaces a rejected one has another name.
        known: Tokens of the prompt and accepted ones.
        computed: Of them, those in the cache.
        blocks: In order.
    """

    tokens: list[int]
    known: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Span:
    """What a request writes in a step: its tokens ``first`` to ``last - 1``."""

    request: Request
    first: int
    last: int
    tokens: list[int]  # all up to ``last``


@dataclass(frozen=True)
class Step:
    """Arguments of the operators, some padding included.

    Attributes:
        spans: One per request.
        block_table: [num_reqs, max_blocks] int32, poisoned behind a request's tokens.
        seq_lens: [num_reqs] int32.
        query_start_loc: [num_reqs + 1] int32.
        slot_mapping: [num_rows] int64.
        preempted: Requests that lost their blocks.
    """

    spans: list[Span]
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    preempted: list[Request]

    @property
    def row_tokens(self) -> list[int]:
        """Names of the tokens that are written, without padding."""
        return [token for span in self.spans for token in span.tokens[span.first :]]


class Schedule:
    """Requests start, some with the blocks of others, prefill in chunks, decode speculatively, are
    preempted and resume, end, and leave their blocks to others."""

    def __init__(
        self, seed: int, num_blocks: int, block_size: int, most_requests: int, idle: float = 0.0
    ) -> None:
        """A request sits a step out with probability ``idle``."""
        self.random = random.Random(seed)
        self.block_size = block_size
        self.most_requests = most_requests
        self.idle = idle
        self.num_tokens = 0  # names given
        self.free = list(range(num_blocks))
        self.users = [0] * num_blocks
        self.content: dict[int, tuple[int, ...]] = {}  # of full blocks
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.past: list[list[int]] = []  # prompts to start from

    def step(self) -> Step:
        """Plan a step; requests are left as it leaves them."""
        for request in list(self.running):
            if request.known + MOST_ROWS > MOST_TOKENS or self._chance(0.02):
                self._leave(request)
        while len(self.running) < self.most_requests and self._chance(0.3):
            self._join(self.waiting.pop() if self.waiting and self._chance(0.5) else self._new())
        preempted: list[Request] = []
        if self.running and self._chance(0.03):
            self._preempt(self.random.choice(self.running), preempted)
        spans: list[Span] = []
        for request in list(self.running):
            if request in self.running and not self._chance(self.idle):
                self._advance(request, spans, preempted)
        return self._arguments(spans, preempted)

    def _advance(self, request: Request, spans: list[Span], preempted: list[Request]) -> None:
        first, decodes = request.computed, request.computed == request.known
        if decodes:
            rows = self.random.randint(1, MOST_ROWS)
            request.tokens[first:] = self._names(rows)
        else:
            rows = self.random.randint(1, min(request.known - first, self.random.choice([20, 90])))
        last = first + rows
        while len(request.blocks) * self.block_size < last:
            if not self.free:
                busy = [span.request for span in spans]
                victims = [r for r in self.running if r is not request and r not in busy]
                if not victims:
                    return
                self._preempt(victims[-1], preempted)
                continue
            block = self.free.pop(self.random.randrange(len(self.free)))
            self.content.pop(block, None)
            self.users[block] = 1
            request.blocks.append(block)
        spans.append(Span(request, first, last, request.tokens[:last]))
        request.computed = first + self.random.randint(1, rows) if decodes else last
        request.known = max(request.known, request.computed)
        for i in range(request.computed // self.block_size):
            self.content[request.blocks[i]] = self._block_tokens(request.tokens, i)

    def _new(self) -> Request:
        prompt = self.random.choice(self.past) if self.past and self._chance(0.5) else []
        prompt = prompt[: self.random.randint(0, len(prompt))]
        prompt = prompt + self._names(self.random.randint(1, 100))
        prompt = prompt[: MOST_TOKENS // 2]
        return Request(prompt, len(prompt))

    def _join(self, request: Request) -> None:
        """Run a request, with blocks that hold its first tokens already, but not all of them."""
        blocks = {content: block for block, content in self.content.items()}
        for i in range((request.known - 1) // self.block_size):
            block = blocks.get(self._block_tokens(request.tokens, i))
            if block is None or self._chance(0.1):
                break
            if self.users[block] == 0:
                self.free.remove(block)
            self.users[block] += 1
            request.blocks.append(block)
        request.computed = len(request.blocks) * self.block_size
        self.running.append(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.past = [*self.past[-4:], request.tokens[: request.known]]
        for block in request.blocks:
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)
        request.blocks = []

    def _preempt(self, request: Request, preempted: list[Request]) -> None:
        self._leave(request)
        self.waiting.append(request)
        preempted.append(request)

    def _arguments(self, spans: list[Span], preempted: list[Request]) -> Step:
        padding = self.random.choice([0, 0, 2])
        most_blocks = -(-MOST_TOKENS // self.block_size)
        table = torch.full((len(spans) + padding, most_blocks), POISON_BLOCK, dtype=torch.int32)
        slots = []
        for req, span in enumerate(spans):
            blocks = torch.tensor(span.request.blocks[: -(-span.last // self.block_size)])
            table[req, : len(blocks)] = blocks
            position = torch.arange(span.first, span.last)
            block, offset = blocks[position // self.block_size], position % self.block_size
            slots.append(block * self.block_size + offset)
        starts = torch.tensor([0, *(span.last - span.first for span in spans), *[0] * padding])
        return Step(
            spans,
            table,
            torch.tensor([*(span.last for span in spans), *[0] * padding], dtype=torch.int32),
            starts.cumsum(0).int(),
            torch.cat([*slots, torch.full((padding,), -1)]),
            preempted,
        )

    def _names(self, count: int) -> list[int]:
        self.num_tokens += count
        return list(range(self.num_tokens - count, self.num_tokens))

    def _block_tokens(self, tokens: list[int], i: int) -> tuple[int, ...]:
        return tuple(tokens[i * self.block_size : (i + 1) * self.block_size])

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability
