"""What two people say to each other in synthetic conversations: requests, replies that repeat what was heard, nods."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A turn of the user and the reply to it.

    Attributes:
        tag: its name in expectations.
        user: the turn in parts; the user may pause between two of them.
        own: the reply. Words in braces are slots, filled alike in both.
    """

    tag: str
    user: tuple[str, ...]
    own: str


EXCHANGES: tuple[Exchange, ...] = (
    Exchange(
        tag="table", user=("I need a table", "for {number} people", "on {day}"), own="a table for {number} on {day}"
    ),
    Exchange(
        tag="taxi",
        user=("please call a taxi", "to the {place}", "at {number}"),
        own="your taxi to the {place} comes at {number}",
    ),
    Exchange(tag="drink", user=("can I have", "{number} cups of {drink}"), own="here are {number} cups of {drink}"),
    Exchange(
        tag="meeting", user=("my meeting moved", "from {day} to {other_day}"), own="so now you meet on {other_day}"
    ),
    Exchange(tag="name", user=("my name is {name}", "what is yours"), own="hello {name} nice to meet you"),
    Exchange(
        tag="lost", user=("I lost my {thing}", "near the {place}"), own="somebody found a {thing} at the {place} today"
    ),
    Exchange(tag="weather", user=("will it rain", "on {day}"), own="it looks dry on {day} but take a coat"),
    Exchange(tag="train", user=("when does the train", "to the {place} leave"), own="it leaves in {number} minutes"),
    Exchange(tag="music", user=("play something slow", "for {name}"), own="here is a slow song for {name}"),
    Exchange(tag="lights", user=("turn off the lights", "in the {room}"), own="the {room} is dark now"),
    Exchange(tag="count", user=("remind me", "to buy {number} tickets"), own="I will remind you of {number} tickets"),
    Exchange(
        tag="call", user=("if {name} calls", "say I am at the {place}"), own="I will tell {name} you are at the {place}"
    ),
    Exchange(tag="cook", user=("how long should I cook", "{number} potatoes"), own="give them about twenty minutes"),
    Exchange(tag="gift", user=("{name} has a birthday", "on {day}", "any ideas"), own="maybe a {thing} for {name}"),
)

SLOTS: dict[str, tuple[str, ...]] = {
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "day": ("monday", "tuesday", "wednesday", "thursday"),
    "other_day": ("friday", "saturday", "sunday"),
    "place": ("station", "museum", "market", "harbour", "library", "airport"),
    "drink": ("coffee", "tea", "milk", "juice"),
    "name": ("anna", "peter", "maria", "david", "laura", "simon"),
    "thing": ("wallet", "camera", "jacket", "watch", "guitar"),
    "room": ("kitchen", "bedroom", "garage", "hall"),
}

NODS: tuple[str, ...] = ("yes", "right", "I see", "okay", "sure")
"""Backchannels: they ask for nothing and take no turn."""


def draw_exchange(rng: np.random.Generator) -> Exchange:
    """One exchange with its slots filled."""
    exchange = EXCHANGES[int(rng.integers(len(EXCHANGES)))]
    filled = {slot: words[int(rng.integers(len(words)))] for slot, words in SLOTS.items()}
    return Exchange(
        tag=exchange.tag,
        user=tuple(part.format(**filled) for part in exchange.user),
        own=exchange.own.format(**filled),
    )
