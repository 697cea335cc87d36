"""Question answering: SQuAD's official measures, rewritten here, and hand-made decoding cases."""

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
    """normalize_answer of evaluate-v1.1.py and evaluate-v2.0.py."""

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


def official_scores(guesses, golds):
    """get_raw_scores and make_eval_dict of evaluate-v2.0.py.

    They equal those of v1.1 if every question has an answer.
    """
    exact = f1 = 0
    for guess, answers in zip(guesses, golds, strict=True):
        answers = [answer for answer in answers if official_normalize(answer)] or [""]
        exact += max(
            int(official_normalize(answer) == official_normalize(guess)) for answer in answers
        )
        f1 += max(official_f1(answer, guess) for answer in answers)
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
def test_scores_of_one_answer_equal_the_official_ones(guess, golds, exact, f1):
    rows = [SpanRow("0", "?", "", tuple((gold, 0) for gold in golds))]
    results = score_answers({0: Answer(guess, 0.0)}, rows)
    results.pop("best_f1", None)
    assert results == {"f1": pytest.approx(f1), "exact_match": exact}
    assert results == {
        name: pytest.approx(gold) for name, gold in official_scores([guess], [golds]).items()
    }


def test_scores_of_many_answers_equal_the_official_ones():
    draw = random.Random(0)
    words = ["the", "a", "Cat", "cat's", "dog", "(dog)", "an", "tree.", "1,5", "theme", "ÉTÉ"]
    draw_text = lambda most: " ".join(draw.choices(words, k=draw.randint(0, most)))  # noqa: E731
    golds = [[draw_text(4) for _ in range(draw.randint(0, 3))] for _ in range(500)]
    guesses = [
        draw.choice(gold) if gold and draw.random() < 0.3 else draw_text(4) for gold in golds
    ]
    rows = [
        SpanRow(str(number), "?", "", tuple((guess, 0) for guess in gold))
        for number, gold in enumerate(golds)
    ]
    expected = official_scores(guesses, golds)
    assert 5 < expected["exact_match"] < expected["f1"] < 95
    answers = {number: Answer(guess, 0.0) for number, guess in enumerate(guesses)}
    results = score_answers(answers, rows)
    assert results.pop("best_f1") >= results["f1"]
    assert results == {name: pytest.approx(value) for name, value in expected.items()}
    assert all(normalize_answer(guess) == official_normalize(guess) for guess in guesses)
    assert word_f1("cat", "cat") == 1


# ---------------------------------------------------------------- windows


WORDS = [chr(ord("a") + number) * 2 for number in range(26)]
TOKENIZER = Tokenizer(
    build_wordpiece(
        True,
        {
            entry: number
            for number, entry in enumerate([*SPECIALS, *WORDS, "who", "?", "un", "##do", "."])
        },
    )
)
PASSAGE = " ".join(WORDS)


def build(rows, length=16, question_length=8, stride=4):
    return build_windows(rows, TextSpec(TOKENIZER, length), question_length, stride)


def build_row(answer="kk", passage=PASSAGE, question="who ?", id="q"):
    return SpanRow(id, question, passage, ((answer, passage.index(answer)),) if answer else ())


def test_windows_cover_the_passage_and_label_the_answer():
    windows = build([build_row()])
    (batch,) = windows.batches([torch.arange(len(windows))], torch.device("cpu"))
    ids = batch.inputs.ids
    room = 16 - 3 - 2
    starts = [0, 4, 8, 12, 16]
    assert [row[4] - 5 for row in ids.tolist()] == starts
    for row, start in zip(ids.tolist(), starts, strict=True):
        passage = [5 + index for index in range(start, min(start + room, 26))]
        assert [token for token in row if token != TOKENIZER.pad] == [
            TOKENIZER.cls,
            TOKENIZER.strings.index("who"),
            TOKENIZER.strings.index("?"),
            TOKENIZER.sep,
            *passage,
            TOKENIZER.sep,
        ]
    answer = PASSAGE.index("kk")
    for index, start in enumerate(starts):
        first, last = batch.labels[index].tolist()
        if start <= 10 < start + room:
            assert first == last == 4 + 10 - start
            assert windows.extra.characters[index, first].tolist() == [answer, answer + 2]
        else:
            assert (first, last) == (0, 0)  # run_squad.py trains such windows on [CLS]
    assert windows.extra.question.tolist() == [0] * 5
    assert windows.extra.passage.tolist() == [4] * 5


def official_is_max_context(spans, current, position):
    """_check_is_max_context of run_squad.py."""
    best_score = best = None
    for index, (start, length) in enumerate(spans):
        end = start + length - 1
        if position < start or position > end:
            continue
        score = min(position - start, end - position) + 0.01 * length
        if best_score is None or score > best_score:
            best_score, best = score, index
    return current == best


def test_max_context_equals_the_official_one_except_for_ties():
    windows = build([build_row()])
    spans = [(start, min(11, 26 - start)) for start in (0, 4, 8, 12, 16)]
    for index, (start, length) in enumerate(spans):
        for offset in range(length):
            is_best = bool(windows.extra.best[index, 4 + offset])
            if official_is_max_context(spans, index, start + offset):
                assert is_best
            elif is_best:  # sslrun keeps all ties; the official code keeps the first
                score = _context_score(start + offset, start, start + length)
                assert score == max(
                    _context_score(start + offset, other, other + size)
                    for other, size in spans
                    if other <= start + offset < other + size
                )
    assert not windows.extra.best[:, :4].any()
    assert _window_starts(10, 10, 4) == [0]
    assert _window_starts(11, 10, 4) == [0, 4]
    assert _window_starts(25, 10, 4) == [0, 4, 8, 12, 16]


def test_an_answer_is_labeled_with_all_pieces_of_its_words():
    passage = "aa undo. bb"
    rows = [build_row("do", passage), build_row("undo. bb", passage), build_row(None, passage)]
    assert build(rows).labels.tolist() == [[6, 6], [5, 8], [0, 0]]


def test_questions_are_truncated_and_leave_room_for_the_passage():
    windows = build([build_row(question="who " * 20)], question_length=4)
    (batch,) = windows.batches([torch.tensor([0])], torch.device("cpu"))
    assert (batch.inputs.segments == 0).sum() >= 6
    assert batch.inputs.ids[0, 5] == TOKENIZER.sep
    from sslrun.errors import UserError

    with pytest.raises(UserError, match="leave no room beside a question"):
        build([build_row(question="who " * 20)], length=8)


# ---------------------------------------------------------------- decoding


def build_outputs(windows, *overrides, base=-5.0):
    """Return outputs (W, T, 2): `base` except for (window, position, 0 or 1 for end, score)."""
    outputs = torch.full((len(windows), 16, 2), base)
    for window, position, side, score in overrides:
        outputs[window, position, side] = score
    return outputs


def decode_texts(windows, outputs, candidates=20, longest=30):
    return {
        row: answer.text
        for row, answer in decode(outputs, windows.extra, windows.rows, candidates, longest).items()
    }


def test_the_best_span_is_returned_in_the_passages_own_characters():
    passage = "Aa  BB (cc) dd"
    windows = build([build_row("BB (cc", passage), build_row("dd", passage, id="r")])
    outputs = build_outputs(windows, (0, 5, 0, 3.0), (0, 6, 1, 2.0), (1, 4, 0, 1.0), (1, 4, 1, 1.0))
    # "(" is a piece of its own: aa, bb, [UNK] for "(", cc, ...
    answers = decode_texts(windows, outputs)
    assert answers[0] == "BB ("
    assert answers[1] == "Aa"


def test_invalid_spans_are_never_returned():
    windows = build([build_row()])
    good = [(1, 8, 0, 1.0), (1, 9, 1, 1.0)]
    assert windows.extra.best[1, 8]
    expected = "ii jj"
    assert decode_texts(windows, build_outputs(windows, *good)) == {0: expected}
    # An end before the start, a span in the question, [CLS] and a separator.
    for worse in (
        [(1, 5, 1, 9.0)],
        [(1, 1, 0, 9.0), (1, 2, 1, 9.0)],
        [(1, 0, 0, 9.0), (1, 0, 1, 9.0)],
        [(1, 15, 1, 9.0)],
    ):
        assert decode_texts(windows, build_outputs(windows, *good, *worse)) == {0: expected}
    long = [(0, 4, 0, 5.0), (0, 14, 1, 5.0)]
    assert decode_texts(windows, build_outputs(windows, *good, *long)) == {0: PASSAGE[: 11 * 3 - 1]}
    assert decode_texts(windows, build_outputs(windows, *good, *long), longest=11) == {
        0: PASSAGE[: 11 * 3 - 1]
    }
    assert decode_texts(windows, build_outputs(windows, *good, *long), longest=10) == {0: expected}
    # A start is valid only in the window that gives it the most context.
    assert not windows.extra.best[1, 13]
    assert decode_texts(
        windows, build_outputs(windows, *good, (1, 13, 0, 9.0), (1, 14, 1, 0.5))
    ) == {0: expected}
    # Only the n best starts and ends are tried.
    many = [(1, 9, 0, 4.0), (1, 8, 1, 4.0), (1, 8, 0, 3.0), (1, 9, 1, 3.5)]
    assert decode_texts(windows, build_outputs(windows, *many), candidates=1)[0] != "jj"
    assert decode_texts(windows, build_outputs(windows, *many), candidates=2) == {0: "jj"}


def test_doubt_is_the_lowest_cls_margin_and_counts_only_with_unanswerable_questions():
    rows = [build_row(), build_row(None, id="r")]
    windows = build(rows)
    second = len(windows) // 2
    good = [(1, 8, 0, 1.0), (1, 8, 1, 1.0), (second + 1, 8, 0, 1.0), (second + 1, 8, 1, 1.0)]
    empty = [(second + index, 0, side, 1.5) for index in range(second) for side in (0, 1)]

    def decode_scores(windows, *overrides):
        return decode(build_outputs(windows, *overrides), windows.extra, windows.rows, 20, 30)

    place = PASSAGE.index("ii")
    expected = {0: Answer("ii", -12.0, place), 1: Answer("ii", 1.0, place)}
    assert decode_scores(windows, *good, *empty) == expected
    # The lowest margin of all windows counts: one window without a "no answer" sign decides.
    assert decode_scores(windows, *good, *empty[2:])[1] == expected[0]
    gold = [build_row("ii"), build_row(None, id="r")]
    assert score_answers(decode_scores(windows, *good, *empty), gold)["exact_match"] == 100
    alone = build([build_row()])
    everywhere = [(index, 0, side, 9.0) for index in range(len(alone)) for side in (0, 1)]
    assert (
        score_answers(decode_scores(alone, *good[:2], *everywhere), gold[:1])["exact_match"] == 100
    )


def test_the_best_f1_uses_the_best_threshold():
    def row(*answers):
        return SpanRow("q", "?", "aa bb", tuple((answer, 0) for answer in answers))

    rows = [row("aa"), row("aa bb"), row(), row(), row("bb")]
    answers = dict(
        enumerate(
            [
                Answer("aa", -1.0),
                Answer("aa", 2.0),
                Answer("aa", 3.0),
                Answer("bb", -2.0),
                Answer("bb", 3.0),
            ]
        )
    )
    results = score_answers(answers, rows)
    assert results["f1"] == pytest.approx(100 * (1 + 0 + 1 + 0 + 0) / 5)

    def f1_at(threshold):
        texts = [answer.text if answer.doubt <= threshold else "" for answer in answers.values()]
        return (
            sum(
                max(word_f1(text, answer) for answer, _ in row.answers or (("", 0),))
                for text, row in zip(texts, rows, strict=True)
            )
            / 5
        )

    assert results["best_f1"] == pytest.approx(
        100 * max(f1_at(answer) for answer in (-9, -2, -1, 2, 3))
    )
    assert results["best_f1"] > results["f1"]
    assert "best_f1" not in score_answers({0: answers[0]}, rows[:1])


def test_perfect_outputs_recover_the_answers_of_the_small_world():
    from sslrun.data.text.passages import SpanRow as Row
    from sslrun.data.text.tokenizer import train_wordpiece
    from sslrun.data.text.world import World

    examples = World(0).examples("span", "train", 60)
    tokenizer = train_wordpiece(lambda: (text for row in examples for text in row[:2]), 150, True)
    rows = [
        Row(str(number), question, passage, ((answer, start),))
        for number, (question, passage, answer, start) in enumerate(examples)
    ]
    windows = build_windows(rows, TextSpec(tokenizer, 20), 4, 8)
    assert len(windows) > 90
    outputs = torch.zeros(len(windows), 20, 2)
    for number, (first, last) in enumerate(windows.labels.tolist()):
        if first and bool(windows.extra.best[number, first]):
            outputs[number, first, 0], outputs[number, last, 1] = 5, 5
    answers = decode(outputs, windows.extra, windows.rows, 20, 30)
    assert (
        score_answers(answers, rows)["exact_match"] > 97
    )  # an answer is lost if no window with the most context contains all of it
