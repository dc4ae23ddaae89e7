"""Builds the native libraries, on PyTorch's stable ABI: they load into any PyTorch from 2.11 on."""

import platform
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CPU_SOURCES = [
    "csrc/ops/schema.cpp",
    "csrc/ops/cpu_ops.cpp",
    "csrc/cpu/store.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/dequantize.cpp",
]
#: A library per instruction set, named as PyTorch names CPU capabilities; ops.py loads one of them.
CPU_VARIANTS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_VARIANTS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    }


def cpu_extension(variant: str, flags: list[str]) -> CppExtension:
    """The CPU operators for one instruction set."""
    return CppExtension(
        f"vllm_turboquant._cpu_{variant}",
        CPU_SOURCES,
        include_dirs=[str(Path(__file__).parent.resolve() / "csrc")],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",  # vectors are never passed between libraries
            "-Wno-uninitialized",  # GCC 12 warns of its own AVX-512 header
            "-Wno-maybe-uninitialized",
            # NOTE: contraction would change the bytes that store writes; fma() is explicit.
            "-ffp-contract=off",
            "-fno-math-errno",
            "-fvisibility=hidden",
            TORCH_2_11,
            *(f"-isystem{path}" for path in include_paths()),  # no warnings from PyTorch's headers
            *flags,
        ],
        py_limited_api=True,
    )


setup(
    ext_modules=[cpu_extension(variant, flags) for variant, flags in CPU_VARIANTS.items()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
