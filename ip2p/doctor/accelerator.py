"""Does torch's build fit the driver, and has the GPU room for what is asked of it?"""

from __future__ import annotations

import re
import shutil
import subprocess

from ip2p.doctor.finding import Finding, error, fine, warning

GIB = 2**30
NEEDED_GIB = {"postcard": 1.0, "sd15": 20.0}
"""Of a recipe's training: measured for sd15 with bench/sd15_training.py, batch of one."""
TIMEOUT_S = 20


def check_torch() -> Finding:
    """torch's own word for its build; whether the other libraries load with it."""
    try:
        import torch
        import torchvision
    except Exception as broken:  # an import can fail in any way where two builds do not fit each other
        found = f"torch or torchvision cannot be loaded: {' '.join(str(broken).split())[:200]}"
        return error("torch", found, "two builds do not fit each other; make env installs the pinned ones")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return fine("torch", f"torch {torch.__version__} ({build}), torchvision {torchvision.__version__}")


def check_driver(command: str = "nvidia-smi") -> Finding:
    """The GPUs that the driver sees, against those that torch can use."""
    import torch

    answer = read_driver(command)
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if answer is None:
        if usable:
            return fine("gpu", f"{usable} GPUs, {torch.cuda.get_device_name(0)}")
        return warning("gpu", "no NVIDIA driver here: everything runs on the CPU", "fine for postcards, not for SD 1.5")
    driver, newest = answer
    if torch.version.cuda is None:
        remedy = "install the CUDA build that is pinned: make env"
        return error("gpu", f"driver {driver} is there, torch was built for the CPU only", remedy)
    if usable:
        return fine("gpu", f"{usable} GPUs, {torch.cuda.get_device_name(0)}, driver {driver} (up to CUDA {newest})")
    if newest and version_number(newest) < version_number(torch.version.cuda):
        remedy = f"install a driver for CUDA {torch.version.cuda} or newer, or a torch that was built for CUDA {newest}"
        return error(
            "gpu", f"driver {driver} knows CUDA up to {newest}, torch was built for {torch.version.cuda}", remedy
        )
    remedy = "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; in a container start it with --gpus all"
    return error("gpu", f"driver {driver} is there, but torch can use no GPU", remedy)


def check_gpu_memory(recipe: str) -> Finding:
    """Whether the first GPU has free what ``recipe`` needs."""
    import torch

    if not torch.cuda.is_available():
        return fine("gpu memory", "no GPU to look at")
    free, total = torch.cuda.mem_get_info(0)
    found, needed = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", NEEDED_GIB.get(recipe, 0.0)
    if free < needed * GIB:
        remedy = (
            "smaller micro_batch, --gradient-checkpointing, lora_rank, --shard over several GPUs, or end who holds it"
        )
        return error("gpu memory", f"{found}, {recipe} needs about {needed:g}", remedy)
    return fine("gpu memory", found)


def read_driver(command: str) -> tuple[str, str] | None:
    """The driver's version and the newest CUDA it knows; None where there is no working driver."""
    if shutil.which(command) is None:
        return None
    try:
        done = subprocess.run([command], capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    driver = re.search(r"Driver Version:\s*([0-9.]+)", done.stdout)
    newest = re.search(r"CUDA Version:\s*([0-9.]+)", done.stdout)
    return (driver[1], newest[1] if newest else "") if done.returncode == 0 and driver else None


def version_number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]+", version)[:2])
