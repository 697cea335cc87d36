"""A small world in English: text to pretrain on and tasks, from a seeded generator, no download.

People own things of some color, are somewhere at some time, give, lose, find and want things, and
have feelings about it. A document describes one or two such events. Every sentence has several
wordings (active and passive, synonyms, the attribute before or after its noun), some words have two
meanings (`rose`, `may`), and a reply opens with a word that says how it relates to the sentence
before. Labels follow from the event, never from a single word.

There are few names of each kind, so that a small network may learn in minutes which of two mentions
belong together; whether it does varies between pretraining runs. With thirty people and eight
colors, fine-tuned networks of a million weights stayed at chance on paraphrases after 3,000 steps.
A left-to-right model cannot know at the first name whether it is the giver or the receiver: tags
and answers depend on that.

The text spells `colour`; it is data, and a change would change every result.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

PEOPLE = ("anna", "tom", "maria", "ben", "rose", "may", "paris", "jordan")
AMBIGUOUS = PEOPLE[4:]
"""People whose names also name a thing, a place or a time."""
PLACES = ("garden", "kitchen", "park", "school", "paris", "jordan")
TOWNS = ("paris", "jordan")
"""Places without an article."""
KINDS = {
    "toy": ("ball", "kite", "doll"),
    "animal": ("dog", "cat", "horse"),
    "flower": ("rose", "tulip", "lily"),
}
THINGS = tuple(thing for things in KINDS.values() for thing in things)
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
COLORS = ("red", "blue", "green", "black")
TIMES = ("morning", "evening", "summer", "may")
SEASONS = TIMES[2:]
"""Times without an article."""
GLAD = ("happy", "glad", "cheerful", "delighted")
SORRY = ("sad", "unhappy", "gloomy", "miserable")


class Event(NamedTuple):
    """Something that happened."""

    verb: str
    """One of `VERBS`."""
    who: str
    """The actor."""
    thing: str
    color: str
    receiver: str
    """The receiver of `gave`; for other verbs the second person of the document."""
    where: str
    when: str
    is_glad: bool
    """Whether `who` (for gave: the receiver) is glad."""


FEELINGS = {
    "gave": True,
    "lost": False,
    "found": True,
    "broke": False,
    "cleaned": True,
    "missed": False,
}
"""Verb -> whether the person concerned is glad."""
VERBS = tuple(FEELINGS)
QUESTION_FIELDS = ("color", "where", "who", "when")
"""Fields of an event that a question may ask for."""


def _at(place: str) -> str:
    return f"in {place}" if place in TOWNS else f"in the {place}"


def _in(time: str) -> str:
    return f"in {time}" if time in SEASONS else f"in the {time}"


def _noun(event: Event, draw: random.Random, article: str = "the") -> str:
    """Name the thing, with its color before or after it."""
    if draw.random() < 0.6:
        return f"{article} {event.color} {event.thing}"
    return f"{article} {event.thing} which was {event.color}"


def describe_event(event: Event, draw: random.Random, setting: float = 0.5) -> str:
    """Draw a wording of an event; it names place and time with probability `setting` each."""
    noun = _noun(event, draw)
    who, receiver = event.who, event.receiver
    wordings: dict[str, tuple[str, ...]] = {
        "gave": (
            f"{who} gave {noun} to {receiver}",
            f"{receiver} got {noun} from {who}",
            f"{noun} was given to {receiver} by {who}",
            f"{who} handed {noun} to {receiver}",
            f"{receiver} received {noun} from {who}",
        ),
        "lost": (
            f"{who} lost {noun}",
            f"{noun} was lost by {who}",
            f"{who} could not keep {noun}",
        ),
        "found": (
            f"{who} found {noun}",
            f"{noun} was found by {who}",
            f"{who} discovered {noun}",
        ),
        "broke": (
            f"{who} broke {noun}",
            f"{noun} was broken by {who}",
            f"{who} damaged {noun}",
        ),
        "cleaned": (
            f"{who} cleaned {noun}",
            f"{noun} was cleaned by {who}",
            f"{who} washed {noun}",
        ),
        "missed": (
            f"{who} looked for {noun} in vain",
            f"{who} did not find {noun}",
            f"{noun} was missed by {who}",
        ),
    }
    parts = [draw.choice(wordings[event.verb])]
    if draw.random() < setting:
        parts.append(_at(event.where))
    if draw.random() < setting:
        time = _in(event.when)
        parts = [*parts, time] if draw.random() < 0.5 else [time, *parts]
    return " ".join(parts) + " ."


def _feels(event: Event, draw: random.Random) -> str:
    """Say how the person concerned feels after an event."""
    person = event.receiver if event.verb == "gave" else event.who
    word = draw.choice(GLAD if event.is_glad else SORRY)
    wordings = (
        f"{person} was {word} .",
        f"this made {person} {word} .",
        f"so {person} felt {word} .",
    )
    return draw.choice(wordings)


def _owned(event: Event, draw: random.Random) -> str:
    """Say that the actor owned the thing."""
    wordings = (
        f"{event.who} had a {event.color} {event.thing} .",
        f"the {event.thing} of {event.who} was {event.color} .",
        f"a {event.color} {event.thing} belonged to {event.who} .",
    )
    return draw.choice(wordings)


def _there(event: Event, draw: random.Random) -> str:
    """Say that the thing was at the place."""
    noun, place = _noun(event, draw, "a"), _at(event.where)
    return draw.choice((f"there was {noun} {place} .", f"{place} was {noun} ."))


def _with(event: Event, draw: random.Random) -> str:
    """Say that the actor was at the place with the thing."""
    wordings = (
        f"{event.who} was {_at(event.where)} with a {event.color} {event.thing} .",
        f"a {event.color} {event.thing} was {_at(event.where)} with {event.who} .",
    )
    return draw.choice(wordings)


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind == "animal" else f"a {kind}"


@dataclass(frozen=True)
class World:
    """A generator of text. The same seed gives the same text."""

    seed: int

    def documents(self, count: int) -> list[list[str]]:
        """Draw documents of sentences; each describes a day of one or two people."""
        draw = random.Random(f"documents {self.seed}")
        return [self._day(draw) for _ in range(count)]

    def event(self, draw: random.Random, verb: str | None = None) -> Event:
        """Draw an event, of the given verb or of any."""
        verb = verb or draw.choice(VERBS)
        who, receiver = draw.sample(PEOPLE, 2)
        thing = draw.choice(THINGS)
        color = draw.choice(COLORS)
        where, when = draw.choice(PLACES), draw.choice(TIMES)
        return Event(verb, who, thing, color, receiver, where, when, FEELINGS[verb])

    def _day(self, draw: random.Random) -> list[str]:
        """Draw a document.

        It may say who was where and what was there or who owned it. Two rounds follow, each an
        event with a reply, or a question with an answer. Two in three documents have one thing and
        one person: from these a network learns which mentions belong together, and from the others
        which thing belongs to which person.
        """
        where, when = draw.choice(PLACES), draw.choice(TIMES)
        count = draw.choice((1, 1, 2))
        people = draw.sample(PEOPLE, 2)
        things, colors = draw.sample(THINGS, count), draw.sample(COLORS, count)
        events = [
            self.event(draw)._replace(
                who=who, receiver=receiver, where=where, when=when, thing=thing, color=color
            )
            for who, receiver, thing, color in zip(
                people[:count], people[::-1], things, colors, strict=False
            )
        ]
        lines = []
        if draw.random() < 0.4:
            were = " and ".join(people[:count]) + (" was" if count == 1 else " were")
            time, place = _in(when), _at(where)
            lines.append(draw.choice((f"{time} {were} {place} .", f"{were} {place} {time} .")))
        if count > 1 or draw.random() < 0.3:
            lines += [draw.choice((_owned, _with, _there))(event, draw) for event in events]
        for _ in range(2):
            event = draw.choice(events)
            if draw.random() < 0.6:
                lines += [describe_event(event, draw, setting=0.3), _reply(event, draw)]
            else:
                field = draw.choice(QUESTION_FIELDS)
                lines += [_question(event, field, draw), _answer(event, field, draw)]
        return lines

    # ------------------------------------------------------------ tasks

    def examples(self, task: str, split: str, count: int) -> list[tuple]:
        """Draw `count` examples of a task; see `TASKS` for what an example holds.

        Splits share no example: a hash of its content decides its split. Of eight values, one is
        for validation, one for test and six for training.
        """
        draw = random.Random(f"{task} {split} {self.seed}")
        eighths = {"val": (0,), "test": (1,)}.get(split, range(2, 8))
        examples: list[tuple] = []
        while len(examples) < count:
            example = TASKS[task](self, draw)
            if zlib.crc32(repr(example).encode()) % 8 in eighths:
                examples.append(example)
        return examples


def _entailment(world: World, draw: random.Random) -> tuple[str, str, int]:
    """Draw a premise, a hypothesis, and 0 if it follows, 1 if it may be true, 2 if it is false."""
    event = world.event(draw)
    label = draw.randrange(3)
    return describe_event(event, draw, setting=0.3), _hypothesis(event, label, draw), label


def _hypothesis(event: Event, label: int, draw: random.Random) -> str:
    """Draw a statement that follows from an event (0), may also be true (1), or is false (2).

    One in three says how somebody felt; the others say that something happened or did not.
    """
    other = _unlike(event, draw)
    if draw.random() < 1 / 3:
        if label == 1:
            return _feels(other._replace(receiver=other.who, is_glad=draw.random() < 0.5), draw)
        return _feels(event._replace(is_glad=event.is_glad == (label == 0)), draw)
    statement = describe_event(other if label == 1 else event, draw, 0.0)
    is_denied = label == 2 or (label == 1 and draw.random() < 0.5)
    return f"{DENIED} {statement}" if is_denied else statement


DENIED = "it is not so that"
REPLIES = ("yes ,", "also ,", "no ,")
"""Openings of a reply that says the same, something else, or the contrary."""


def _reply(event: Event, draw: random.Random) -> str:
    """Draw a reply to the description of an event. Its first word says how the rest relates to it.

    A model that reads both sides can learn to relate two sentences by predicting that word. A
    left-to-right model has to predict it before it reads the second sentence.
    """
    label = draw.randrange(3)
    return f"{REPLIES[label]} {_replied(event, label, draw)}"


def _replied(event: Event, label: int, draw: random.Random) -> str:
    """Draw the rest of a reply: like `_hypothesis`, but also about the kind or color of the thing.

    `label`: 0 for the same, 1 for something else, 2 for the contrary.
    """
    if label == 0:
        statements = _same_statements(event, draw)
    elif label == 1:
        statements = _other_statements(event, draw)
    else:
        statements = _contrary_statements(event, draw)
    return draw.choice(statements)


def _same_statements(event: Event, draw: random.Random) -> tuple[str, ...]:
    kind = KIND_OF[event.thing]
    return (
        describe_event(event, draw, 0.0),
        f"there was {_with_article(kind)} {_at(event.where)} .",
        f"the {kind} was {event.color} .",
        _feels(event, draw),
    )


def _other_statements(event: Event, draw: random.Random) -> tuple[str, ...]:
    # Replace only the thing, by way of "?": a person may have the same name.
    statement = describe_event(event._replace(thing="?"), draw, 0.0)
    statement = statement.replace("?", _other(THINGS, event.thing, draw))
    kind = _other(tuple(KINDS), KIND_OF[event.thing], draw)
    return (
        statement,
        f"{DENIED} {statement}",
        f"there was {_with_article(kind)} {_at(event.where)} .",
        f"{_stranger(event, draw)} was {draw.choice(GLAD + SORRY)} .",
    )


def _contrary_statements(event: Event, draw: random.Random) -> tuple[str, ...]:
    kind = KIND_OF[event.thing]
    return (
        f"{DENIED} {describe_event(event, draw, 0.0)}",
        describe_event(event._replace(color=_other(COLORS, event.color, draw)), draw, 0.0),
        f"the {kind} was {_other(COLORS, event.color, draw)} .",
        _feels(event._replace(is_glad=not event.is_glad), draw),
    )


def _questions(world: World, draw: random.Random) -> tuple[str, str, int]:
    """Draw a question, a sentence, and 0 if the sentence answers it, else 1."""
    event = world.event(draw)
    field = draw.choice(QUESTION_FIELDS)
    question = _question(event, field, draw)
    is_answer = draw.random() < 0.5
    if is_answer:
        sentence = _answer(event, field, draw)
    elif draw.random() < 0.5:  # another field of the same event
        sentence = _answer(event, _other(QUESTION_FIELDS, field, draw), draw)
    else:  # the same field of another event
        thing = _other(THINGS, event.thing, draw)
        who = _other(PEOPLE, event.who, draw)
        sentence = _answer(event._replace(thing=thing, who=who), field, draw)
    return question, sentence, int(not is_answer)


def _question(event: Event, field: str, draw: random.Random) -> str:
    """Draw a question that asks for a field of an event."""
    thing, done = event.thing, _passive(event.verb)
    wordings = {
        "color": (f"what colour was the {thing} ?", f"which colour did the {thing} have ?"),
        "where": (f"where was the {thing} ?", f"in which place was the {thing} ?"),
        "who": (f"who {event.verb} the {thing} ?", f"by whom was the {thing} {done} ?"),
        "when": (f"when was the {thing} {done} ?",),
    }
    return draw.choice(wordings[field])


def _answer(event: Event, field: str, draw: random.Random) -> str:
    """Draw a sentence that states one field of an event and none of the other three."""
    thing, done = event.thing, _passive(event.verb)
    place, time = _at(event.where), _in(event.when)
    wordings = {
        "color": (f"the {thing} was {event.color} .", f"there was a {event.color} {thing} ."),
        "where": (f"the {thing} was {place} .", f"{place} was the {thing} ."),
        "who": (
            f"{event.who} {event.verb} the {thing} .",
            f"the {thing} was {done} by {event.who} .",
        ),
        "when": (f"{time} the {thing} was {done} .", f"the {thing} was {done} {time} ."),
    }
    return draw.choice(wordings[field])


def _passive(verb: str) -> str:
    return {"gave": "given", "broke": "broken"}.get(verb, verb)


def _paraphrase(world: World, draw: random.Random) -> tuple[str, str, int]:
    """Draw two sentences, and 1 if they say the same, else 0.

    If not, one or more of the actor, the thing and its color differ.
    """
    event = world.event(draw)
    is_same = draw.random() < 0.5
    other = event if is_same else _another(event, draw)
    first, second = describe_event(event, draw, 0.0), describe_event(other, draw, 0.0)
    while first == second:
        second = describe_event(other, draw, 0.0)
    return first, second, int(is_same)


def _sentiment(world: World, draw: random.Random) -> tuple[str, int]:
    """Draw a text of two events, and 1 if the person that the last concerns is glad, else 0.

    No word of the text names a feeling.
    """
    event, before = world.event(draw), world.event(draw)
    text = f"{describe_event(before, draw, 0.0)} then {describe_event(event, draw, 0.5)}"
    return text, int(event.is_glad)


def _span(world: World, draw: random.Random) -> tuple[str, str, str, int]:
    """Draw a question, a passage, the answer, and the character where the answer starts.

    Half of the passages name two things before they say to which kind of thing something happened:
    a left-to-right model cannot know at either thing whether it is the answer.
    """
    while True:
        draw_parts = _span_of_two_things if draw.random() < 0.5 else _span_of_one_event
        question, passage, answer = draw_parts(world, draw)
        if passage.split().count(answer) == 1:  # skip passages such as: rose lost the rose
            return question, passage, answer, f" {passage} ".index(f" {answer} ")


def _span_of_one_event(world: World, draw: random.Random) -> tuple[str, str, str]:
    """Draw a question, a passage and the answer.

    In most passages something is given. Who gave it and who got it is decided by a word to the
    right of the first name (`anna gave`, `anna got`).
    """
    event = _often_given(world, draw)
    field = "who" if draw.random() < 0.5 else draw.choice(QUESTION_FIELDS)
    question = _question(event, field, draw)
    passage, answer = describe_event(event, draw, 1.0), getattr(event, field)
    if field == "who" and event.verb == "gave" and draw.random() < 0.5:
        thing, answer = event.thing, event.receiver
        question = draw.choice((f"who got the {thing} ?", f"to whom was the {thing} given ?"))
    return question, passage, answer


def _span_of_two_things(world: World, draw: random.Random) -> tuple[str, str, str]:
    """Draw a question, a passage, and the answer, one of two things of different kinds."""
    verb = _passive(draw.choice(VERBS))
    events = []
    for kind in draw.sample(tuple(KINDS), 2):
        events.append(world.event(draw)._replace(thing=draw.choice(KINDS[kind])))
    event = draw.choice(events)
    last = [f"the {KIND_OF[event.thing]} was {verb}"]
    if draw.random() < 0.5:
        last.append(f"by {event.who}")
    if draw.random() < 0.5:
        last.append(_at(event.where))
    introduce = draw.choice((_owned, _with, _there))
    lines = [*(introduce(other, draw) for other in events), " ".join(last) + " ."]
    return f"what was {verb} ?", " ".join(lines), event.thing


def _tagging(world: World, draw: random.Random) -> tuple[list[str], list[str]]:
    """Draw words and their BIO tags: AGENT, RECEIVER, THING, PLACE or TIME.

    Some words have two meanings. In most sentences something is given: a word to the right of the
    first name says whether that person gave it or got it.
    """
    event = _often_given(world, draw)
    if draw.random() < 0.5:
        who, town = draw.choice(AMBIGUOUS), draw.choice(TOWNS)
        event = event._replace(who=who, where=town, when=draw.choice(SEASONS))
    words = describe_event(event, draw, setting=0.8).split()
    tags = [_tag(event, before, word) for before, word in zip(["", *words], words, strict=False)]
    return words, tags


def _tag(event: Event, before: str, word: str) -> str:
    """Return the tag of `word` in a description of `event`; `before` is the word to its left."""
    if word == event.thing and before in (event.color, "the"):
        return "B-THING"
    if word == event.where and before in ("in", "the"):
        return "B-PLACE"
    if word == event.when and before in ("in", "the"):
        return "B-TIME"
    if word == event.receiver:
        return "B-RECEIVER"
    return "B-AGENT" if word == event.who else "O"


def _translation(world: World, draw: random.Random) -> tuple[str, str]:
    """Draw a sentence and its translation into a grammar whose verb is the last word.

    The source is any wording of an event, active or passive, with place and time or without. It
    determines the translation, which has one verb for all wordings and a fixed order: actor, time,
    place, receiver, thing, verb. For example:

        in may the red ball was given to anna by tom in the park .
        tom in may in the park to anna the red ball gave .
    """
    event, is_set = world.event(draw), draw.random() < 0.5
    parts = [event.who]
    if is_set:
        parts += [_in(event.when), _at(event.where)]
    if event.verb == "gave":
        parts.append(f"to {event.receiver}")
    parts += [f"the {event.color} {event.thing}", event.verb]
    return describe_event(event, draw, float(is_set)), " ".join(parts) + " ."


def _often_given(world: World, draw: random.Random) -> Event:
    """Draw an event: in half of the draws of gave, which has two people, else of any verb."""
    return world.event(draw, "gave" if draw.random() < 0.5 else None)


def _unlike(event: Event, draw: random.Random) -> Event:
    """Draw an event of the same verb with another actor, thing and color."""
    return event._replace(
        who=_stranger(event, draw),
        thing=_other(THINGS, event.thing, draw),
        color=_other(COLORS, event.color, draw),
    )


def _another(event: Event, draw: random.Random) -> Event:
    """Change one or more of the actor, the thing and the color, each with probability one half."""
    unlike = _unlike(event, draw)
    changed: list[str] = []
    while not changed:
        changed = [field for field in ("who", "thing", "color") if draw.random() < 0.5]
    return event._replace(**{field: getattr(unlike, field) for field in changed})


def _stranger(event: Event, draw: random.Random) -> str:
    """Draw a person whose name is nowhere in the event."""
    return draw.choice([person for person in PEOPLE if person not in event])


def _other(choices: tuple[str, ...], excluded: str, draw: random.Random) -> str:
    return draw.choice([choice for choice in choices if choice != excluded])


TASKS: dict[str, Callable[[World, random.Random], tuple]] = {
    "entailment": _entailment,
    "questions": _questions,
    "paraphrase": _paraphrase,
    "sentiment": _sentiment,
    "span": _span,
    "tagging": _tagging,
    "translation": _translation,
}
"""Task -> function that draws one example of it."""
