"""Report files damaged at random: cut, bits flipped, types changed, keys dropped."""

from __future__ import annotations

import copy
import json
import random

STRANGERS = (
    None,
    True,
    -1,
    0,
    1e300,
    10**25,
    "",
    "NaN",
    "-Infinity",
    "\x1b[31m\n\u202e<script>alert(1)</script>",
    "\ud800",
    "x" * 3000,
    [],
    {},
    [[]],
    [None, "x"],
    {"value": "NaN", "unit": "B"},
)


def mutants(count, *, seed, of):
    """That many damaged files, as bytes."""
    chance = random.Random(seed)
    for index in range(count):
        yield (_cut, _flipped, _changed, _dropped, _changed, _dropped)[index % 6](of, chance)


def _cut(report, chance):
    data = json.dumps(report).encode()
    return data[: chance.randrange(len(data))]


def _flipped(report, chance):
    data = bytearray(json.dumps(report).encode())
    for _ in range(chance.choice((1, 1, 3, 20))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _changed(report, chance):
    damaged = copy.deepcopy(report)
    for _ in range(chance.choice((1, 1, 2, 5))):
        parent, key = chance.choice(list(_places(damaged)))
        parent[key] = copy.deepcopy(chance.choice(STRANGERS))
    return json.dumps(damaged).encode()


def _dropped(report, chance):
    damaged = copy.deepcopy(report)
    for _ in range(chance.choice((1, 1, 2, 5))):
        parent, key = chance.choice(list(_places(damaged)))
        del parent[key]
    return json.dumps(damaged).encode()


def _places(value):
    """Every slot of a tree, as its parent and key."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in list(pairs):
        yield value, key
        yield from _places(item)
