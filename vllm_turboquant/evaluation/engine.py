"""One vLLM engine with one KV cache, made to read every token back from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from vllm_turboquant.evaluation.plan import Plan, Text, WindowScore, hidden_path
from vllm_turboquant.evaluation.rows import REFERENCE, Row
from vllm_turboquant.options import KEY

#: Requests that run at a time where they may.
BATCH = 16
RECORDER = "vllm_turboquant.evaluation.recorder.Recorder"
#: Graphs for steps of one token a request, with the model as it is: compiling takes longer than
#: what is asked here.
GRAPHS = {"mode": CompilationMode.NONE, "cudagraph_mode": "FULL_DECODE_ONLY"}


class UnavailableError(RuntimeError):
    """The engine cannot run with this cache; one line with its reason."""


class Engine:
    """vLLM with the cache of one row.

    In lockstep every running request computes one token a step, so that attention is always that of
    decoding. Otherwise prompts are prefilled in whole chunks, by attention that reads the cache.

    Args:
        row: The cache.
        plan: What will be asked.

    Raises:
        UnavailableError: vLLM started, but not with this cache.
        Exception: Whatever vLLM raises when it does not start.
    """

    def __init__(self, row: Row, plan: Plan) -> None:
        self.row = row
        self.plan = plan
        self.in_lockstep = plan.is_in_lockstep(row)
        # A companion runs beside each batch in lockstep; see generate.
        max_num_seqs = BATCH + 1 if self.in_lockstep else BATCH
        self.llm = LLM(
            model=plan.model,
            kv_cache_dtype=row.cache_dtype,
            additional_config={KEY: dict(row.options)} if row.options else {},
            worker_extension_cls=RECORDER,
            **execution(row, plan),
            enable_prefix_caching=False,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs if self.in_lockstep else plan.step_tokens,
            long_prefill_token_threshold=1 if self.in_lockstep else 0,
            max_model_len=plan.max_model_len,
            kv_cache_memory_bytes=plan.cache_bytes,
            gpu_memory_utilization=0.01,  # only what is used: a device may have other tenants
            tensor_parallel_size=plan.tensor_parallel_size,
            trust_remote_code=plan.trust_remote_code,
            seed=0,
        )
        cache = self.call("describe_cache")
        if cache["unread"]:
            # vLLM's CPU platform hands any dtype to CPU_ATTN, which takes the bytes for bfloat16.
            raise UnavailableError(
                f"attention backend {', '.join(cache['backends'])} does not support "
                f"KV cache dtype {', '.join(cache['unread'])}"
            )
        self.batch = self._batch()
        self.backends = sorted(cache["backends"])
        self.num_layers = sum(cache["dtypes"].values())
        self.num_coded_layers = (
            self.call("fake_quantize", row.fake_quantize)
            if row.fake_quantize
            else cache["dtypes"].get(row.cache_dtype, 0)
        )
        if row.cache_dtype != REFERENCE and not self.num_coded_layers:
            raise UnavailableError(
                f"no layer of this model has a cache of dtype {row.cache_dtype}; they have "
                f"{', '.join(cache['dtypes'])}"
            )

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the recorder on all ranks; return what rank 0 does."""
        return self.llm.collective_rpc(method, args=arguments)[0]

    def generate(
        self, prompts: Sequence[list[int]], max_tokens: int
    ) -> Iterator[list[tuple[list[int], str]]]:
        """Answer prompts greedily, a batch at a time.

        Yields:
            Token ids and text of each answer of the batch.
        """
        for first in range(0, len(prompts), self.batch):
            batch = prompts[first : first + self.batch]
            greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
            requests = [(prompt, greedy) for prompt in batch]
            if self.in_lockstep:
                # NOTE: vLLM ignores long_prefill_token_threshold while a request is alone: it would
                # prefill the end of the last prompt at once. The companion outlives all others.
                lifetime = max(map(len, batch)) + max_tokens
                companion = SamplingParams(temperature=0, max_tokens=lifetime, ignore_eos=True)
                requests.append((batch[0][:1], companion))
            outputs = self._run(requests)[: len(batch)]
            yield [(list(out.outputs[0].token_ids), out.outputs[0].text) for out in outputs]

    def record(self, text: Text) -> Iterator[list[int]]:
        """Compute all windows of a text, some at a time.

        Yields:
            Indices of the windows whose hidden states the recorder now has.
        """
        batch = self.batch if self.in_lockstep else 1
        last_token_only = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        for first in range(0, len(text.windows), batch):
            windows = text.windows[first : first + batch]
            indices = list(range(first, first + len(windows)))
            if self.in_lockstep and len(windows) == 1:
                windows = windows * 2  # a request that is alone is not held to one token a step
            self.call("record", windows, self.in_lockstep)
            self._run([(window, last_token_only) for window in windows])
            yield indices

    def save_reference(self, text: Text, folder: Path) -> Iterator[int]:
        """Write the hidden states of all windows; yield the number of windows after each batch."""
        for indices in self.record(text):
            self.call("save_reference", [str(hidden_path(folder, text.name, i)) for i in indices])
            yield len(indices)

    def score(self, text: Text, folder: Path) -> Iterator[list[WindowScore]]:
        """Score all windows against the reference's hidden states, a batch at a time."""
        for indices in self.record(text):
            paths = [str(hidden_path(folder, text.name, i)) for i in indices]
            yield [WindowScore(**fields) for fields in self.call("score", paths)]

    def _batch(self) -> int:
        """How many requests run at a time.

        In lockstep they all have to fit, the companion among them: a request that is preempted may
        later be alone and prefill at once.
        """
        if not self.in_lockstep:
            return BATCH
        capacity = self.call("capacity_tokens", BATCH + 1)
        fitting = capacity // self.plan.max_model_len - 1
        if fitting < 1:
            raise UnavailableError(
                f"{capacity} tokens fit, and two requests of {self.plan.max_model_len} "
                "have to, for one token a step; raise --cache-gib or lower --needle-lengths"
            )
        return min(fitting, BATCH)

    def _run(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Any]:
        prompts, parameters = zip(*requests, strict=True)
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], list(parameters), use_tqdm=False
        )


def execution(row: Row, plan: Plan) -> dict[str, Any]:
    """Arguments of ``LLM``: CUDA graphs where nothing hooks into the model's forward pass.

    Hooks record the hidden states of texts, and put simulated codes in the place of keys.
    """
    hooks = bool(plan.texts) or row.fake_quantize is not None
    if hooks or not current_platform.is_cuda():
        return {"enforce_eager": True}
    return {"compilation_config": GRAPHS}
