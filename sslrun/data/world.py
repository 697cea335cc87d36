"""A small world told in English: text to pretrain on and tasks to learn, from a seeded generator, without a download.

People own things of a colour, are somewhere at some time, give, lose, find and want things, and feel accordingly. A
document tells a day of a few people; every sentence can be worded in several ways (active and passive, synonyms, the
attribute before or after its noun), some words are of two kinds (`rose`, `may`, `summer`), and what a pronoun or a
feeling refers to stands in another sentence. Labels follow from what happened, never from a word.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

PEOPLE = (
    "anna", "tom", "maria", "ben", "clara", "david", "emma", "felix", "grace", "henry", "ida", "jack", "kate", "leo",
    "mina", "noah", "olga", "paul", "rita", "sam", "tina", "victor", "wendy", "zoe", "rose", "summer", "paris",
    "may", "jordan", "sydney",
)  # fmt: skip
"""Six of them also name a thing, a place or a time."""
PLACES = (
    "garden", "kitchen", "park", "school", "market", "library", "forest", "harbour", "station", "museum", "paris",
    "sydney", "jordan", "church", "farm", "castle",
)  # fmt: skip
TOWNS = ("paris", "sydney", "jordan")
"""Places without an article."""
KINDS = {
    "toy": ("ball", "kite", "doll", "drum"),
    "fruit": ("apple", "pear", "plum", "cherry"),
    "animal": ("dog", "cat", "horse", "rabbit"),
    "flower": ("rose", "tulip", "lily", "daisy"),
    "garment": ("coat", "hat", "scarf", "shoe"),
    "tool": ("hammer", "saw", "ladder", "rope"),
}
THINGS = tuple(thing for things in KINDS.values() for thing in things)
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
TIMES = ("morning", "noon", "evening", "night", "summer", "winter", "may", "june")
"""The last four take `in`, without an article."""
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
"""What is asked about an event."""


def _at(place: str) -> str:
    return f"in {place}" if place in TOWNS else f"in the {place}"


def _in(time: str) -> str:
    return {"noon": "at noon", "night": "at night"}.get(time, f"in {time}" if time in TIMES[4:] else f"in the {time}")


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
    seen = draw.choice((f"a {event.colour} {event.thing}", f"a {event.thing} which was {event.colour}"))
    return draw.choice((f"there was {seen} {_at(event.where)} .", f"{_at(event.where)} was {seen} ."))


def _with(event: Event, draw: random.Random) -> str:
    return draw.choice((
        f"{event.who} was {_at(event.where)} with a {event.colour} {event.thing} .",
        f"a {event.colour} {event.thing} was {_at(event.where)} with {event.who} .",
    ))  # fmt: skip


def _one(kind: str) -> str:
    return f"an {kind}" if kind == "animal" else f"a {kind}"


def _kind(event: Event, draw: random.Random) -> str:
    """What kind of thing it is, or what is told of the thing told of the kind."""
    thing, kind = event.thing, KIND_OF[event.thing]
    one = _one(kind)
    return draw.choice((
        f"the {thing} is {one} .", f"a {thing} is a kind of {kind} .", f"the {kind} was {event.colour} .",
        f"there was {one} {_at(event.where)} .",
    ))  # fmt: skip


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
        where, when = draw.choice(PLACES), draw.choice(TIMES)
        people = draw.sample(PEOPLE, draw.choice((2, 2, 3)))
        lines = [draw.choice((
            f"{_in(when)} {' and '.join(people)} met {_at(where)} .", f"{' and '.join(people)} were {_at(where)} {_in(when)} .",
        ))]  # fmt: skip
        if draw.random() < 0.5:
            lines.append(_there(self.event(draw)._replace(where=where), draw))
        owned: dict[str, Event] = {}
        for who, thing, colour in zip(people, draw.sample(THINGS, 3), draw.sample(COLOURS, 3), strict=False):
            owned[who] = self.event(draw)._replace(who=who, thing=thing, colour=colour, where=where, when=when)
            lines.append(draw.choice((_owned, _with))(owned[who], draw))
            if draw.random() < 0.4:
                lines.append(_kind(owned[who], draw))
        for _ in range(draw.randint(1, 2)):
            who = draw.choice(people)
            whom = draw.choice([each for each in people if each != who])
            verb = draw.choice(VERBS)
            event = owned[who]._replace(verb=verb, whom=whom, feeling=FEELINGS[verb])
            lines.append(told(event, draw, setting=0.3))
            if draw.random() < 0.4:
                lines.append(told(event, draw, setting=0.2))  # the same, in other words
            if draw.random() < 0.6:
                lines.append(_feels(event, draw))
            if draw.random() < 0.4:
                asked = draw.choice(ASKED)
                lines += [_question(event, asked, draw), _answer(event, asked, draw)]
            if verb == "gave":
                owned[whom] = event._replace(who=whom)
                given = self.event(draw)
                owned[who] = event._replace(thing=given.thing, colour=given.colour)
                lines.append(_owned(owned[who], draw))
        if draw.random() < 0.5:
            last = owned[draw.choice(people)]
            lines += [
                draw.choice(
                    (f"what was {last.colour} ?", f"what did {last.who} have ?", f"who had the {last.thing} ?")
                ),
                _owned(last, draw),
            ]
        return lines

    # ------------------------------------------------------------ tasks

    def examples(self, task: str, split: str, count: int) -> list[tuple]:
        """`count` examples of a task, as `TASKS` describes them; splits share none but by chance."""
        draw = random.Random(f"{task} {split} {self.seed}")
        return [TASKS[task](self, draw) for _ in range(count)]


def _entailment(world: World, draw: random.Random) -> tuple[str, str, int]:
    """Premise, hypothesis, and 0 it follows, 1 it may be, 2 it can't be."""
    event = world.event(draw)
    premise = told(event, draw, setting=1.0)
    label = draw.randrange(3)
    if label == 0:
        hypotheses: tuple[str, ...] = (
            told(event, draw, setting=0.0),
            f"there was {_one(KIND_OF[event.thing])} {_at(event.where)} .",
            f"the {KIND_OF[event.thing]} was {event.colour} .",
            _feels(event, draw),
        )
    elif label == 1:
        hypotheses = (
            told(event._replace(thing="?", where=_other(PLACES, event.where, draw), verb=draw.choice(VERBS)), draw, 0.0)
            .replace("?", _other(THINGS, event.thing, draw)),  # of the thing alone: a person may be called the same
            f"there was {_one(_other(tuple(KINDS), KIND_OF[event.thing], draw))} {_at(event.where)} .",
            f"{draw.choice([each for each in PEOPLE if each not in event])} was {draw.choice(GLAD + SORRY)} .",
        )  # fmt: skip
    else:
        hypotheses = (
            told(event._replace(colour=_other(COLOURS, event.colour, draw)), draw, 0.0),
            f"the {KIND_OF[event.thing]} was {_other(COLOURS, event.colour, draw)} .",
            _feels(event._replace(feeling=not event.feeling), draw),
        )
    return premise, draw.choice(hypotheses), label


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
    """Two sentences, and 1 they say the same, 0 they don't: another acts, or it is of another thing or colour."""
    event = world.event(draw)
    same = draw.random() < 0.5
    other = event
    if not same:
        people = tuple(each for each in PEOPLE if each not in event)
        other = draw.choice((
            event._replace(who=draw.choice(people)), event._replace(colour=_other(COLOURS, event.colour, draw)),
            event._replace(thing=_other(THINGS, event.thing, draw)),
        ))  # fmt: skip
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

    The answer stands before what it is known by as often as after it.
    """
    told_of = [
        world.event(draw)._replace(thing=thing, colour=colour)
        for thing, colour in zip(draw.sample(THINGS, 3), draw.sample(COLOURS, 3), strict=True)
    ]
    lines = [_there(each, draw) for each in told_of]
    at = draw.randrange(3)
    asked = told_of[at]
    question, answer = draw.choice((
        (f"what was {asked.colour} ?", asked.thing), (_question(asked, "colour", draw), asked.colour)
    ))  # fmt: skip
    start = sum(len(line) + 1 for line in lines[:at]) + _word_at(lines[at], answer)
    return question, " ".join(lines), answer, start


def _word_at(line: str, word: str) -> int:
    """Where a whole word stands in a line."""
    return f" {line} ".index(f" {word} ")


def _tagging(world: World, draw: random.Random) -> tuple[list[str], list[str]]:
    """Words, and of each what it names (BIO): who acts, who receives, a thing, a place or a time; some words name two.

    Whether the first word acts or receives (`anna gave`, `anna got`) stands to its right.
    """
    event = world.event(draw)
    if draw.random() < 0.5:
        event = event._replace(
            who=draw.choice(PEOPLE[24:]), where=draw.choice(TOWNS), when=draw.choice(("summer", "may"))
        )
    line = told(event, draw, setting=0.8)
    words = line.split()
    named = {event.who: "AGENT", event.whom: "RECEIVER"}
    tags = []
    for before, word in zip(["", *words], words, strict=False):
        if word == event.thing and before in (event.colour, "the"):
            kind = "THING"
        elif word == event.where and before in ("in", "the"):
            kind = "PLACE"
        elif word == event.when and before in ("in", "at", "the"):
            kind = "TIME"
        else:
            kind = named.get(word, "")
        tags.append(f"B-{kind}" if kind else "O")
    return words, tags


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
