"""Answers to show: which are chosen, and how their passages are marked."""

from sslrun.data.text.passages import SpanRow
from sslrun.tasks.answers import AROUND, RIGHT, WRONG, choose_answers
from sslrun.tasks.squad import Answer

PASSAGE = "The cat sat on the mat."


def row(*answers, passage=PASSAGE):
    return SpanRow("q", "Who sat?", passage, answers)


def test_right_answers_come_first_then_the_most_certain_wrong_ones():
    rows = [row(("cat", 4))] * 20
    answers = {number: Answer("mat", -float(number), 19) for number in range(15)}
    answers |= {number: Answer("The cat", -1.0, 0) for number in range(15, 20)}
    chosen = choose_answers(answers, rows)
    assert [answer.right for answer in chosen] == [True] * RIGHT + [False] * WRONG
    assert [answer.certainty for answer in chosen[RIGHT:]] == [14, 13, 12, 11, 10, 9]


def test_the_marks_cover_both_spans_and_the_text_is_whole():
    (answer,) = choose_answers({0: Answer("The cat sat", -1.0, 0)}, [row(("cat", 4), ("mat", 19))])
    assert answer.passage == [
        ("The ", "predicted"), ("cat", "both"), (" sat", "predicted"), (" on the mat.", ""),
    ]  # fmt: skip
    assert (answer.true, answer.right, round(answer.f1, 2)) == ("cat", False, 0.67)


def test_a_long_passage_is_shortened_between_its_marks():
    passage = "a" * 1000 + "cat" + "b" * 1000 + "mat" + "c" * 1000
    (answer,) = choose_answers({0: Answer("mat", 0.0, 2003)}, [row(("cat", 1000), passage=passage)])
    texts, marks = zip(*answer.passage, strict=True)
    assert marks == ("", "true", "", "predicted", "")
    assert texts[0] == f" … {'a' * AROUND}"
    assert texts[2] == f"{'b' * AROUND} … {'b' * AROUND}"
    assert texts[4] == f"{'c' * AROUND} … "


def test_questions_without_an_answer_are_right_if_they_are_left_unanswered():
    rows = [row(), row(("cat", 4)), row()]
    answers = {0: Answer("cat", 2.0, 4), 1: Answer("cat", 3.0, 4), 2: Answer("cat", -4.0, 4)}
    first, third, second = choose_answers(answers, rows)
    assert (first.right, first.true, first.predicted, first.certainty) == (True, "", "", 2.0)
    assert first.passage == [(PASSAGE, "")]
    assert (third.right, third.true, third.predicted, third.certainty) == (False, "", "cat", 4.0)
    assert (second.right, second.true, second.predicted, second.certainty) == (False, "cat", "", 3)


def test_a_question_without_any_allowed_span_is_left_out():
    assert choose_answers({0: Answer("", float("inf"))}, [row(("cat", 4))]) == []
