"""A small world told in English: text to pretrain on and tasks to learn, from a seeded generator, without a download.

People own things of a colour, are somewhere at some time, give, lose, find and want things, and feel accordingly. A
document tells of one or two of them; every sentence can be worded in several ways (active and passive, synonyms, the
attribute before or after its noun), some words are of two kinds (`rose`, `may`), and a reply opens with a word that says
how it relates to what was told before. Labels follow from what happened, never from a word.

There are few of each kind of name, that a small network may find in minutes which of two mentions go together; whether
it does differs from one pretraining to another. With thirty people and eight colours, fine-tuned networks of a million
weights and 3,000 steps always guessed at paraphrases. Who gives and who gets is what a left-to-right model can't know
when it comes to the first name: tags and answers ask for that.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

PEOPLE = ("anna", "tom", "maria", "ben", "rose", "may", "paris", "jordan")
DOUBLE = PEOPLE[4:]
"""People whose names also name a thing, a place or a time."""
PLACES = ("garden", "kitchen", "park", "school", "paris", "jordan")
TOWNS = ("paris", "jordan")
"""Places without an article."""
KINDS = {"toy": ("ball", "kite", "doll"), "animal": ("dog", "cat", "horse"), "flower": ("rose", "tulip", "lily")}
THINGS = tuple(thing for things in KINDS.values() for thing in things)
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
COLOURS = ("red", "blue", "green", "black")
TIMES = ("morning", "evening", "summer", "may")
SEASONS = TIMES[2:]
"""Times without an article."""
GLAD = ("happy", "glad", "cheerful", "delighted")
SORRY = ("sad", "unhappy", "gloomy", "miserable")


class Event(NamedTuple):
    """Something that happened."""

    verb: str
    """gave, lost, found, wanted, broke, cleaned, owned."""
    who: str
    thing: str
    colour: str
    whom: str
    """The receiver of `gave`; elsewhere whoever else is told of."""
    where: str
    when: str
    feeling: bool
    """Whether `who` (of gave: `whom`) is glad of it."""


FEELINGS = {"gave": True, "lost": False, "found": True, "broke": False, "cleaned": True, "missed": False}
VERBS = tuple(FEELINGS)
ASKED = ("colour", "where", "who", "when")
"""What is asked about an event: the fields of its answers."""


def _at(place: str) -> str:
    return f"in {place}" if place in TOWNS else f"in the {place}"


def _in(time: str) -> str:
    return f"in {time}" if time in SEASONS else f"in the {time}"


def _noun(event: Event, draw: random.Random, article: str = "the") -> str:
    """The thing with its colour, before it or after it."""
    if draw.random() < 0.6:
        return f"{article} {event.colour} {event.thing}"
    return f"{article} {event.thing} which was {event.colour}"


def told(event: Event, draw: random.Random, setting: float = 0.5) -> str:
    """One wording of an event; place and time are told with the probability `setting` each."""
    noun = _noun(event, draw)
    who, whom = event.who, event.whom
    wordings: dict[str, tuple[str, ...]] = {
        "gave": (
            f"{who} gave {noun} to {whom}", f"{whom} got {noun} from {who}", f"{noun} was given to {whom} by {who}",
            f"{who} handed {noun} to {whom}", f"{whom} received {noun} from {who}",
        ),
        "lost": (f"{who} lost {noun}", f"{noun} was lost by {who}", f"{who} could not keep {noun}"),
        "found": (f"{who} found {noun}", f"{noun} was found by {who}", f"{who} discovered {noun}"),
        "broke": (f"{who} broke {noun}", f"{noun} was broken by {who}", f"{who} damaged {noun}"),
        "cleaned": (f"{who} cleaned {noun}", f"{noun} was cleaned by {who}", f"{who} washed {noun}"),
        "missed": (f"{who} looked for {noun} in vain", f"{who} did not find {noun}", f"{noun} was missed by {who}"),
    }  # fmt: skip
    parts = [draw.choice(wordings[event.verb])]
    if draw.random() < setting:
        parts.append(_at(event.where))
    if draw.random() < setting:
        parts = [*parts, _in(event.when)] if draw.random() < 0.5 else [_in(event.when), *parts]
    return " ".join(parts) + " ."


def _feels(event: Event, draw: random.Random) -> str:
    """How whoever it concerns feels after it."""
    who = event.whom if event.verb == "gave" else event.who
    word = draw.choice(GLAD if event.feeling else SORRY)
    return draw.choice((f"{who} was {word} .", f"this made {who} {word} .", f"so {who} felt {word} ."))


def _owned(event: Event, draw: random.Random) -> str:
    return draw.choice((
        f"{event.who} had a {event.colour} {event.thing} .",
        f"the {event.thing} of {event.who} was {event.colour} .",
        f"a {event.colour} {event.thing} belonged to {event.who} .",
    ))  # fmt: skip


def _there(event: Event, draw: random.Random) -> str:
    seen = _noun(event, draw, "a")
    return draw.choice((f"there was {seen} {_at(event.where)} .", f"{_at(event.where)} was {seen} ."))


def _with(event: Event, draw: random.Random) -> str:
    return draw.choice((
        f"{event.who} was {_at(event.where)} with a {event.colour} {event.thing} .",
        f"a {event.colour} {event.thing} was {_at(event.where)} with {event.who} .",
    ))  # fmt: skip


def _one(kind: str) -> str:
    return f"an {kind}" if kind == "animal" else f"a {kind}"


@dataclass(frozen=True)
class World:
    """Draws of the world by a seed: the same seed, the same text."""

    seed: int

    def documents(self, count: int) -> list[list[str]]:
        """Documents of sentences: each a day of a few people."""
        draw = random.Random(f"documents {self.seed}")
        return [self._day(draw) for _ in range(count)]

    def event(self, draw: random.Random, verb: str | None = None) -> Event:
        verb = verb or draw.choice(VERBS)
        who, whom = draw.sample(PEOPLE, 2)
        thing = draw.choice(THINGS)
        return Event(
            verb, who, thing, draw.choice(COLOURS), whom, draw.choice(PLACES), draw.choice(TIMES), FEELINGS[verb]
        )

    def _day(self, draw: random.Random) -> list[str]:
        """Who was where, what was there or whose it was, and two rounds of something told and replied to, or asked and
        answered. Two in three are of one thing and one person: which mentions go together is learned from these, and
        then what goes with which from the others."""
        where, when = draw.choice(PLACES), draw.choice(TIMES)
        count = draw.choice((1, 1, 2))
        people = draw.sample(PEOPLE, 2)
        events = [
            self.event(draw)._replace(who=who, whom=whom, where=where, when=when, thing=thing, colour=colour)
            for who, whom, thing, colour in zip(
                people[:count], people[::-1], draw.sample(THINGS, count), draw.sample(COLOURS, count), strict=False
            )
        ]
        lines = []
        if draw.random() < 0.4:
            were = " and ".join(people[:count]) + (" was" if count == 1 else " were")
            lines.append(draw.choice((f"{_in(when)} {were} {_at(where)} .", f"{were} {_at(where)} {_in(when)} .")))
        if count > 1 or draw.random() < 0.3:
            lines += [draw.choice((_owned, _with, _there))(event, draw) for event in events]
        for _ in range(2):
            event = draw.choice(events)
            if draw.random() < 0.6:
                lines += [told(event, draw, setting=0.3), _reply(event, draw)]
            else:
                asked = draw.choice(ASKED)
                lines += [_question(event, asked, draw), _answer(event, asked, draw)]
        return lines

    # ------------------------------------------------------------ tasks

    def examples(self, task: str, split: str, count: int) -> list[tuple]:
        """`count` examples of a task, as `TASKS` describes them. Splits share none: what an example says decides which
        it may be in (of eight, one is for validation and one for test)."""
        draw = random.Random(f"{task} {split} {self.seed}")
        eighths = {"val": (0,), "test": (1,)}.get(split, range(2, 8))
        found: list[tuple] = []
        while len(found) < count:
            example = TASKS[task](self, draw)
            if zlib.crc32(repr(example).encode()) % 8 in eighths:
                found.append(example)
        return found


def _entailment(world: World, draw: random.Random) -> tuple[str, str, int]:
    """Premise, hypothesis, and 0 it follows, 1 it may be, 2 it can't be."""
    event = world.event(draw)
    label = draw.randrange(3)
    return told(event, draw, setting=0.3), _hypothesis(event, label, draw), label


def _hypothesis(event: Event, label: int, draw: random.Random) -> str:
    """What follows from an event (0), may be besides (1), or can't be if it was as told (2): in one of three it tells how
    somebody felt, else that something happened, or that it did not."""
    other = _unlike(event, draw)
    if draw.random() < 1 / 3:
        if label == 1:
            return _feels(other._replace(whom=other.who, feeling=draw.random() < 0.5), draw)
        return _feels(event._replace(feeling=event.feeling == (label == 0)), draw)
    said = told(other if label == 1 else event, draw, 0.0)
    return f"{DENIED} {said}" if label == 2 or (label == 1 and draw.random() < 0.5) else said


DENIED = "it is not so that"
REPLIES = ("yes ,", "also ,", "no ,")
"""What a reply opens with that tells the same, something else, or the contrary."""


def _reply(event: Event, draw: random.Random) -> str:
    """What is said to the telling of an event. Its first word says how the rest relates to what was told.

    So one who sees both sides can learn to relate two sentences by guessing that word; one who reads left to right
    has to guess it before the second sentence is there.
    """
    label = draw.randrange(3)
    return f"{REPLIES[label]} {_replied(event, label, draw)}"


def _replied(event: Event, label: int, draw: random.Random) -> str:
    """As `_hypothesis`, told in more ways: also of the kind of the thing, and of one thing of another colour."""
    kind = KIND_OF[event.thing]
    if label == 0:
        hypotheses: tuple[str, ...] = (
            told(event, draw, 0.0),
            f"there was {_one(kind)} {_at(event.where)} .",
            f"the {kind} was {event.colour} .",
            _feels(event, draw),
        )
    elif label == 1:
        # Of the thing alone: a person may be called the same.
        other = told(event._replace(thing="?"), draw, 0.0).replace("?", _other(THINGS, event.thing, draw))
        hypotheses = (
            other,
            f"{DENIED} {other}",
            f"there was {_one(_other(tuple(KINDS), kind, draw))} {_at(event.where)} .",
            f"{_stranger(event, draw)} was {draw.choice(GLAD + SORRY)} .",
        )
    else:
        hypotheses = (
            f"{DENIED} {told(event, draw, 0.0)}",
            told(event._replace(colour=_other(COLOURS, event.colour, draw)), draw, 0.0),
            f"the {kind} was {_other(COLOURS, event.colour, draw)} .",
            _feels(event._replace(feeling=not event.feeling), draw),
        )
    return draw.choice(hypotheses)


def _questions(world: World, draw: random.Random) -> tuple[str, str, int]:
    """Question, sentence, and 0 the sentence answers it, 1 it does not."""
    event = world.event(draw)
    asked = draw.choice(ASKED)
    question = _question(event, asked, draw)
    answers = draw.random() < 0.5
    if answers:
        answer = _answer(event, asked, draw)
    elif draw.random() < 0.5:  # of the same event something else
        other = draw.choice([each for each in ASKED if each != asked])
        answer = _answer(event, other, draw)
    else:  # the same of another's
        changed = event._replace(thing=_other(THINGS, event.thing, draw), who=_other(PEOPLE, event.who, draw))
        answer = _answer(changed, asked, draw)
    return question, answer, int(not answers)


def _question(event: Event, asked: str, draw: random.Random) -> str:
    wordings = {
        "colour": (f"what colour was the {event.thing} ?", f"which colour did the {event.thing} have ?"),
        "where": (f"where was the {event.thing} ?", f"in which place was the {event.thing} ?"),
        "who": (f"who {event.verb} the {event.thing} ?", f"by whom was the {event.thing} {_passive(event.verb)} ?"),
        "when": (f"when was the {event.thing} {_passive(event.verb)} ?",),
    }
    return draw.choice(wordings[asked])


def _answer(event: Event, asked: str, draw: random.Random) -> str:
    """A sentence that tells what is asked for and none of the other three."""
    thing, done = event.thing, _passive(event.verb)
    wordings = {
        "colour": (f"the {thing} was {event.colour} .", f"there was a {event.colour} {thing} ."),
        "where": (f"the {thing} was {_at(event.where)} .", f"{_at(event.where)} was the {thing} ."),
        "who": (f"{event.who} {event.verb} the {thing} .", f"the {thing} was {done} by {event.who} ."),
        "when": (f"{_in(event.when)} the {thing} was {done} .", f"the {thing} was {done} {_in(event.when)} ."),
    }
    return draw.choice(wordings[asked])


def _passive(verb: str) -> str:
    return {"gave": "given", "broke": "broken"}.get(verb, verb)


def _paraphrase(world: World, draw: random.Random) -> tuple[str, str, int]:
    """Two sentences, and 1 they say the same, 0 they don't: who acts, the thing and its colour are others, some or all."""
    event = world.event(draw)
    same = draw.random() < 0.5
    other = event if same else _another(event, draw)
    first, second = told(event, draw, 0.0), told(other, draw, 0.0)
    while first == second:
        second = told(other, draw, 0.0)
    return first, second, int(same)


def _sentiment(world: World, draw: random.Random) -> tuple[str, int]:
    """Two sentences, and 1 whom the last concerns is glad, 0 sorry: no word of feeling is told."""
    event, before = world.event(draw), world.event(draw)
    return f"{told(before, draw, 0.0)} then {told(event, draw, 0.5)}", int(event.feeling)


def _span(world: World, draw: random.Random) -> tuple[str, str, str, int]:
    """Question, passage, answer, and the character of the passage where the answer starts.

    Half of the passages name two things before they tell to which of the kinds something happened: nobody who reads left
    to right knows at either whether it is the answer.
    """
    while True:
        question, passage, answer = (_of_two_things if draw.random() < 0.5 else _of_one_event)(world, draw)
        if passage.split().count(answer) == 1:  # not: rose lost the rose
            return question, passage, answer, f" {passage} ".index(f" {answer} ")


def _of_one_event(world: World, draw: random.Random) -> tuple[str, str, str]:
    """Question, passage and answer. In most passages something is given: which of two people gave it and which got it
    stands to the right of the first of them (`anna gave`, `anna got`)."""
    event = _often_given(world, draw)
    asked = "who" if draw.random() < 0.5 else draw.choice(ASKED)
    question, passage, answer = _question(event, asked, draw), told(event, draw, 1.0), getattr(event, asked)
    if asked == "who" and event.verb == "gave" and draw.random() < 0.5:
        thing, answer = event.thing, event.whom
        question = draw.choice((f"who got the {thing} ?", f"to whom was the {thing} given ?"))
    return question, passage, answer


def _of_two_things(world: World, draw: random.Random) -> tuple[str, str, str]:
    """Question, passage and answer, which is one of two things of different kinds."""
    happened = _passive(draw.choice(VERBS))
    events = [world.event(draw)._replace(thing=draw.choice(KINDS[kind])) for kind in draw.sample(tuple(KINDS), 2)]
    event = draw.choice(events)
    last = [f"the {KIND_OF[event.thing]} was {happened}"]
    if draw.random() < 0.5:
        last.append(f"by {event.who}")
    if draw.random() < 0.5:
        last.append(_at(event.where))
    before = draw.choice((_owned, _with, _there))
    lines = [*(before(each, draw) for each in events), " ".join(last) + " ."]
    return f"what was {happened} ?", " ".join(lines), event.thing


def _tagging(world: World, draw: random.Random) -> tuple[list[str], list[str]]:
    """Words, and of each what it names (BIO): who acts, who receives, a thing, a place or a time; some words name two.

    In most sentences something is given: whether the first word gave it or got it stands to its right.
    """
    event = _often_given(world, draw)
    if draw.random() < 0.5:
        event = event._replace(who=draw.choice(DOUBLE), where=draw.choice(TOWNS), when=draw.choice(SEASONS))
    line = told(event, draw, setting=0.8)
    words = line.split()
    named = {event.who: "AGENT", event.whom: "RECEIVER"}
    tags = []
    for before, word in zip(["", *words], words, strict=False):
        if word == event.thing and before in (event.colour, "the"):
            kind = "THING"
        elif word == event.where and before in ("in", "the"):
            kind = "PLACE"
        elif word == event.when and before in ("in", "the"):
            kind = "TIME"
        else:
            kind = named.get(word, "")
        tags.append(f"B-{kind}" if kind else "O")
    return words, tags


def _often_given(world: World, draw: random.Random) -> Event:
    """An event; in every other draw one of giving, which has two people, else any."""
    return world.event(draw, "gave" if draw.random() < 0.5 else None)


def _unlike(event: Event, draw: random.Random) -> Event:
    """An event of the same verb in which who acts, the thing and its colour are others."""
    return event._replace(
        who=_stranger(event, draw), thing=_other(THINGS, event.thing, draw), colour=_other(COLOURS, event.colour, draw)
    )


def _another(event: Event, draw: random.Random) -> Event:
    """As `_unlike`, but each of the three is another with even chances, one at least."""
    unlike = _unlike(event, draw)
    changed: list[str] = []
    while not changed:
        changed = [each for each in ("who", "thing", "colour") if draw.random() < 0.5]
    return event._replace(**{each: getattr(unlike, each) for each in changed})


def _stranger(event: Event, draw: random.Random) -> str:
    """Someone after whom nothing in the event is called."""
    return draw.choice([each for each in PEOPLE if each not in event])


def _other(choices: tuple[str, ...], one: str, draw: random.Random) -> str:
    return draw.choice([each for each in choices if each != one])


TASKS: dict[str, Callable[[World, random.Random], tuple]] = {
    "entailment": _entailment,
    "questions": _questions,
    "paraphrase": _paraphrase,
    "sentiment": _sentiment,
    "span": _span,
    "tagging": _tagging,
}
"""Task -> what draws one example of it."""
