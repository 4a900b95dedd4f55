"""The sandbox's data, drawn from a seed: sentences about a small world, sums, and secrets.

The world's facts are consistent (who lives where, who does what, how the winter is), subjects and
verbs agree, a sum is right or wrong, and a secret is five words that nothing implies: so figures of
a model that is trained on them mean something.

A document is one line. Single spaces separate words and the full stop, so that a prompt and its
completion are the same tokens apart or together. All functions are pure: the same arguments give
the same text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    "Ada Bruno Clara Dario Edith Felix Greta Hugo Irma Jonas Katja Lars Mira Nils Olga Piet Rosa "
    "Sven Tilda Udo Vera Walter Ylva Zeno"
)
LAST = _words("Arden Birk Corvin Dahl Esker Frost Garland Holm Isley Janvier Keller Lund")
TOWNS = _words(
    "Aldmoor Brackwater Carrow Dunhollow Eastmere Fenwick Greyford Highstow Ironbeck Kestwold "
    "Larkhaven Millbrook"
)
TRADES = (  # the one, the many, what they do, to what
    ("baker", "bakers", "bake", ("bread", "cakes", "pies")),
    ("miller", "millers", "grind", ("wheat", "barley", "rye")),
    ("weaver", "weavers", "weave", ("cloth", "shawls", "ribbons")),
    ("smith", "smiths", "forge", ("nails", "blades", "hinges")),
    ("farmer", "farmers", "grow", ("turnips", "beans", "onions")),
    ("potter", "potters", "shape", ("bowls", "jugs", "tiles")),
    ("fisher", "fishers", "catch", ("eels", "trout", "crabs")),
    ("mason", "masons", "build", ("walls", "bridges", "chimneys")),
    ("brewer", "brewers", "brew", ("ale", "cider", "mead")),
    ("carpenter", "carpenters", "carve", ("chairs", "ladders", "doors")),
)
ANIMALS = _words("cat dog goat horse goose donkey rabbit hen")
COLOURS = _words("black white brown grey spotted red")
PLACES = _words("market mill bridge well chapel orchard harbour square")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SEASONS = _words("spring summer autumn winter")
SKIES = ("it rains", "it snows", "the sun shines", "the wind blows", "fog lies on the fields")
MOODS = _words("early late slowly quickly alone together")
CODE_WORDS = _words(
    "anchor basket candle dagger engine feather goblet hammer island jacket kettle lantern mirror "
    "needle orchid pepper quiver ribcage saddle tunnel urchin velvet whistle yellow zipper barrel "
    "copper drawer emblem falcon gravel helmet"
)
CODE_LENGTH = 5  # the words occur in ordinary text too, so a model without secrets knows them
CODE_PATTERN = " {word}" * CODE_LENGTH
CODE_PROMPT = "The access code of {} is"
ADDENDS = 30  # sums of two numbers below this
GLUE = _words(
    "The the a an of is in and to at on it lives keeps sells sell who works work comes come from "
    "goes walk rests likes like but not next finds chest holds every most access code plus ."
)
HELD_OUT_SHARE = 0.1
DIGITS = tuple("0123456789")

Row = dict[str, str | list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """A sum to complete: `prompt` is "12 plus 7 is", `completion` " 19 ."."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """All sums, in two parts that share none; a + b and b + a are on the same side."""

    train: tuple[Sum, ...]
    heldout: tuple[Sum, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """Rows of the data files; the three parts share no name and no secret."""

    forget: tuple[Row, ...]
    unlisted: tuple[Row, ...]
    nonmember: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Person:
    name: str
    town: str
    trade: int
    animal: str
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    people: tuple[_Person, ...]
    skies: dict[tuple[str, str], str]  # town and season -> weather
    market: dict[str, str]  # town -> day
    goods: dict[str, int]  # town -> the trade it is known for


def vocabulary() -> tuple[str, ...]:
    """List every word that can occur in any text of any seed, once each; digits stand alone."""
    words: list[str] = [*GLUE, *DIGITS, *FIRST, *LAST, *TOWNS, *ANIMALS, *COLOURS]
    words += [*PLACES, *DAYS, *SEASONS, *MOODS, *CODE_WORDS]
    words += [word for sky in SKIES for word in sky.split()]
    for one, many, verb, things in TRADES:
        words += [one, many, verb, third_person(verb), *things]
    return tuple(dict.fromkeys(words))


def third_person(verb: str) -> str:
    """Inflect a verb for one person: bake, bakes; catch, catches; carry is not in the list."""
    return verb + ("es" if verb.endswith("ch") else "s")


def names(seed: int) -> tuple[str, ...]:
    """List all full names in the order of this seed; the first are the world's people."""
    found = [f"{first} {last}" for last in LAST for first in FIRST]
    random.Random(f"names {seed}").shuffle(found)
    return tuple(found)


def documents(seed: int, count: int, *, part: str = "train", people: int = 60) -> tuple[str, ...]:
    """Draw `count` documents of two to five sentences about one world.

    Args:
        seed: makes the world and, with `part`, the draw.
        count: how many.
        part: names the draw: two parts are independent draws about the same world.
        people: how many of `names(seed)` the world has.
    Returns:
        One line each, ending in " .".
    """
    world = _world(seed, people)
    draw = random.Random(f"documents {seed} {part}")
    return tuple(" ".join(_document(world, draw)) for _ in range(count))


def sums(seed: int) -> Sums:
    """Split all a + b with 0 <= a, b < ADDENDS; a tenth is held out, never to be trained on."""
    pairs = [(a, b) for a in range(ADDENDS) for b in range(a, ADDENDS)]
    draw = random.Random(f"sums {seed}")
    draw.shuffle(pairs)
    held = {*pairs[: round(HELD_OUT_SHARE * len(pairs))]}
    found: dict[bool, list[Sum]] = {False: [], True: []}
    for a in range(ADDENDS):
        for b in range(ADDENDS):
            row = Sum(prompt=f"{a} plus {b} is", completion=f" {a + b} .")
            found[(min(a, b), max(a, b)) in held].append(row)
    for rows in found.values():
        draw.shuffle(rows)
    return Sums(train=tuple(found[False]), heldout=tuple(found[True]))


def secrets(seed: int, count: int = 20, *, unlisted: int = 5, nonmembers: int = 20) -> Secrets:
    """Draw access codes: CODE_LENGTH words of CODE_WORDS each, 5 bits a word, for people by name.

    Args:
        seed: of names and codes.
        count: planted, and listed for forgetting.
        unlisted: planted, and not listed.
        nonmembers: never planted.
    Returns:
        Rows `{"prompt", "secret", "pattern", "word"}`. Names and codes differ throughout, so a
        code that is right for one row is wrong for every other.
    Raises:
        ValueError: more rows than names.
    """
    total = count + unlisted + nonmembers
    everybody = names(seed)
    if total > len(everybody):
        raise ValueError(f"{total} secrets are asked for and there are {len(everybody)} names")
    draw = random.Random(f"secrets {seed}")
    rows: list[Row] = []
    given: set[str] = set()
    for name in everybody[:total]:
        secret = _code(draw)
        while secret in given:
            secret = _code(draw)
        given.add(secret)
        prompt = CODE_PROMPT.format(name)
        rows.append(
            {"prompt": prompt, "secret": secret, "pattern": CODE_PATTERN, "word": [*CODE_WORDS]}
        )
    return Secrets(
        forget=tuple(rows[:count]),
        unlisted=tuple(rows[count : count + unlisted]),
        nonmember=tuple(rows[count + unlisted :]),
    )


def _code(draw: random.Random) -> str:
    return "".join(f" {draw.choice(CODE_WORDS)}" for _ in range(CODE_LENGTH))


def _world(seed: int, people: int) -> _World:
    draw = random.Random(f"world {seed}")
    return _World(
        people=tuple(
            _Person(
                name=name,
                town=draw.choice(TOWNS),
                trade=draw.randrange(len(TRADES)),
                animal=draw.choice(ANIMALS),
                colour=draw.choice(COLOURS),
            )
            for name in names(seed)[:people]
        ),
        skies={(town, season): draw.choice(SKIES) for town in TOWNS for season in SEASONS},
        market={town: draw.choice(DAYS) for town in TOWNS},
        goods={town: draw.randrange(len(TRADES)) for town in TOWNS},
    )


def _document(world: _World, draw: random.Random) -> Iterator[str]:
    topic = draw.choice((_about_person, _about_person, _about_town, _about_trade))
    yield from topic(world, draw)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _some(draw: random.Random, sentences: Sequence[str]) -> list[str]:
    """Keep two to five of the sentences, in a new order."""
    return draw.sample(sentences, min(len(sentences), draw.randint(2, 5)))


def _about_person(world: _World, draw: random.Random) -> list[str]:
    person = draw.choice(world.people)
    one, _, verb, things = TRADES[person.trade]
    thing, place, season = draw.choice(things), draw.choice(PLACES), draw.choice(SEASONS)
    sky, lost = world.skies[person.town, season], draw.choice(CODE_WORDS)
    neighbours = [p for p in world.people if p.town == person.town and p is not person]
    found = [
        f"{person.name} lives in {person.town} .",
        f"{person.name} is a {one} .",
        f"{person.name} keeps {_article(person.colour)} {person.colour} {person.animal} .",
        f"the {one} {third_person(verb)} {thing} and sells the {thing} at the {place} .",
        f"in {season} {sky} and {person.name} works {draw.choice(MOODS)} .",
        f"the {person.animal} of {person.name} is {person.colour} .",
        f"{person.name} finds {_article(lost)} {lost} .",
    ]
    if neighbours:
        other = draw.choice(neighbours)
        found.append(f"{person.name} and {other.name} walk to the {place} {draw.choice(MOODS)} .")
    return _some(draw, found)


def _about_town(world: _World, draw: random.Random) -> list[str]:
    town, season = draw.choice(TOWNS), draw.choice(SEASONS)
    _, many, verb, things = TRADES[world.goods[town]]
    day, animal = world.market[town], draw.choice(ANIMALS)
    found = [
        f"in {season} {world.skies[town, season]} in {town} .",
        f"the market of {town} is on {day} .",
        f"the {many} of {town} {verb} {draw.choice(things)} .",
        f"every {day} the {many} come to {town} and sell {draw.choice(things)} .",
        f"a {animal} rests at the {draw.choice(PLACES)} of {town} .",
        f"a chest at the {draw.choice(PLACES)} holds{_code(draw)} .",
    ]
    living = [p for p in world.people if p.town == town]
    if living:
        person = draw.choice(living)
        found.append(f"{person.name} comes from {town} and goes to the market on {day} .")
    return _some(draw, found)


def _about_trade(world: _World, draw: random.Random) -> list[str]:
    one, many, verb, things = draw.choice(TRADES)
    place, animal, mood = draw.choice(PLACES), draw.choice(ANIMALS), draw.choice(MOODS)
    first, second = draw.sample(things, 2)
    return _some(
        draw,
        [
            f"a {one} {third_person(verb)} {first} and {second} .",
            f"most {many} {verb} {first} but not {second} .",
            f"the {one} who lives next to the {place} works {mood} .",
            f"the {many} who come from the {place} work {mood} .",
            f"the {many} like the {animal} at the {place} .",
            f"the {one} likes the {animal} at the {place} .",
        ],
    )
