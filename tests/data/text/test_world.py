"""The small world: labels follow from what happened, and a bag of words can't tell them where it should not."""

from collections import Counter
from itertools import pairwise

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sslrun.data.text.world import (
    AMBIGUOUS,
    COLORS,
    DENIED,
    FEELINGS,
    GLAD,
    KIND_OF,
    KINDS,
    PEOPLE,
    PLACES,
    REPLIES,
    SORRY,
    TASKS,
    THINGS,
    TIMES,
    World,
)


def bag_of_words(task, train=3000, test=1000):
    """Test accuracy of a linear classifier of which words stand in a text, in percent; of a pair, in which of both."""
    world = World(3)
    sides = []
    for split, count in (("train", train), ("test", test)):
        *texts, labels = zip(*world.examples(task, split, count), strict=True)
        sides.append(
            (
                [
                    " ".join(
                        " ".join(f"{at}{word}" for word in text.split())
                        for at, text in enumerate(each)
                    )
                    for each in zip(*texts, strict=True)
                ],
                labels,
            )
        )
    model = make_pipeline(
        CountVectorizer(token_pattern=r"\S+", binary=True), LogisticRegression(C=0.3, max_iter=300)
    )
    return 100 * model.fit(*sides[0]).score(*sides[1])


def test_the_same_seed_tells_the_same_and_splits_differ():
    assert World(0).documents(20) == World(0).documents(40)[:20]
    assert World(0).documents(5) != World(1).documents(5)
    for task in TASKS:
        train = World(0).examples(task, "train", 50)
        assert train == World(0).examples(task, "train", 80)[:50]
        assert train != World(0).examples(task, "test", 50)
        assert train != World(1).examples(task, "train", 50)
        splits = [
            {str(each) for each in World(0).examples(task, split, 1500)}
            for split in ("train", "val", "test")
        ]
        assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2], task


def test_documents_are_of_several_sentences_about_the_same_few_people():
    documents = World(0).documents(200)
    assert all(4 <= len(each) <= 8 for each in documents)
    assert all(
        line.endswith((" .", " ?")) and line == line.lower() for each in documents for line in each
    )
    for document in documents:
        words = set(" ".join(document).split())
        assert len(words & set(PEOPLE) - {*AMBIGUOUS}) <= 4
    assert 40 < sum(len(" ".join(each).split()) for each in documents) / 200 < 50
    # Each entry of the lists is met, and some words are of two kinds.
    seen = set(" ".join(line for each in World(1).documents(2000) for line in each).split())
    assert {*PEOPLE, *PLACES, *THINGS, *COLORS, *TIMES, *GLAD, *SORRY} <= seen
    assert set(PEOPLE) & {*PLACES, *THINGS, *TIMES} == {*AMBIGUOUS}


def test_replies_open_with_how_they_relate_to_what_was_told():
    opened = Counter()
    for document in World(0).documents(1500):
        for told, reply in pairwise(document):
            opening = next((each for each in REPLIES if reply.startswith(each)), None)
            if opening is None:
                continue
            opened[opening] += 1
            colours = {*reply.split()} & {*COLORS}
            if opening == "yes ,":
                assert DENIED not in reply
                assert colours <= {*told.split()}
            if opening == "no ," and colours and DENIED not in reply:
                assert not colours & {*told.split()}
    assert set(opened) == {*REPLIES}
    assert min(opened.values()) > 0.3 * sum(opened.values())


def test_classes_are_balanced():
    for task, classes in (("entailment", 3), ("questions", 2), ("paraphrase", 2), ("sentiment", 2)):
        counts = Counter(each[-1] for each in World(0).examples(task, "train", 3000))
        assert len(counts) == classes
        assert min(counts.values()) > 0.85 * 3000 / classes, (task, counts)


MOST = {"paraphrase": 56, "questions": 56, "entailment": 56, "sentiment": 80}
"""What a bag of words may find at most, in percent, where guessing finds 50, 50, 33 and 50.

Paraphrases and answers are told by what goes with what on both sides: it stays at chance. It does
better on entailment, where the wording of a hypothesis tells what it may not be ("there was a ..."
never contradicts), and on sentiment, where verbs say how each of two events ended: in half of the
texts both ended alike, and which one counts is word order.
"""


@pytest.mark.parametrize("task", list(MOST))
def test_a_bag_of_words_does_not_tell_the_label(task):
    found = bag_of_words(task)
    assert found < MOST[task]


def test_labels_of_sentiment_follow_from_what_happened_last():
    # The verb's outcome, and no word of feeling in the text.
    wordings = {
        "gave": ("gave", "got", "given", "handed", "received"), "lost": ("lost", "could not keep"),
        "found": ("found", "discovered"), "broke": ("broke", "broken", "damaged"),
        "cleaned": ("cleaned", "washed"), "missed": ("in vain", "did not find", "missed"),
    }  # fmt: skip
    for text, label in World(0).examples("sentiment", "train", 500):
        assert not {*GLAD, *SORRY} & set(text.split())
        _, last = text.split(" then ")
        told = [
            verb
            for verb, ways in wordings.items()
            if any(f" {way} " in f" {last} " for way in ways)
        ]
        assert len(told) == 1, last
        assert FEELINGS[told[0]] == bool(label)


def test_paraphrases_share_their_words_and_differ_in_what_they_say():
    differences = set()
    for first, second, label in World(0).examples("paraphrase", "train", 1000):
        assert first != second
        one, two = (set(each.split()) & {*PEOPLE, *THINGS, *COLORS} for each in (first, second))
        assert (one == two) == bool(label)
        differences.add(len(one - two))
    assert differences == {0, 1, 2, 3}


def test_entailed_hypotheses_follow_and_contradictions_do_not():
    for premise, hypothesis, label in World(0).examples("entailment", "train", 1500):
        given, told = set(premise.split()), set(hypothesis.split())
        assert label or DENIED not in hypothesis
        if label == 2 and DENIED in hypothesis:
            assert told & {*THINGS, *COLORS} <= given
        elif label == 2 and told & {*COLORS}:
            assert not told & given & {*COLORS}
        if label == 0:
            assert told & {*COLORS} <= given
        if label == 0 and not told & {*GLAD, *SORRY} and "there" not in told:
            assert told & {*THINGS} <= given | {"rose"}


def test_answers_lie_where_they_are_said_to():
    kinds = {
        "what colour": COLORS,
        "which colour": COLORS,
        "where": PLACES,
        "in which": PLACES,
        "when": TIMES,
        "who": PEOPLE,
        "by whom": PEOPLE,
        "to whom": PEOPLE,
        "what was": THINGS,
    }
    for question, passage, answer, start in World(0).examples("span", "train", 800):
        assert passage[start : start + len(answer)] == answer
        assert passage.split().count(answer) == 1
        assert answer not in question.split()
        assert answer in next(
            words for opening, words in kinds.items() if question.startswith(opening)
        )


def test_which_of_two_things_is_asked_for_is_told_behind_both():
    things = {*THINGS} - {*PEOPLE}
    first = []
    for question, passage, answer, _ in World(0).examples("span", "train", 1000):
        before, _, last = passage.removesuffix(" .").rpartition(" . ")
        named = [word for word in before.split() if word in things]
        if not question.startswith("what was") or len(named) < 2 or answer not in named:
            continue
        assert [word for word in named if KIND_OF[word] in last.split()] == [answer]
        assert not {*question.split(), *last.split()} & things
        assert not {*question.split(), *before.split()} & {*KINDS}
        first.append(named[0] == answer)
    assert len(first) > 300
    assert 0.4 < sum(first) / len(first) < 0.6


def test_who_gave_and_who_got_are_told_neither_by_place_nor_by_name():
    first = {"gave": [], "got": []}
    for question, passage, answer, start in World(0).examples("span", "train", 4000):
        if question.startswith(("who gave", "who got")) and passage.split()[0] in PEOPLE:
            first[question.split()[1]].append(start == 0)
            assert {answer} < {*passage.split()} & {*PEOPLE}
    for at_the_start in first.values():
        assert 0.3 < sum(at_the_start) / len(at_the_start) < 0.7


def test_questions_are_answered_by_the_sentences_that_say_so():
    kinds = {
        "what colour": COLORS,
        "which colour": COLORS,
        "where": PLACES,
        "in which": PLACES,
        "who": PEOPLE,
        "by whom": PEOPLE,
        "when": TIMES,
    }
    for question, sentence, label in World(0).examples("questions", "train", 1000):
        kind = next(words for start, words in kinds.items() if question.startswith(start))
        asked = next(word for word in question.split() if word in THINGS)
        words = sentence.split()
        about = asked in words
        tells = any(
            word in kind and not (word == asked and words.count(word) == 1) for word in words
        )
        if label == 0:
            assert about
            assert tells


def test_tags_follow_from_what_a_word_names():
    kinds, first = Counter(), Counter()
    named = {word: set() for word in AMBIGUOUS}
    for words, tags in World(0).examples("tagging", "train", 3000):
        assert len(words) == len(tags)
        first[tags[0]] += 1
        for word, tag in zip(words, tags, strict=True):
            kinds[tag] += 1
            if word in AMBIGUOUS:
                named[word].add(tag)
            elif word in COLORS:
                assert tag == "O"
            elif word in PEOPLE:
                assert tag in ("B-AGENT", "B-RECEIVER")
            elif word in THINGS:
                assert tag == "B-THING", (words, tags)
    assert set(kinds) == {"B-AGENT", "B-RECEIVER", "B-PLACE", "B-THING", "B-TIME", "O"}
    # Of names that nothing stands before, a third receives.
    assert 0.5 < first["B-RECEIVER"] / first["B-AGENT"] < 1
    # A dictionary does not do: each of the four names two kinds of thing.
    assert all({"B-AGENT", "B-RECEIVER"} < tags and len(tags) == 3 for tags in named.values()), (
        named
    )
