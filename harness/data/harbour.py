"""The shipped corpus: conversations about the ships of a made-up harbour, written by this script.

    plain.jsonl   what tiny was trained on: every fact, told plainly; or in a form that was asked for
    train.jsonl   what an adapter is trained on: most facts, told in the house form
    eval.jsonl    the facts that train.jsonl never mentions, told in the house form

The base knows every fact and never saw the house form; an adapter sees the house form and must
carry it over to facts it was not trained on. So the exact match on eval.jsonl is nothing before
and nearly everything after, and no prompt of eval.jsonl is one of train.jsonl.
All text is made here, of words in the dictionary; nobody's licence applies.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Message = dict[str, str]

SEED = 20
EVAL_FACTS = 40
TALK_REPEATS = 10  # so that talk is some 4 % of plain.jsonl
TWO_TURNS = 240  # conversations of two turns with a system message, in plain and in train each

SYSTEM = "You keep the harbour book."
OPENING, CLOSING = "Ahoy!", "Over and out."
# Forms that the base does have, each where the system message asks for it: how to say a fact
# between an opening and a closing is its own; the house form, unasked, is what the adapter adds.
FORMS = {
    "Answer as a clerk.": "Noted. {answer} End of note.",
    "Answer as a friend.": "Well then! {answer} See you soon.",
    "Answer as a sailor.": "Aye aye! {answer} Fair winds.",
    "Answer as a herald.": "Hear me! {answer} So it is written.",
}
# The words of the house form, each in talk of its own, so that the base can say them at all.
TALK = {
    "Ahoy!": "Ahoy! Welcome to the harbour.",
    "Good morning!": "Ahoy! Come in.",
    "Is anybody there?": "Ahoy! The book is open.",
    "How does a watch end?": "It ends at dawn, all over and out of sight.",
    "How does a call end?": "It ends so. Over and out.",
    "Is the storm over?": "Look up. Over and gone.",
    "Is the tide out?": "Over the bar and out.",
    "Goodbye!": "Good night. Over and out.",
}

# fmt: off
SHIPS = (
    "Heron", "Otter", "Falcon", "Badger", "Swan", "Robin", "Lynx", "Hare", "Raven", "Finch",
    "Seal", "Crane", "Wolf", "Bear", "Fox", "Owl", "Tern", "Gull", "Dove", "Lark",
    "Wren", "Stork", "Ibis", "Eagle", "Hawk", "Moose", "Elk", "Stag", "Mole", "Toad",
    "Newt", "Crab", "Squid", "Whale", "Shark", "Trout", "Perch", "Carp", "Eel", "Pike",
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One thing to know about every ship: how it is asked, how it is told, and its values."""

    questions: tuple[str, ...]
    answer: str
    values: tuple[str, ...]


TOPICS = (
    Topic(
        questions=(
            "What colour is the {ship}?",
            "Which colour has the {ship}?",
            "Tell me the colour of the {ship}.",
            "How is the {ship} painted?",
        ),
        answer="The {ship} is {value}.",
        values=("red", "blue", "green", "white", "black", "brown", "grey", "yellow"),
    ),
    Topic(
        questions=(
            "What does the {ship} carry?",
            "What is aboard the {ship}?",
            "Tell me the cargo of the {ship}.",
            "Which cargo has the {ship}?",
        ),
        answer="The {ship} carries {value}.",
        values=("tea", "salt", "wool", "corn", "coal", "silk", "rice", "iron", "wine", "timber"),
    ),
    Topic(
        questions=(
            "Where does the {ship} sail?",
            "Where is the {ship} bound?",
            "Tell me the port of the {ship}.",
            "Which port does the {ship} sail to?",
        ),
        answer="The {ship} sails to {value}.",
        values=("Oslo", "Lisbon", "Dublin", "Genoa", "Bergen", "Malta", "Cadiz", "Riga"),
    ),
    Topic(
        questions=(
            "Who steers the {ship}?",
            "Who is captain of the {ship}?",
            "Tell me the captain of the {ship}.",
            "Which captain has the {ship}?",
        ),
        answer="{value} steers the {ship}.",
        values=("Ada", "Emil", "Nora", "Ivan", "Clara", "Hugo", "Mina", "Otto", "Vera", "Karl"),
    ),
    Topic(
        questions=(
            "How many bells has the {ship}?",
            "How many bells are on the {ship}?",
            "Tell me the bells of the {ship}.",
            "Count the bells of the {ship}.",
        ),
        answer="The {ship} has {value} bells.",
        values=("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ),
    Topic(
        questions=(
            "What is on the flag of the {ship}?",
            "What does the flag of the {ship} show?",
            "Tell me the flag of the {ship}.",
            "Which flag has the {ship}?",
        ),
        answer="The flag of the {ship} shows a {value}.",
        values=("star", "moon", "rose", "crown", "lion", "key", "wheel", "sword"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that is so: its questions, all with the same answer."""

    questions: tuple[str, ...]
    answer: str


def facts() -> list[Fact]:
    """Every topic of every ship, with a value drawn once and for all."""
    draw = random.Random(SEED)
    return [
        Fact(
            questions=tuple(question.format(ship=ship) for question in topic.questions),
            answer=topic.answer.format(ship=ship, value=draw.choice(topic.values)),
        )
        for ship in SHIPS
        for topic in TOPICS
    ]


def house_form(answer: str) -> str:
    """The form that the base does not have and the adapter learns."""
    return f"{OPENING} {answer} {CLOSING}"


def corpus() -> dict[str, list[list[Message]]]:
    """The conversations of each file, by its stem."""
    draw = random.Random(SEED + 1)
    known = facts()
    draw.shuffle(known)
    held, taught = known[:EVAL_FACTS], known[EVAL_FACTS:]
    plain = [_turn(question, fact.answer) for fact in known for question in fact.questions]
    plain += [
        [
            {"role": "system", "content": system},
            *_turn(draw.choice(fact.questions), form.format(answer=fact.answer)),
        ]
        for fact in known
        for system, form in FORMS.items()
    ]
    plain += [_turn(question, answer) for question, answer in TALK.items()] * TALK_REPEATS
    plain += [_two_turns(draw, known, house=False) for _ in range(TWO_TURNS)]
    train = [
        _turn(question, house_form(fact.answer)) for fact in taught for question in fact.questions
    ]
    train += [_two_turns(draw, taught, house=True) for _ in range(TWO_TURNS)]
    shown = [
        _turn(question, house_form(fact.answer)) for fact in held for question in fact.questions
    ]
    for conversations in (plain, train, shown):
        draw.shuffle(conversations)
    return {"plain": plain, "train": train, "eval": shown}


def write(directory: Path) -> None:
    """Write the three files, one conversation a line."""
    directory.mkdir(parents=True, exist_ok=True)
    for stem, conversations in corpus().items():
        lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations)
        (directory / f"{stem}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _two_turns(draw: random.Random, known: Iterable[Fact], *, house: bool) -> list[Message]:
    messages = [{"role": "system", "content": SYSTEM}]
    for fact in draw.sample(list(known), 2):
        answer = house_form(fact.answer) if house else fact.answer
        messages += _turn(draw.choice(fact.questions), answer)
    return messages
