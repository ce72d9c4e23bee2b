"""Every edit asked a second time, of a picture that shows it already: the right answer is the same picture.

Each pair of a run gives one more at no painting, and one without fault: an editor learns from them to leave alone what
it was not asked to change. The paper has no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ip2p.dataset.imported import ImportedPair, ImportedPrompt, ImportReport, write_imported_run
from ip2p.dataset.run_folder import Record, by_prompt, iterate_pair_shards
from ip2p.schema import Triplet
from ip2p.storage import Folder


def repeat_run(run: Folder, output: Folder, progress: Callable[[int], object] = lambda prompts: None) -> ImportReport:
    """Write the edited image of each pair of the finished ``run``, as its own edit, as a run to ``output``.

    Pairs keep their split. Raises DatasetError for a run without pairs, InputError where ``output`` holds something
    else.
    """
    return write_imported_run(_repeated(run), output, {"format": "repetition", "source": run.uri}, progress)


def _repeated(run: Folder) -> Iterator[ImportedPrompt]:
    for shard in iterate_pair_shards(run):
        for prompt_id, pairs in by_prompt(shard).items():
            first = pairs[0]
            triplet = Triplet(first["edited_caption"], first["instruction"], first["edited_caption"])
            yield ImportedPrompt(prompt_id, triplet, tuple(_again(pair) for pair in pairs), split=first["split"])


def _again(pair: Record) -> ImportedPair:
    """Both pictures are the edited one; CLIP would see the same picture twice, and no direction."""
    picture, similarity = pair["edited_image"]["bytes"], pair["sim_edited"]
    numbers = {
        "p2p_threshold": pair["p2p_threshold"], "guidance_scale": pair["guidance_scale"], "sim_original": similarity,
        "sim_edited": similarity, "sim_image": 1.0, "sim_direction": 0.0,
    }  # fmt: skip
    return ImportedPair(pair["seed"], picture, picture, (pair["width"], pair["height"]), numbers)
