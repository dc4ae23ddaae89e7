"""Which libraries a build makes, and what it says where it cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, run without building, where architectures are asked for by name."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("VLLM_TURBOQUANT_CPU_ONLY", raising=False)
    spec = importlib.util.spec_from_file_location("turboquant_setup", SETUP)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_build_for_gpus_without_nvcc_says_so(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.wants_cuda()
    assert build.extensions[-1].name == "vllm_turboquant._cuda"
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match=r"nvcc was not found: .* VLLM_TURBOQUANT_CPU_ONLY=1"):
        build.BuildNative.run(build.BuildNative.__new__(build.BuildNative))


@pytest.mark.parametrize(("value", "wants"), [("1", False), ("0", True), ("", True)])
def test_a_build_for_cpus_alone(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, wants: bool
) -> None:
    monkeypatch.setenv("VLLM_TURBOQUANT_CPU_ONLY", value)
    assert build.wants_cuda() is wants
