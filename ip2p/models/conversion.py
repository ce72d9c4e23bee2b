"""An original ``.ckpt`` to a diffusers folder, and a folder back to one file in the original's layout.

A ``.ckpt`` is a pickle. It is read by torch's ``weights_only`` loader, which runs no code, and that in a process of its
own, without network and without the keys that lie in the environment: two doors where one might have a flaw.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ip2p.errors import CheckpointError, InputError
from ip2p.models.checkpoint import PICKLED
from ip2p.models.components import load_base
from ip2p.models.export import save_edit_model
from ip2p.models.original_layout import load_original, read_original, save_original

SECRETS = ("AWS_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH", "IP2P_API_KEY", "WANDB_", "OPENAI_")
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # of Linux' unshare(2)
REFUSED = 3


def convert(source: Path, target: Path, base: str = "") -> None:
    """``source`` (.ckpt or .safetensors in the original's layout) to the folder ``target``, or a folder to a file.

    ``base`` is the diffusers folder that says what an original file does not: architecture, tokenizer, noise schedule.
    Raises InputError for names that do not fit, CheckpointError where the file cannot be used.
    """
    if source.is_dir():
        if target.suffix != ".safetensors":
            raise InputError(f"{target}: expected a name that ends in .safetensors, for the original's layout")
        save_original(load_base(source, "cpu"), target)
        return
    if not source.is_file():
        raise InputError(f"{source}: no such file or folder")
    if not base:
        raise InputError("--base is missing: the diffusers folder of the model that this file was trained from")
    with tempfile.TemporaryDirectory(prefix="ip2p-convert-") as place:
        tensors = _unpickled(source, Path(place)) if source.suffix in PICKLED else source
        model = load_original(tensors, load_base(base, "cpu"))
    save_edit_model(model, target, {"converted_from": source.name})


def _unpickled(source: Path, place: Path) -> Path:
    """The tensors of a pickle as safetensors, read where nothing can be reached. Raises CheckpointError."""
    made = place / "tensors.safetensors"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
    command = [sys.executable, "-m", "ip2p.models.conversion", str(source.absolute()), str(made)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode == REFUSED:
        raise CheckpointError(done.stderr.strip())
    if done.returncode != 0:
        raise CheckpointError(f"{source}: reading it ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return made


def _without_network() -> None:
    """Leave the network behind, where the kernel lets us: root, or a user who may have namespaces."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NETWORK) != 0 and libc.unshare(NEW_USER | NEW_NETWORK) != 0:
        print("warning: the kernel keeps no network from this process", file=sys.stderr)


def _main(source: str, made: str) -> int:
    from safetensors.torch import save_file

    _without_network()
    try:
        tensors = read_original(Path(source))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return REFUSED
    # Tensors of a pickle may share memory, which safetensors refuses to write twice.
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, made, {"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2]))
