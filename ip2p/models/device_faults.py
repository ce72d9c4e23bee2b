"""What an exception from torch says of the device: too little memory for this call, or no use for any later one."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller call may do: the allocator of any device, or the CPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def is_device_fault(error: BaseException) -> bool:
    """Whether the accelerator is lost to this process: every later call fails too."""
    fault = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    is_fault = (fault is not None and isinstance(error, fault)) or "CUDA error" in str(error)
    return is_fault and not is_out_of_memory(error)
