"""The stage of written triplets with scripted writers, its files, and how a run is brought together."""

import dataclasses
import json
import tracemalloc

import pytest

from ip2p.config import load_recipe
from ip2p.errors import InputError, RecipeError, WriterError
from ip2p.storage import open_folder
from ip2p.triplets import written
from ip2p.triplets.budget import OverBudget
from ip2p.triplets.captions import CaptionRow
from ip2p.triplets.format import split_prompt
from ip2p.triplets.judge import Judge
from ip2p.triplets.near_duplicates import MinHashDuplicates
from ip2p.triplets.shares import within_shares
from ip2p.triplets.writing import WriteRequests, Writing, WritingRun, check_writing, moderation_of


def run_of(*settings, **writing) -> WritingRun:
    return WritingRun(load_recipe("postcard", settings), Writing(**{"types": "none", "near_duplicate": 0.0, **writing}))


def rows_of(*captions) -> list[CaptionRow]:
    return [CaptionRow(i, f"{i:016x}", i + 1, caption, f"http://x/{i}") for i, caption in enumerate(captions)]


class Scripted:
    """Answers by a function of caption, asked type, copy and try; ``asked`` is what was asked, in order."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def complete(self, prompts, identities):
        self.asked += [
            (*split_prompt(p), copy, attempt) for p, (_, copy, attempt) in zip(prompts, identities, strict=True)
        ]
        return [self.answer(*asked) for asked in self.asked[-len(prompts) :]]


def with_moon(caption, task, copy, attempt):
    return f"add moon {copy}\n%%\n{caption} with a moon {copy}"


def stage_of(run, answer, **parts) -> WriteRequests:
    return WriteRequests(run, Scripted(answer), None, **parts)


def test_each_caption_gets_as_many_triplets_as_were_asked_for():
    rows = stage_of(run_of(per_caption=3), with_moon)(rows_of("a cat", "a dog"))
    assert [(row["caption"], row["copy"], row["instruction"]) for row in rows] == [
        (caption, copy, f"add moon {copy}") for caption in ("a cat", "a dog") for copy in range(3)
    ]
    assert {(row["status"], row["reason"], row["tries"]) for row in rows} == {("accepted", "ok", 1)}
    assert rows[3]["url"] == "http://x/1"


def test_what_is_refused_is_asked_again_and_every_refusal_counted():
    answers = ["", "no format", "x\n%%\na cat", "make it night\n%%\na cat at night"]
    stage = stage_of(run_of("triplets.tries=4"), lambda caption, task, copy, attempt: answers[attempt])
    (row,) = stage(rows_of("a cat"))
    assert (row["status"], row["tries"], row["edited_caption"]) == ("accepted", 4, "a cat at night")
    assert json.loads(row["refusals"]) == {"empty": 1, "unchanged": 1, "unparseable": 1}


def test_after_the_last_try_the_reason_is_the_last_refusals():
    (row,) = stage_of(run_of("triplets.tries=2"), lambda *_: "nonsense")(rows_of("a cat"))
    assert (row["status"], row["reason"], row["tries"], row["instruction"]) == ("refused", "unparseable", 2, "")


def test_a_bad_or_flagged_caption_is_never_asked():
    run = run_of(moderation="tests.unit.triplets.test_writing:flags_guns")
    stage = stage_of(run, with_moon)
    rows = stage(rows_of("\u200b", "a gun", "a cat"))
    assert [row["reason"] for row in rows] == ["bad_caption", "flagged", "ok"]
    assert [asked[0] for asked in stage.writer.asked] == ["a cat"]


def test_a_flagged_completion_is_refused():
    run = run_of("triplets.tries=2", moderation="tests.unit.triplets.test_writing:flags_guns")
    (row,) = stage_of(run, lambda c, t, k, n: f"add it\n%%\n{c} with {['a gun', 'a rose'][n]}")(rows_of("a cat"))
    assert (row["status"], json.loads(row["refusals"])) == ("accepted", {"flagged": 1})


def flags_guns(texts):
    return any("gun" in text for text in texts)


def test_copies_of_one_caption_never_share_an_instruction():
    answers = {0: "make it night", 1: "Make it night!", 2: "make it red"}
    stage = stage_of(
        run_of(per_caption=2),
        lambda caption, task, copy, attempt: f"{answers[attempt + copy]}\n%%\n{caption} {answers[attempt + copy]}",
    )
    rows = stage(rows_of("a cat"))
    assert [row["instruction"] for row in rows] == ["make it night", "make it red"]
    assert [json.loads(row["refusals"]) for row in rows] == [{}, {"near_duplicate": 1}]


def test_asked_types_come_in_their_shares_and_go_into_the_prompts():
    stage = stage_of(run_of("triplets.tries=1", types="open", shares="add=3,style=1"), with_moon)
    stage(rows_of(*(f"a cat {n}" for n in range(20))))
    tasks = [task for _, task, _, _ in stage.writer.asked]
    assert (tasks.count("add"), tasks.count("style")) == (15, 5)


def test_a_writer_that_knows_no_types_is_not_asked_for_any():
    class Plain(Scripted):
        manner = type("Manner", (), {"tasks": False})

    writer = Plain(with_moon)
    WriteRequests(run_of(types="open", shares="even"), writer, None)(rows_of("a cat"))
    assert {task for _, task, _, _ in writer.asked} == {""}


def test_an_edit_of_another_type_is_refused():
    run = run_of("triplets.tries=1", types="open", shares="action=1")
    (row,) = stage_of(run, lambda *_: "add a red balloon\n%%\na dog on a bench with a red balloon")(
        rows_of("a dog on a bench")
    )
    assert (row["status"], row["reason"], row["asked"]) == ("refused", "wrong_task", "action")


@pytest.mark.parametrize(("error", "reason"), [(WriterError, "writer_failed"), (OverBudget, "over_budget")])
def test_a_writers_error_ends_a_row_and_no_other(error, reason):
    stage = stage_of(run_of(), lambda c, t, k, n: error("so") if c == "a dog" else with_moon(c, t, k, n))
    cat, dog = stage(rows_of("a cat", "a dog"))
    assert (dog["status"], dog["reason"], dog["error"], dog["tries"]) == ("error", reason, "so", 1)
    assert cat["status"] == "accepted"


def test_a_texts_length_is_checked():
    stage = WriteRequests(run_of("triplets.text_window=5"), Scripted(with_moon), lambda text: len(text.split()))
    rows = stage(rows_of("a cat", "one two three four five six"))
    assert [row["reason"] for row in rows] == ["too_long", "too_long"]
    assert [row["tries"] for row in rows] == [4, 0]


def test_the_judges_verdict_is_a_column_of_what_was_accepted():
    class Says:
        def complete(self, prompts, identities):
            return ["no" if "dog" in prompt else "yes" for prompt in prompts]

    stage = stage_of(run_of("triplets.tries=1"), lambda c, *rest: "x" if c == "a hen" else with_moon(c, *rest),
                     judge=Judge(Says()))  # fmt: skip
    assert [row["verdict"] for row in stage(rows_of("a cat", "a hen", "a dog"))] == ["yes", "", "no"]


# ---- the folder


def write(folder, run, captions, answer=with_moon):
    done = written.finished_captions(written.read_rows(folder), run.writing.per_caption)
    stage = stage_of(run, answer)
    for shard in written.plan(captions, run.writing, done):
        written.write_part(folder, shard.name, stage(shard.rows))
    return stage.writer.asked


def test_captions_are_asked_once_whatever_their_order(tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of(captions_per_shard=2)
    captions = rows_of("a", "b", "c", "d", "e")
    assert len(write(folder, run, captions[:3])) == 3
    moved = [dataclasses.replace(row, index=4 - i) for i, row in enumerate(captions)][::-1]
    assert [asked[0] for asked in write(folder, run, moved)] == ["e", "d"]
    assert len(written.read_rows(folder)) == 5
    assert write(folder, run, captions) == []


def test_a_row_that_failed_is_replaced_by_a_better_one_and_not_by_a_worse(tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of()
    good = stage_of(run, with_moon)(rows_of("a", "b"))
    bad = stage_of(run, lambda *_: WriterError("so"))(rows_of("a", "b"))
    written.write_part(folder, "part-00000-a", bad)
    written.write_part(folder, "part-00000-b", good)
    written.write_part(folder, "part-00000-c", bad)
    assert [row["status"] for row in written.read_rows(folder)] == ["accepted", "accepted"]


def test_finished_captions_and_those_to_try_again():
    rows = [{"prompt_id": "a", "status": "accepted"}, {"prompt_id": "a", "status": "error"},
            {"prompt_id": "b", "status": "refused"}, {"prompt_id": "b", "status": "accepted"},
            {"prompt_id": "c", "status": "accepted"}]  # fmt: skip
    assert written.finished_captions(rows, 2) == {"a", "b"}
    assert written.finished_captions(rows, 2, retry_errors=True) == {"b"}
    assert written.without_errors(rows) == {"b", "c"}


def test_a_part_that_is_there_is_used_if_it_holds_these_captions_and_no_error(tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of(per_caption=2)
    captions = rows_of("a", "b")
    assert written.finished_part(folder, "part-00000-a", captions) == []
    rows = stage_of(run, with_moon)(captions)
    written.write_part(folder, "part-00000-a", rows)
    assert written.finished_part(folder, "part-00000-a", captions) == rows
    assert written.finished_part(folder, "part-00000-a", captions[:1]) == []
    assert written.finished_part(folder, "part-00000-a", rows_of("a", "b", "c")) == []
    written.write_part(folder, "part-00000-a", [*rows[:3], {**rows[3], "status": "error"}])
    assert written.finished_part(folder, "part-00000-a", captions) == []


def test_the_end_refuses_near_duplicates_of_the_whole_run_with_their_reason(tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of(near_duplicate=0.8, captions_per_shard=1)
    write(folder, run, rows_of("a cat on a mat", "A cat, on a mat.", "a dog"))
    summary = written.finish(folder, run.writing, 1.0)
    assert summary["by_reason"] == {"near_duplicate": 1, "ok": 2}
    lines = [json.loads(line) for line in folder.read("triplets.jsonl").splitlines()]
    assert [line["caption"] for line in lines] == ["a cat on a mat", "a dog"]
    (refused,) = [json.loads(line) for line in folder.read("refused.jsonl").splitlines()]
    assert (refused["caption"], refused["reason"]) == ("A cat, on a mat.", "near_duplicate")


def test_the_end_cuts_types_that_came_too_often(tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of(types="open", shares="add=1,remove=1")
    rows = stage_of(run_of(), with_moon)(rows_of(*(f"cat {n}" for n in range(30))))
    for place, row in enumerate(rows):
        row["task"] = "remove" if place % 3 == 0 else "add"
    written.write_part(folder, "part-00000-a", rows)
    summary = written.finish(folder, run.writing, 1.0)
    assert summary["by_task"] == {"add": 15, "remove": 10}
    assert summary["by_reason"] == {"ok": 25, "over_quota": 5}


def disturbed(folder):
    """Parts of many shards: tried again after errors, and again from another file, where some share an index."""
    run = run_of("triplets.tries=2", per_caption=2, captions_per_shard=4)
    captions = rows_of(*(f"{'A' if n % 3 else 'a'} cat on mat {n // 2}" for n in range(60)))

    def answer(caption, task, copy, attempt):
        if caption.endswith("3"):
            return "nonsense"
        return WriterError("so") if caption.endswith("7") and copy else with_moon(caption, task, copy, attempt)

    stage = stage_of(run, answer)
    for shard in written.plan(captions, run.writing, set()):
        rows = stage(shard.rows)
        for place, row in enumerate(rows):
            row["task"] = "remove" if place % 3 == 0 else "add"
            row["cost"], row["prompt_tokens"] = 0.1 * place, place
        written.write_part(folder, shard.name, rows)
    moved = [dataclasses.replace(row, index=row.index // 3 * 2) for row in captions[::-1]]
    others = [dataclasses.replace(row, index=row.index + 1, prompt_id=f"b{row.index}") for row in captions[::7]]
    for number, again in ((20, moved), (7, others)):
        rows = [{**row, "task": "add"} for row in stage_of(run, with_moon)(again)]
        written.write_part(folder, f"part-{number:05d}-again", rows)


def plainly_finished(folder, writing):
    """The lines of accepted and of refused rows, with all rows in memory."""
    rows, duplicates = written.read_rows(folder), MinHashDuplicates(writing.near_duplicate)
    for row in rows:
        if row["status"] == "accepted" and not duplicates.add(row["caption"], row["instruction"]):
            row |= {"status": "refused", "reason": "near_duplicate"}
    accepted = [row for row in rows if row["status"] == "accepted"]
    stays = within_shares([row["task"] for row in accepted], {"add": 0.5, "remove": 0.5}, writing.share_tolerance)
    for row, stay in zip(accepted, stays, strict=True):
        row |= {} if stay else {"status": "refused", "reason": "over_quota"}
    names = {
        True: ("caption", "instruction", "edited_caption", "task", "url", "verdict"),
        False: ("caption", "instruction", "edited_caption", "task", "asked", "status", "reason", "error", "tries"),
    }
    lines = {True: "", False: ""}
    for row in rows:
        good = row["status"] == "accepted"
        record = {name: row[name] for name in names[good] if good or row[name] != ""}
        lines[good] += json.dumps(record, ensure_ascii=False) + "\n"
    return lines[True].encode(), lines[False].encode(), rows


def test_the_end_leaves_what_all_rows_in_memory_would_give(tmp_path, monkeypatch):
    monkeypatch.setattr(written, "PARTS_HELD", 1)
    folder = open_folder(str(tmp_path))
    disturbed(folder)
    writing = Writing(types="open", shares="add=1,remove=1", near_duplicate=0.8)
    triplets, refused, rows = plainly_finished(folder, writing)
    summary = written.finish(folder, writing, 2.5)
    assert (folder.read("triplets.jsonl"), folder.read("refused.jsonl")) == (triplets, refused)
    assert json.loads(folder.read("summary.json")) == summary
    reasons = [row["reason"] for row in rows]
    assert set(reasons) == {"ok", "near_duplicate", "over_quota", "unparseable"}
    assert summary["by_reason"] == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    assert summary["triplets"] == triplets.count(b"\n")
    assert summary["cost"] == round(sum(row["cost"] for row in rows), 6)
    assert summary["completions"] == sum(row["tries"] for row in rows)


def test_the_end_holds_a_few_parts_however_many_there_are(tmp_path):
    folder, run = open_folder(str(tmp_path)), run_of("triplets.tries=1")
    (row,) = stage_of(run, with_moon)(rows_of("a cat"))
    for part in range(40):
        rows = [{**row, "prompt_id": f"{part}-{n}", "index": 16 * part + n, "url": "x" * 10_000} for n in range(16)]
        written.write_part(folder, f"part-{part:05d}-a", rows)
    tracemalloc.start()
    try:
        assert written.finish(folder, run.writing, 0.0)["triplets"] == 640
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(folder.read("triplets.jsonl")) > 6_400_000
    assert peak < 3_200_000


def test_triplets_can_be_read_as_the_painters_input(tmp_path):
    from ip2p.triplets.captions import read_triplets

    folder, run = open_folder(str(tmp_path)), run_of()
    write(folder, run, rows_of("a cat", "a dog"))
    written.finish(folder, run.writing, 1.0)
    found = read_triplets(str(tmp_path / "triplets.jsonl"))
    assert [row.edited_caption for row in found.rows] == ["a cat with a moon 0", "a dog with a moon 0"]
    assert not found.bad


@pytest.mark.parametrize(
    ("writing", "message"),
    [
        ({"per_caption": 0}, "per_caption"),
        ({"captions_per_shard": 0}, "captions_per_shard"),
        ({"types": "x"}, "open, postcard, none"),
        ({"near_duplicate": 2.0}, "near_duplicate lies"),
        ({"types": "none", "shares": "even"}, "shares needs"),
        ({"types": "open", "shares": "ad=1"}, "unknown type"),
        ({"share_tolerance": 0.0}, "share_tolerance"),
        ({"prompt_price": -1.0}, "prices"),
    ],
)
def test_a_run_that_cannot_work_is_refused(writing, message):
    with pytest.raises(RecipeError, match=message):
        check_writing(Writing(**writing))


@pytest.mark.parametrize("name", ["nowhere:check", "json:nothing", "json", "json:__name__", ":x"])
def test_a_moderation_check_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match=r"writing\.moderation"):
        moderation_of(name)
