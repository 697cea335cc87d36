"""Answers to questions: SQuAD's official measures, written out again here, and decoding by hand."""

import collections
import random
import re
import string

import pytest
import torch

from sslrun.data.specs import TextSpec
from sslrun.data.text.passages import SpanRow, _context_score, _window_starts, build_windows
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, build_wordpiece
from sslrun.tasks.squad import Answer, decode, normalize_answer, score_answers, word_f1


def official_normalize(s):
    """As evaluate-v1.1.py and -v2.0.py have it."""

    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def official_f1(gold, guess):
    """compute_f1 of evaluate-v2.0.py."""
    gold_tokens, guess_tokens = official_normalize(gold).split(), official_normalize(guess).split()
    common = collections.Counter(gold_tokens) & collections.Counter(guess_tokens)
    same = sum(common.values())
    if len(gold_tokens) == 0 or len(guess_tokens) == 0:
        return int(gold_tokens == guess_tokens)
    if same == 0:
        return 0
    precision, recall = same / len(guess_tokens), same / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def official(guesses, golds):
    """get_raw_scores and make_eval_dict of evaluate-v2.0.py; equal to v1.1's where every question has an answer."""
    exact = f1 = 0
    for guess, answers in zip(guesses, golds, strict=True):
        answers = [each for each in answers if official_normalize(each)] or [""]
        exact += max(int(official_normalize(each) == official_normalize(guess)) for each in answers)
        f1 += max(official_f1(each, guess) for each in answers)
    return {"f1": 100.0 * f1 / len(guesses), "exact_match": 100.0 * exact / len(guesses)}


CASES = [
    ("The  Eiffel-Tower!", ["eiffeltower"], 100, 100),
    ("the cat sat", ["a cat"], 0, 200 / 3),
    ("in Paris, France", ["Paris", "Paris France"], 0, 80),
    ("1,000", ["1000"], 100, 100),
    ("", ["x"], 0, 0),
    ("", [], 100, 100),
    ("x", [], 0, 0),
    ("the", ["the", "cat"], 0, 0),
    ("cat cat dog", ["cat dog dog"], 0, 200 / 3),
    ("Café", ["cafe"], 0, 0),
    ("another theatre", ["other heatre"], 0, 0),
]


@pytest.mark.parametrize(("guess", "golds", "exact", "f1"), CASES)
def test_scores_of_one_answer_are_the_official_ones(guess, golds, exact, f1):
    rows = [SpanRow("0", "?", "", tuple((each, 0) for each in golds))]
    found = score_answers({0: Answer(guess, 0.0)}, rows)
    found.pop("best_f1", None)
    assert found == {"f1": pytest.approx(f1), "exact_match": exact}
    assert found == {name: pytest.approx(each) for name, each in official([guess], [golds]).items()}


def test_scores_of_many_answers_are_the_official_ones():
    draw = random.Random(0)
    words = ["the", "a", "Cat", "cat's", "dog", "(dog)", "an", "tree.", "1,5", "theme", "ÉTÉ"]
    text = lambda most: " ".join(draw.choices(words, k=draw.randint(0, most)))  # noqa: E731
    golds = [[text(4) for _ in range(draw.randint(0, 3))] for _ in range(500)]
    guesses = [draw.choice(gold) if gold and draw.random() < 0.3 else text(4) for gold in golds]
    rows = [
        SpanRow(str(at), "?", "", tuple((each, 0) for each in gold))
        for at, gold in enumerate(golds)
    ]
    expected = official(guesses, golds)
    assert 5 < expected["exact_match"] < expected["f1"] < 95
    answers = {at: Answer(guess, 0.0) for at, guess in enumerate(guesses)}
    found = score_answers(answers, rows)
    assert found.pop("best_f1") >= found["f1"]
    assert found == {name: pytest.approx(e) for name, e in expected.items()}
    assert all(normalize_answer(each) == official_normalize(each) for each in guesses)
    assert word_f1("cat", "cat") == 1


# ---------------------------------------------------------------- windows


WORDS = [chr(ord("a") + at) * 2 for at in range(26)]
TOKENIZER = Tokenizer(
    build_wordpiece(
        True,
        {entry: at for at, entry in enumerate([*SPECIALS, *WORDS, "who", "?", "un", "##do", "."])},
    )
)
PASSAGE = " ".join(WORDS)


def made(rows, length=16, question_length=8, stride=4):
    return build_windows(rows, TextSpec(TOKENIZER, length), question_length, stride)


def asked(answer="kk", passage=PASSAGE, question="who ?", id="q"):
    return SpanRow(id, question, passage, ((answer, passage.index(answer)),) if answer else ())


def test_windows_cover_the_passage_by_the_stride_and_hold_the_answer_where_they_say():
    found = made([asked()])
    (batch,) = found.batches([torch.arange(len(found))], torch.device("cpu"))
    ids = batch.inputs.ids
    room = 16 - 3 - 2
    starts = [0, 4, 8, 12, 16]
    assert [row[4] - 5 for row in ids.tolist()] == starts
    for row, start in zip(ids.tolist(), starts, strict=True):
        passage = [5 + at for at in range(start, min(start + room, 26))]
        assert [each for each in row if each != TOKENIZER.pad] == [
            TOKENIZER.cls, TOKENIZER.strings.index("who"), TOKENIZER.strings.index("?"), TOKENIZER.sep, *passage, TOKENIZER.sep
        ]  # fmt: skip
    answer = PASSAGE.index("kk")
    for at, start in enumerate(starts):
        first, last = batch.labels[at].tolist()
        if start <= 10 < start + room:
            assert first == last == 4 + 10 - start
            assert found.extra.characters[at, first].tolist() == [answer, answer + 2]
        else:
            assert (first, last) == (0, 0)  # run_squad.py trains such windows on [CLS]
    assert found.extra.question.tolist() == [0] * 5
    assert found.extra.passage.tolist() == [4] * 5


def official_is_max_context(spans, current, position):
    """_check_is_max_context of run_squad.py."""
    best_score = best = None
    for at, (start, length) in enumerate(spans):
        end = start + length - 1
        if position < start or position > end:
            continue
        score = min(position - start, end - position) + 0.01 * length
        if best_score is None or score > best_score:
            best_score, best = score, at
    return current == best


def test_max_context_is_the_official_one_but_for_ties():
    found = made([asked()])
    spans = [(start, min(11, 26 - start)) for start in (0, 4, 8, 12, 16)]
    for at, (start, length) in enumerate(spans):
        for place in range(length):
            told = bool(found.extra.best[at, 4 + place])
            if official_is_max_context(spans, at, start + place):
                assert told
            elif told:  # as much as the first of the best has
                mine = _context_score(start + place, start, start + length)
                assert mine == max(
                    _context_score(start + place, s, s + n)
                    for s, n in spans
                    if s <= start + place < s + n
                )
    assert not found.extra.best[:, :4].any()
    assert _window_starts(10, 10, 4) == [0]
    assert _window_starts(11, 10, 4) == [0, 4]
    assert _window_starts(25, 10, 4) == [0, 4, 8, 12, 16]


def test_an_answer_within_a_word_is_that_words_and_one_of_several_words_all_of_theirs():
    passage = "aa undo. bb"
    rows = [asked("do", passage), asked("undo. bb", passage), asked(None, passage)]
    assert made(rows).labels.tolist() == [[6, 6], [5, 8], [0, 0]]


def test_questions_are_cut_and_room_is_asked_for():
    found = made([asked(question="who " * 20)], question_length=4)
    (batch,) = found.batches([torch.tensor([0])], torch.device("cpu"))
    assert (batch.inputs.segments == 0).sum() >= 6
    assert batch.inputs.ids[0, 5] == TOKENIZER.sep
    from sslrun.errors import UserError

    with pytest.raises(UserError, match="leave no room beside a question"):
        made([asked(question="who " * 20)], length=8)


# ---------------------------------------------------------------- decoding


def scores(found, *wanted, base=-5.0):
    """Outputs (W, T, 2) that are `base` but at (window, place, 0 for start or 1 for end, score)."""
    outputs = torch.full((len(found), 16, 2), base)
    for window, place, side, score in wanted:
        outputs[window, place, side] = score
    return outputs


def decoded(found, outputs, candidates=20, longest=30):
    return {
        at: each.text
        for at, each in decode(outputs, found.extra, found.rows, candidates, longest).items()
    }


def test_the_best_span_of_all_windows_is_told_in_the_passages_own_characters():
    passage = "Aa  BB (cc) dd"
    found = made([asked("BB (cc", passage), asked("dd", passage, id="r")])
    outputs = scores(found, (0, 5, 0, 3.0), (0, 6, 1, 2.0), (1, 4, 0, 1.0), (1, 4, 1, 1.0))
    # "(" is a piece of its own: aa, bb, [UNK] of "(", cc, ...
    told = decoded(found, outputs)
    assert told[0] == "BB ("
    assert told[1] == "Aa"


def test_what_is_no_answer_is_not_told():
    found = made([asked()])
    good = [(1, 8, 0, 1.0), (1, 9, 1, 1.0)]
    assert found.extra.best[1, 8]
    expected = "ii jj"
    assert decoded(found, scores(found, *good)) == {0: expected}
    # An end before the start, a span in the question or on a separator, and one that is too long.
    for worse in (
        [(1, 5, 1, 9.0)],
        [(1, 1, 0, 9.0), (1, 2, 1, 9.0)],
        [(1, 0, 0, 9.0), (1, 0, 1, 9.0)],
        [(1, 15, 1, 9.0)],
    ):
        assert decoded(found, scores(found, *good, *worse)) == {0: expected}
    long = [(0, 4, 0, 5.0), (0, 14, 1, 5.0)]
    assert decoded(found, scores(found, *good, *long)) == {0: PASSAGE[: 11 * 3 - 1]}
    assert decoded(found, scores(found, *good, *long), longest=11) == {0: PASSAGE[: 11 * 3 - 1]}
    assert decoded(found, scores(found, *good, *long), longest=10) == {0: expected}
    # A start counts where its window gives it the most context.
    assert not found.extra.best[1, 13]
    assert decoded(found, scores(found, *good, (1, 13, 0, 9.0), (1, 14, 1, 0.5))) == {0: expected}
    # Of several candidates the n best alone are tried.
    many = [(1, 9, 0, 4.0), (1, 8, 1, 4.0), (1, 8, 0, 3.0), (1, 9, 1, 3.5)]
    assert decoded(found, scores(found, *many), candidates=1)[0] != "jj"
    assert decoded(found, scores(found, *many), candidates=2) == {0: "jj"}


def test_no_answer_is_told_where_cls_scores_higher_and_the_set_has_such_questions():
    rows = [asked(), asked(None, id="r")]
    found = made(rows)
    second = len(found) // 2
    good = [(1, 8, 0, 1.0), (1, 8, 1, 1.0), (second + 1, 8, 0, 1.0), (second + 1, 8, 1, 1.0)]
    empty = [(second + at, 0, side, 1.5) for at in range(second) for side in (0, 1)]

    def told(found, *wanted):
        return decode(scores(found, *wanted), found.extra, found.rows, 20, 30)

    assert told(found, *good, *empty) == {0: Answer("ii", -12.0), 1: Answer("ii", 1.0)}
    # One window that finds no sign of "no answer" decides: the lowest counts.
    assert told(found, *good, *empty[2:])[1] == Answer("ii", -12.0)
    right = [asked("ii"), asked(None, id="r")]
    assert score_answers(told(found, *good, *empty), right)["exact_match"] == 100
    alone = made([asked()])
    everywhere = [(at, 0, side, 9.0) for at in range(len(alone)) for side in (0, 1)]
    assert score_answers(told(alone, *good[:2], *everywhere), right[:1])["exact_match"] == 100


def test_the_best_f1_is_by_the_best_threshold():
    def row(*answers):
        return SpanRow("q", "?", "aa bb", tuple((each, 0) for each in answers))

    rows = [row("aa"), row("aa bb"), row(), row(), row("bb")]
    answers = dict(enumerate(
        [Answer("aa", -1.0), Answer("aa", 2.0), Answer("aa", 3.0), Answer("bb", -2.0), Answer("bb", 3.0)]
    ))  # fmt: skip
    found = score_answers(answers, rows)
    assert found["f1"] == pytest.approx(100 * (1 + 0 + 1 + 0 + 0) / 5)

    def by(threshold):
        texts = [answer.text if answer.doubt <= threshold else "" for answer in answers.values()]
        return (
            sum(
                max(word_f1(text, each) for each, _ in row.answers or (("", 0),))
                for text, row in zip(texts, rows, strict=True)
            )
            / 5
        )

    assert found["best_f1"] == pytest.approx(100 * max(by(each) for each in (-9, -2, -1, 2, 3)))
    assert found["best_f1"] > found["f1"]
    assert "best_f1" not in score_answers({0: answers[0]}, rows[:1])


def test_perfect_scores_find_every_answer_of_the_small_world():
    from sslrun.data.text.passages import SpanRow as Row
    from sslrun.data.text.tokenizer import train_wordpiece
    from sslrun.data.text.world import World

    drawn = World(0).examples("span", "train", 60)
    tokenizer = train_wordpiece(lambda: (each for row in drawn for each in row[:2]), 150, True)
    rows = [
        Row(str(at), q, passage, ((answer, start),))
        for at, (q, passage, answer, start) in enumerate(drawn)
    ]
    found = build_windows(rows, TextSpec(tokenizer, 20), 4, 8)
    assert len(found) > 90
    outputs = torch.zeros(len(found), 20, 2)
    for at, (first, last) in enumerate(found.labels.tolist()):
        if first and bool(found.extra.best[at, first]):
            outputs[at, first, 0], outputs[at, last, 1] = 5, 5
    told = decode(outputs, found.extra, found.rows, 20, 30)
    assert (
        score_answers(told, rows)["exact_match"] > 97
    )  # but where no window with the most context holds all of it
