"""The quick part of the doctor, for the start of a job or a replica: tenths of a second, and torch is not imported."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from ip2p.doctor.accelerator import TIMEOUT_S, read_driver, version_number
from ip2p.doctor.finding import ERROR, FINE, Finding, error, fine, warning
from ip2p.doctor.machine import check_disk

LEAST_DISK = 100 * 2**20  # bytes; below what the doctor asks for there is a warning only
LEAST_GPU_GIB = 1.0  # a GPU with less holds no model besides what fills it


def start_findings(output: str = "", gpu: bool = True, gpu_gib: float = 0.0) -> Iterator[Finding]:
    """The disk of a local ``output``; where ``gpu``, torch's build, the driver, and memory against ``gpu_gib``."""
    if output and "://" not in output:
        yield check_output(Path(output))
    if gpu:
        driver = check_build()
        yield driver
        if driver.level == FINE:
            yield check_free_memory(gpu_gib)


def check_output(folder: Path) -> Finding:
    """An error only where nothing can be written: how much a run will write, nobody knows before."""
    found = check_disk(folder)
    if found.level == ERROR and check_disk(folder, LEAST_DISK).level == FINE:
        return warning(found.name, found.found, found.remedy)
    return found


def check_build(command: str = "nvidia-smi") -> Finding:
    """Whether the driver, where there is one, is new enough for the CUDA that torch was built for."""
    answer = read_driver(command)
    if answer is None:
        return fine("gpu", "no NVIDIA driver here")
    driver, newest = answer
    built = torch_cuda()
    if built is None:
        remedy = "install the CUDA build that is pinned (make env), or ask for 0 GPUs"
        return error("gpu", f"driver {driver} is there, torch was built for the CPU only", remedy)
    # A driver runs later minor versions than its own, not a later major one.
    if newest and version_number(newest)[0] < version_number(built)[0]:
        remedy = f"install a driver for CUDA {built}, or a torch that was built for CUDA {newest}"
        return error("gpu", f"driver {driver} knows CUDA up to {newest}, torch was built for {built}", remedy)
    return fine("gpu", f"driver {driver}")


def check_free_memory(gpu_gib: float, command: str = "nvidia-smi") -> Finding:
    """Of the GPU that has the most free; ``gpu_gib`` is about what the work takes."""
    free = _free_gib(command)
    if not free:
        return fine("gpu memory", "no GPU to look at")
    found = f"{max(free):.1f} GiB free on the emptiest of {len(free)} GPUs"
    remedy = "end who holds it (nvidia-smi), or ask for less: smaller micro_batch, --gradient-checkpointing, lora_rank"
    if max(free) < LEAST_GPU_GIB:
        return error("gpu memory", found, remedy)
    if max(free) < gpu_gib:
        return warning("gpu memory", f"{found}, about {gpu_gib:g} are needed", remedy)
    return fine("gpu memory", found)


def check_served(models: Iterable[str]) -> Finding:
    """Whether every model of a server is an edit model with whole files; its sums are compared when it is loaded."""
    from ip2p.doctor.weights import refused
    from ip2p.errors import Ip2pError
    from ip2p.models.preflight import check_edit_files

    names = list(models)
    for name in names:
        try:
            check_edit_files(name)
        except Ip2pError as problem:
            return refused("edit model", problem)
    return fine("edit model", f"{', '.join(names)}: whole")


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, None for a CPU build, by its own file."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).with_name("version.py").read_text()
    built = re.search(r"^cuda\b[^=]*= '([0-9.]+)'", text, re.MULTILINE)
    return built[1] if built else None


def told(one: Finding) -> str:
    """In one line, with the remedy."""
    return f"{one.name}: {one.found}; {one.remedy}" if one.remedy else f"{one.name}: {one.found}"


def _free_gib(command: str) -> list[float]:
    if shutil.which(command) is None:
        return []
    asked = [command, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # Slices of a GPU (MIG) are not told here.
    return [int(line) / 1024 for line in done.stdout.split() if line.isdigit()] if done.returncode == 0 else []
