"""What the turboquant3 attention backend can do, how it packs pages, and why it refuses a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_turboquant import CACHE_DTYPE, ops
from vllm_turboquant.errors import UnsupportedError
from vllm_turboquant.layout import BLOCK_SIZE_MULTIPLE, SUPPORTED_HEAD_DIMS, SlotLayout
from vllm_turboquant.options import read_options

NAME = "TURBOQUANT3"
WORKER = "vllm_turboquant.worker.MeasuringWorker"
MAX_CUDA_HEAD_DIM = 256

#: Kinds of models, as vLLM names them, whose attention is not that of a decoder.
ENGINE_ATTN_TYPES = {
    "encoder_only": AttentionType.ENCODER_ONLY,
    "encoder_decoder": AttentionType.ENCODER_DECODER,
}


class TurboQuant3Backend(AttentionBackend):
    """Attention over slots of ``layout.SlotLayout``."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type:
        from vllm_turboquant.attention import TurboQuant3Impl

        return TurboQuant3Impl

    @staticmethod
    def get_builder_cls() -> type:
        from vllm_turboquant.metadata import TurboQuant3MetadataBuilder

        return TurboQuant3MetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return SlotLayout.supports(head_size)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # One (block, head) must be contiguous, because it is a structure of arrays.
        return (
            KVCacheLayout.LBHNC,
            KVCacheLayout.BLHNC,
            KVCacheLayout.LHBNC,
            KVCacheLayout.BHLNC,
        )

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # prefill is planned on the host

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        # vLLM also asks with the model's dtype, to size layers that are not ours.
        if spec.dtype != torch.uint8 or spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise UnsupportedError(
                f"values of another head size than keys ({spec.head_size_v} and {spec.head_size}) "
                "are not supported"
            )
        if getattr(spec, "non_causal", False):
            raise UnsupportedError("attention that is not causal is not supported")
        return replace(spec, state_content_bytes=SlotLayout(spec.head_size).slot_bytes)

    @classmethod
    def validate_configuration(cls, **config: Any) -> list[str]:
        """List why a layer cannot be served, each reason a phrase that says what is supported."""
        attn_type = config["attn_type"]
        head_size, block_size = config["head_size"], config["block_size"]
        checks = (
            (
                attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY),
                "encoder-only attention has no KV cache to compress",
            ),
            (
                attn_type == AttentionType.ENCODER_DECODER,
                "cross attention is not supported, only decoder self-attention is",
            ),
            (
                config["use_mla"],
                "MLA (multi-head latent attention) is not supported, only attention with separate "
                "keys and values is",
            ),
            (config["use_sparse"], "sparse attention is not supported, only dense attention is"),
            (
                not cls.supports_head_size(head_size),
                f"head size {head_size} is not supported, only {SUPPORTED_HEAD_DIMS} are",
            ),
            (
                not cls.supports_block_size(block_size),
                f"--block-size {block_size} is not supported, only multiples of "
                f"{BLOCK_SIZE_MULTIPLE} are",
            ),
            (
                config["use_per_head_quant_scales"],
                "float8 attention (a checkpoint with per-head float8 scales) is not supported, "
                "only float16, bfloat16 and float32 attention is",
            ),
            (config["has_sink"], "attention sinks are not supported yet"),
            (config.get("use_kv_connector"), "KV connectors are not supported yet"),
            *_device_checks(config["dtype"], head_size),
        )
        # vLLM's own checks follow for what no sentence above covers.
        return [reason for failed, reason in checks if failed] or super().validate_configuration(
            **config
        )


def _device_checks(dtype: torch.dtype, head_size: int) -> list[tuple[bool, str]]:
    """What the platform cannot do, as for ``validate_configuration``."""
    if current_platform.is_cpu():
        return []
    if not current_platform.is_cuda():
        name = current_platform.device_name or "unknown"
        return [(True, f"the device {name} is not supported, only CPUs and NVIDIA GPUs are")]
    capability = current_platform.get_device_capability()
    version = capability.as_version_str() if capability else "unknown"
    return [
        (
            capability is None or capability < (8, 0),
            f"a GPU of compute capability {version} is not supported, only 8.0 and newer are",
        ),
        (
            not ops.HAS_CUDA,
            "the CUDA operators were not built; with nvcc on PATH, build them with: "
            "pip install --no-build-isolation --no-deps -e .",
        ),
        (
            dtype == torch.float32,
            "float32 models are not supported on GPUs, only float16 and bfloat16 ones are",
        ),
        (
            head_size > MAX_CUDA_HEAD_DIM,
            f"head size {head_size} is not supported on GPUs, only those up to "
            f"{MAX_CUDA_HEAD_DIM} are",
        ),
    ]


def select_backend(selected: AttentionBackendEnum | None, config: AttentionSelectorConfig) -> str:
    """Choose the backend of one attention layer whose cache dtype is turboquant3.

    Args:
        selected: What ``--attention-backend`` names, if anything.
        config: The layer's needs.

    Returns:
        Qualified name of the backend class.

    Raises:
        UnsupportedError: One line with everything that cannot be served.
    """
    _refuse_unsupported(selected, config)
    path = f"{TurboQuant3Backend.__module__}.{TurboQuant3Backend.__qualname__}"
    # NOTE: registered by the process that builds the model and not at plugin load. Enum members
    # travel between processes by value: one that the parent knows and its children do not cannot be
    # unpickled.
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, path)
    return path


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse an engine configuration before any process or model is started, or choose its worker.

    Raises:
        UnsupportedError: One line with everything that cannot be served.
        OptionsError: The options are not valid; one line names what is accepted.
    """
    read_options(vllm_config)
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in ("auto", WORKER):  # ours, where a configuration is derived
        raise UnsupportedError(
            f"--worker-cls {parallel.worker_cls} takes the place of the worker that measures keys; "
            "leave the option out"
        )
    parallel.worker_cls = WORKER
    if parallel.enable_elastic_ep:
        raise UnsupportedError("--enable-elastic-ep is not supported")
    _refuse_speculation(vllm_config)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if model is None:
        return
    if model.is_hybrid:
        raise UnsupportedError(
            "models with Mamba or linear attention layers are not supported, only attention is"
        )
    needs = AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        use_mla=model.use_mla,
        attn_type=ENGINE_ATTN_TYPES.get(model.attn_type, AttentionType.DECODER),
        use_kv_connector=vllm_config.kv_transfer_config is not None,
    )
    _refuse_unsupported(vllm_config.attention_config.backend, needs)


def _refuse_speculation(vllm_config: VllmConfig) -> None:
    """Refuse drafts of which the host does not know how many were accepted: it plans attention.

    Raises:
        UnsupportedError: One line with the option that lets it know.
    """
    asynchronous = vllm_config.scheduler_config.async_scheduling
    if vllm_config.speculative_config and asynchronous and not current_platform.is_cpu():
        raise UnsupportedError(
            "speculative decoding with asynchronous scheduling is not supported yet; "
            "--no-async-scheduling turns that off"
        )


def _refuse_unsupported(
    selected: AttentionBackendEnum | None, needs: AttentionSelectorConfig
) -> None:
    reasons = TurboQuant3Backend.validate_configuration(
        **needs._asdict(), device_capability=current_platform.get_device_capability()
    )
    if selected is not None and selected.name != NAME:
        reasons.append(
            f"--attention-backend {selected.name} names another backend; leave the option out"
        )
    if reasons:
        raise UnsupportedError("; ".join(reasons))
