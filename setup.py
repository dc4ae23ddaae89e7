"""Builds the native libraries, on PyTorch's stable ABI: they load into any PyTorch from 2.11 on."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, include_paths

TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CPU_SOURCES = [
    "csrc/ops/schema.cpp",
    "csrc/ops/cpu_ops.cpp",
    "csrc/cpu/store.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/dequantize.cpp",
    "csrc/cpu/recent.cpp",
]
#: A library per instruction set, named as PyTorch names CPU capabilities; ops.py loads one of them.
CPU_VARIANTS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_VARIANTS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
            *("-mfma", "-mf16c"),
        ],
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


CUDA_OPERATORS = "csrc/ops/cuda_ops.cpp"
CUDA_KERNELS = [
    "csrc/cuda/store.cu",
    "csrc/cuda/decode_d64.cu",
    "csrc/cuda/decode_d128.cu",
    "csrc/cuda/decode_d256.cu",
    "csrc/cuda/decode.cu",
    "csrc/cuda/dequantize.cu",
    "csrc/cuda/recent.cu",
]
#: Compute capabilities to compile for; TORCH_CUDA_ARCH_LIST replaces them, as it does for PyTorch.
CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME; without that, the one on PATH, or of the toolkit that PyTorch finds."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or (CUDA_HOME and shutil.which(f"{CUDA_HOME}/bin/nvcc"))


def wants_cuda() -> bool:
    """Whether PyTorch and vLLM are builds for GPUs, or architectures are asked for by name.

    vLLM's build for CPUs also runs on a PyTorch for CUDA, the only one that the usual index has.
    """
    if os.environ.get("VLLM_TURBOQUANT_CPU_ONLY", "0") not in ("", "0"):
        return False
    vllm = importlib.metadata.distributions(name="vllm")
    for_gpus = torch.version.cuda and not any(d.version.endswith("cpu") for d in vllm)
    return bool(for_gpus) or "TORCH_CUDA_ARCH_LIST" in os.environ


def cuda_arch_flags() -> list[str]:
    """Flags of nvcc for the wanted compute capabilities."""
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS).replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildNative(BuildExtension):
    """Builds the CUDA library with nvcc alone, so that a PyTorch without CUDA will do."""

    def run(self) -> None:
        """Build all libraries; refuse to leave out the CUDA library without a word."""
        if wants_cuda() and not find_nvcc():
            sys.exit(
                "nvcc was not found: install the CUDA toolkit and name its folder in CUDA_HOME, "
                "or build for CPUs alone with VLLM_TURBOQUANT_CPU_ONLY=1"
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build the CUDA library; leave the others to PyTorch."""
        if ext.name != "vllm_turboquant._cuda":
            super().build_extension(ext)
            return
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder = Path(self.build_temp).absolute() / "cuda"
        for path in (output.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            sources = [*CUDA_KERNELS, *ext.sources]
            objects = list(pool.map(lambda source: self._compile(source, folder), sources))
        # NOTE: PyTorch's CUDA library must be a dependency by name, also where it cannot be linked:
        # a library of this soname without symbols stands in for it.
        stub = folder / "libtorch_cuda.so"
        linker = ["g++", "-shared", "-fPIC", "-Wl,--no-as-needed"]
        empty = ["-x", "c", os.devnull]
        self._run([*linker, "-Wl,-soname,libtorch_cuda.so", "-o", stub, *empty])
        cudart = ["-cudart=static", "-shared", "-Xlinker=--exclude-libs=ALL"]
        libraries = ["-Xlinker=--no-as-needed", f"-L{folder}", "-ltorch_cuda"]
        self._run([find_nvcc(), *cudart, "-o", output, *objects, *libraries])

    def _compile(self, source: str, folder: Path) -> Path:
        target = folder / (Path(source).name + ".o")
        host = "-fPIC,-Wall,-Wextra,-fvisibility=hidden"
        flags = ["-std=c++17", "-O3", "-lineinfo", f"-Xcompiler={host}", TORCH_2_11, "-DUSE_CUDA"]
        warnings = "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage"
        includes = ["-Icsrc", *(f"-isystem={path}" for path in include_paths())]
        self._run(
            [
                find_nvcc(),
                *flags,
                warnings,
                *cuda_arch_flags(),
                *includes,
                "-c",
                source,
                "-o",
                target,
            ]
        )
        return target

    def _run(self, command: list[str | Path | None]) -> None:
        subprocess.run([str(part) for part in command], check=True, cwd=Path(__file__).parent)


extensions: list[Extension] = [
    cpu_extension(variant, flags) for variant, flags in CPU_VARIANTS.items()
]
if wants_cuda():
    # PyTorch refuses to build an extension that names .cu files where it has no CUDA itself.
    cuda = Extension("vllm_turboquant._cuda", [CUDA_OPERATORS], depends=CUDA_KERNELS)
    cuda.py_limited_api = True
    extensions.append(cuda)

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
