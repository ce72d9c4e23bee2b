"""Our names in other people's formats. The only place in the project where a column is called something else.

Each mapping reads ours -> theirs. Sources: the released instruct-pix2pix code for ``ORIGINAL_*`` and the columns of
``timbrooks/instructpix2pix-clip-filtered`` for ``HUGGINGFACE_*``. This file translates names, never values.
"""

from __future__ import annotations

# The original's writer calls the input caption ``caption``; its published data and its evaluation call it ``input``.
# Exports carry both, imports take the first that is there.
ORIGINAL_TEXTS: dict[str, tuple[str, ...]] = {
    "caption": ("caption", "input"),
    "instruction": ("edit",),
    "edited_caption": ("output",),
    "url": ("url",),
}
ORIGINAL_IMAGES = {"original_image": "0", "edited_image": "1"}
ORIGINAL_NUMBERS = {
    "p2p_threshold": "p2p_threshold",
    "guidance_scale": "cfg_scale",
    "sim_original": "clip_sim_0",
    "sim_edited": "clip_sim_1",
    "sim_direction": "clip_sim_dir",
    "sim_image": "clip_sim_image",
}
HUGGINGFACE_COLUMNS = {
    "caption": "original_prompt",
    "original_image": "original_image",
    "instruction": "edit_prompt",
    "edited_caption": "edited_prompt",
    "edited_image": "edited_image",
}
HUGGINGFACE_SPLITS = {"train": "train", "val": "validation", "test": "test"}
