import pytest

from ip2p.config import Triplets
from ip2p.errors import WriterError
from ip2p.schema import Triplet
from ip2p.triplets.judge import Judge, Question, question_messages, question_of, verdict_of
from ip2p.triplets.language_model import LanguageModelWriter

TRIPLET = Triplet("a cat", "make it night", "a cat at night")


class Scripted:
    def __init__(self, *answers):
        self.answers, self.asked = answers, []

    def complete(self, prompts, identities):
        self.asked += zip(prompts, identities, strict=True)
        return self.answers


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("Yes", "yes"), (" no.", "no"), ("**Yes**, because", "yes"), ("NO", "no"), ("", "unclear"), ("maybe", "unclear"),
     ("not really", "unclear"), (WriterError("away"), "error")],
)  # fmt: skip
def test_an_answer_becomes_a_verdict(answer, verdict):
    assert verdict_of(answer) == verdict


def test_the_judge_is_asked_about_all_three_texts_under_an_identity_of_its_own():
    writer = Scripted("yes", "no")
    assert Judge(writer).verdicts([TRIPLET, TRIPLET], [("a", 0, 1), ("b", 0, 0)]) == ["yes", "no"]
    (question, identity), _ = writer.asked
    assert question == question_of(TRIPLET)
    assert all(text in question for text in (TRIPLET.caption, TRIPLET.instruction, TRIPLET.edited_caption))
    assert identity == ("a", 0, 1, "judge")


def test_nothing_to_judge_asks_nobody():
    assert Judge(Scripted()).verdicts([], []) == []


def test_a_language_model_can_be_the_judge(random_lm):
    writer = LanguageModelWriter(str(random_lm), Triplets(temperature=0, max_tokens=2), 0, "cpu", manner=Question())
    (verdict,) = Judge(writer).verdicts([Triplet("a", "b", "c")], [("x", 0, 0)])
    assert verdict in ("yes", "no", "unclear")


def test_a_chat_model_is_asked_by_its_template(random_lm):
    writer = LanguageModelWriter(str(random_lm), Triplets(), 0, "cpu", manner=Question())
    writer.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    ids = writer.manner.token_ids(writer.tokenizer, "Is it so?")
    assert writer.tokenizer.decode(ids) == "<user>Is it so?<assistant>"
    assert question_messages("Is it so?") == [{"role": "user", "content": "Is it so?"}]


def test_the_writers_own_model_can_judge_what_it_wrote(taught_lm, learnt):
    from ip2p.config import load_recipe
    from ip2p.triplets.assembly import language_model_stage
    from ip2p.triplets.captions import CaptionRow
    from ip2p.triplets.writing import Writing, WritingRun

    settings = [f"models.triplet_lm={taught_lm}", "triplets.temperature=0", "triplets.max_tokens=40"]
    run = WritingRun(load_recipe("postcard", settings), Writing(types="none", judge="lm"))
    stage = language_model_stage(run, "cpu")
    assert stage.judge.writer.model is stage.writer.model
    rows = stage([CaptionRow(i, str(i), i, triplet.caption) for i, triplet in enumerate(learnt)])
    assert [row["instruction"] for row in rows] == [triplet.instruction for triplet in learnt]
    assert all(row["verdict"] in ("yes", "no", "unclear") for row in rows)
