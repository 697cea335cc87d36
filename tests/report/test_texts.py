"""Text in reports: guesses at hidden tokens, and answers in passages."""

import re

from sslrun.report.build import build
from sslrun.report.collect import collect
from sslrun.report.page import render


def sections_of(root):
    """The report's sections by title."""
    report = build(collect([root], root), 0, [], print)
    return {section.title: section for section in report.sections}, render(report)


def test_guesses_are_drawn_with_their_gaps_and_the_true_token(texts):
    sections, page = sections_of(texts)
    (group,) = sections["Masked guesses"].groups
    (look,) = group.looks
    words = re.search(r'<p class="words">(.*?)</p>', look.html).group(1)
    assert words.startswith(' the <b class="gap">1</b>gy &lt;script&gt;')
    assert "<li><span>cat</span>" in look.html
    assert '<li class="true"><span>✓ dog</span>' in look.html
    assert "<span>rank 17 · 2.0 %</span>" in look.html
    assert [float(share) for share in re.findall(r"width:([\d.]+)%", look.html)] == [60, 10, 2]
    (note,) = sections["Masked guesses"].notes
    assert note.startswith("no guesses of causal")
    assert "<script>alert" not in page


def test_answers_are_marked_in_their_passages(texts):
    sections, page = sections_of(texts)
    wrong, right = sections["Answers"].groups
    assert (wrong.title[-26:], right.title[-13:]) == ("most certain wrong answers", "right answers")
    assert '<mark class="true">dog</mark><mark class="predicted">&lt;script' in wrong.looks[0].html
    assert '<mark class="both">cat</mark>' in right.looks[0].html
    assert "predicted: " not in right.looks[0].html
    assert "<script>alert" not in page


def test_missing_damaged_and_unfinished_texts_are_named_on_the_page(texts):
    next(texts.glob("masked/probe-*/answers.json")).unlink()
    guesses = next(texts.glob("masked/pretrain-*/guesses.json"))
    content = guesses.read_text()
    guesses.write_text(content[:-9])
    sections, _ = sections_of(texts)
    assert "damaged" in sections["Masked guesses"].notes[0]
    assert sections["Answers"].notes[0].endswith("no answers were kept by sslrun 0.1.0")
    guesses.write_text(content)
    guesses.with_name("result.json").unlink()
    sections, _ = sections_of(texts)
    (group,) = sections["Masked guesses"].groups
    assert group.title.endswith("not finished: guesses of the last check")


def test_a_damaged_pretraining_is_a_problem_and_not_the_end(planted):
    path = next(planted.glob("first/pretrain-*/result.json"))
    path.write_text(path.read_text()[:-9])
    sections, _ = sections_of(planted)
    assert any("damaged" in note for note in sections["Problems"].notes)
