"""What `tnl doctor` says of a machine: its GPUs, driver, versions and folders, found without any other program but
nvidia-smi.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tnl.tools.doctor_checks import message_of

PACKAGES = ("torch", "triton", "transformers", "deepspeed")
# Variables that change what runs, and where.
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF")
UNKNOWN = "unknown"
KIB, GIB = 2**10, 2**30


def nvidia_smi() -> list[tuple[str, str]]:
    """(name, driver version) of the GPUs that the driver lists; empty when nvidia-smi is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return [(name.strip(), version.strip()) for name, _, version in lines] if done.returncode == 0 else []


def driver_version(smi: list[tuple[str, str]]) -> str:
    """From nvidia-smi, or from the kernel module; with the CUDA version that it takes, where torch can tell."""
    version = smi[0][1] if smi else UNKNOWN
    module = Path("/proc/driver/nvidia/version")
    if not smi and module.is_file():
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", module.read_text(errors="replace"))
        version = found[0] if found else UNKNOWN
    if torch.cuda.is_available() and hasattr(torch._C, "_cuda_getDriverVersion"):
        number = torch._C._cuda_getDriverVersion()  # 12080 is 12.8
        version += f", for CUDA up to {number // 1000}.{number % 1000 // 10}"
    return version


def gpus() -> list[dict]:
    """What torch knows of each GPU, sizes in bytes; ``problem`` instead for one that does not answer."""
    return [gpu_of(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def gpu_of(index: int) -> dict:
    """One row of `gpus`."""
    device = {"device": f"cuda:{index}"}
    try:
        card = torch.cuda.get_device_properties(index)
    # In use by another process alone, or fallen off the bus: torch has no type of its own for it.
    except RuntimeError as error:
        return device | {"problem": message_of(error)}
    return device | {
        "name": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "shared_memory_per_block_optin_bytes": card.shared_memory_per_block_optin,
    }


def describe_gpu(gpu: dict) -> str:
    """One line."""
    if "problem" in gpu:
        return gpu["problem"]
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_bytes'] / GIB:.1f} GiB, "
        f"{gpu['multiprocessors']} multiprocessors, {gpu['shared_memory_per_block_optin_bytes'] / KIB:g} KiB of shared "
        "memory per block (opt-in)"
    )


def no_gpu(smi: list[tuple[str, str]]) -> str:
    """Why torch sees no GPU."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"no GPU in sight, with CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
    if not smi:
        return "no GPU that torch or nvidia-smi sees"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA: install its CUDA build"
    else:
        reason = f"torch wants a driver for CUDA {torch.version.cuda}: update driver {smi[0][1]} or take an older torch"
    return f"{smi[0][0]}, which torch cannot use ({reason})"


def gpu_is_seen(smi: list[tuple[str, str]]) -> list[dict]:
    """A failed check when the driver lists a GPU that torch cannot use, though nobody hid it."""
    if torch.cuda.is_available() or not smi or "CUDA_VISIBLE_DEVICES" in os.environ:
        return []
    return [{"check": "torch uses the GPU", "ok": False, "message": no_gpu(smi)}]


def triton_cache() -> dict:
    """Triton's cache folder, and why it cannot be written (None when it can)."""
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~/"))
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(1024))
    except OSError as error:
        return {"folder": str(folder), "problem": f"{existing}: {error.strerror}"}
    return {"folder": str(folder), "problem": None}


def cache_row(cache: dict) -> dict:
    """The check of `triton_cache`: without it no kernel can be compiled."""
    problem = cache["problem"]
    message = f"{problem}; set TRITON_CACHE_DIR to a folder that is" if problem else cache["folder"]
    return {"check": "Triton cache folder is writable", "ok": problem is None, "message": message}


def package_version(name: str) -> str:
    """Version of an installed package; of triton also the one that torch asks for, if that is another."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    wanted = None
    if name == "triton":
        required = " ".join(importlib.metadata.requires("torch") or [])
        wanted = re.search(r"\btriton==([\w.]+)", required)
    return version if wanted is None or version.startswith(wanted[1]) else f"{version}, but torch asks for {wanted[1]}"


def machine(smi: list[tuple[str, str]], cache: dict) -> dict[str, str]:
    """Versions and places, without importing what is only named."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    writable = "writable" if cache["problem"] is None else f"NOT writable ({cache['problem']})"
    rows = {
        "driver": driver_version(smi),
        "CUDA of torch": torch.version.cuda or "none (a CPU build)",
        **{name: package_version(name) for name in PACKAGES},
        "Python": f"{platform.python_version()}, {sys.executable}",
        "system": platform.platform(),
        "C compiler": compiler or "none: Triton needs one on a GPU (Debian, Ubuntu: apt install gcc)",
        "Triton cache": f"{cache['folder']}, {writable}",
    }
    return rows | {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
