"""Builds the CUDA kernels for the CPU: a library with the operators ``turboquant_emulated``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SOURCES = [HERE / "emulator.cpp", HERE / "ops.cpp"]


def find_nvcc() -> str | None:
    """nvcc, which says where CUDA's headers are; nothing is compiled with it."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("nvcc", path=f"{os.environ['PATH']}{os.pathsep}{folder}")


def cuda_headers(nvcc: str) -> Path:
    """Folder of ``cuda_fp16.h``."""
    command = [nvcc, "-M", "-x", "cu", "-include", "cuda_fp16.h", os.devnull]
    rule = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\S+)/cuda_fp16\.h", rule)
    assert match, rule
    return Path(match[1])


def build_library(folder: Path, nvcc: str) -> Path:
    """Compile all files of csrc/cuda with the emulator's headers in front of their own.

    Args:
        folder: Where objects and the library go.
        nvcc: See ``find_nvcc``.
    """
    # NOTE: -w, because of CUDA's attributes; nvcc and the host compiler warn in setup.py.
    flags = ["-std=c++17", "-O2", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-ffp-contract=off", f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-include", "emulator.h"]
    flags += [f"-isystem{path}" for path in (cuda_headers(nvcc), *include_paths())]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*KERNELS, *SOURCES]))
    library = folder / "emulated.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", "-o", str(library), *map(str, objects)]
    link += [f"-L{torch_libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(link, check=True)
    return library
