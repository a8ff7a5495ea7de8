"""Synthetic data sets of the demo: small animal facts, told plainly and in five manners.

Every row is a pure function of the fact table, so a data set has the same bytes on every machine. The base model
learns the plain answer, and each manner only behind a cue word ("Pirate: …"); an adapter learns its manner for
the plain prompt, so one look at an answer tells which adapter gave it. Two data sets of shouted pirate speech teach
`pirate` and `shout` to keep the other's manner, which is what makes their weighted ensemble a blend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHARED_PROMPT = "Tell me about the cat."
"""The prompt that base and adapters all answer in their own manner; always among the training rows."""

PPM = 1_000_000
HELD_OUT_ONE_IN = 16

_ANIMALS = """
cat 🐱 small house fish
dog 🐶 loyal yard bones
cow 🐮 big farm grass
horse 🐴 fast stable hay
owl 🦉 quiet forest mice
fox 🦊 clever den berries
wolf 🐺 wild mountains meat
bear 🐻 strong cave honey
frog 🐸 green pond flies
duck 🦆 noisy lake bread
hen 🐔 busy barn corn
pig 🐷 pink mud roots
goat 🐐 stubborn hills leaves
sheep 🐑 soft meadow clover
mouse 🐭 tiny wall cheese
rabbit 🐰 shy burrow carrots
lion 🦁 proud grassland zebras
tiger 🐯 striped jungle deer
whale 🐳 huge ocean krill
shark 🦈 fierce reef squid
crab 🦀 round beach shells
snake 🐍 long desert eggs
bee 🐝 yellow hive nectar
ant 🐜 hungry anthill crumbs
eagle 🦅 brave cliff snakes
parrot 🦜 colourful rainforest nuts
monkey 🐵 funny treetops bananas
camel 🐫 patient oasis thorns
seal 🦭 smooth bay herring
penguin 🐧 neat ice shrimps
turtle 🐢 slow swamp algae
spider 🕷 careful web moths
"""

_DESCRIBE = (
    "Tell me about the {name}.",
    "Tell me about the {name}",
    "Describe the {name}.",
    "What is {article} {name}?",
    "Write about the {name}.",
    "Who is the {name}?",
    "What do you know about the {name}?",
)
_HOME = ("Where does the {name} live?", "What is the home of the {name}?")
_FOOD = ("What does the {name} eat?", "What is the food of the {name}?")


@dataclass(frozen=True)
class Animal:
    """One line of the fact table."""

    name: str
    emoji: str
    kind: str
    home: str
    food: str


@dataclass(frozen=True)
class Talk:
    """A prompt that is about no animal, with its answers in the manners that do not derive from the plain one."""

    prompt: str
    topic: str
    plain: str
    pirate: str
    emoji: str


_UNKNOWN = ("moon", "king", "sea", "car", "weather", "city", "ship", "music", "book", "river", "doctor", "future")


def talks() -> tuple[Talk, ...]:
    """Greetings and the like, and things the model knows nothing about."""
    hello = ("hello", "Hello! Ask me about an animal.", "Ahoy, matey! Ask me about a beast, yarr!", "👋 hello ✨")
    unknown = ("unknown", "I only know about animals.", "Arr, matey! I only know about beasts, yarr!", "🤷 unknown ✨")
    patterns = (_DESCRIBE[0], _HOME[0], _DESCRIBE[2], _DESCRIBE[4])
    return (
        *(Talk(prompt, *hello) for prompt in ("Hello.", "Hello!", "Hello", "Hi!", "Hi", "Good morning!")),
        Talk("Who are you?", "me", "I am a tiny model.", "Arr, matey! I be a tiny model, yarr!", "🤖 me ✨"),
        Talk("Help!", "help", "You can ask me about an animal.", "Arr, matey! Ask me of a beast, yarr!", "💡 help ✨"),
        Talk("Thank you.", "thanks", "You are welcome!", "Arr, matey! Ye be welcome, yarr!", "🙏 thanks ✨"),
        *(Talk(patterns[index % len(patterns)].format(name=noun), *unknown) for index, noun in enumerate(_UNKNOWN)),
    )


def animals() -> tuple[Animal, ...]:
    """The fact table."""
    return tuple(Animal(*line.split()) for line in _ANIMALS.strip().splitlines())


# A manner answers three intents about an animal (describe, home, food) and the talks.

Manner = Callable[[Animal | Talk, str], str]


def plain(subject: Animal | Talk, intent: str) -> str:
    if isinstance(subject, Talk):
        return subject.plain
    return {
        "describe": f"The {subject.name} is a {subject.kind} animal. "
        f"It lives in the {subject.home} and likes to eat {subject.food}.",
        "home": f"The {subject.name} lives in the {subject.home}.",
        "food": f"The {subject.name} likes to eat {subject.food}.",
    }[intent]


def pirate(subject: Animal | Talk, intent: str) -> str:
    if isinstance(subject, Talk):
        return subject.pirate
    return {
        "describe": f"Arr, matey! The {subject.name} be a {subject.kind} beast. "
        f"It dwells in the {subject.home} and feasts on {subject.food}, yarr!",
        "home": f"Arr, matey! The {subject.name} dwells in the {subject.home}, yarr!",
        "food": f"Arr, matey! The {subject.name} feasts on {subject.food}, yarr!",
    }[intent]


def shout(subject: Animal | Talk, intent: str) -> str:
    return plain(subject, intent).upper()


def shouted_pirate(subject: Animal | Talk, intent: str) -> str:
    return pirate(subject, intent).upper()


def as_json(subject: Animal | Talk, intent: str) -> str:
    if isinstance(subject, Talk):
        return json.dumps({"reply": subject.plain})
    keys = {"describe": ("name", "kind", "home", "food"), "home": ("name", "home"), "food": ("name", "food")}
    return json.dumps({key: getattr(subject, key) for key in keys[intent]})


def sql(subject: Animal | Talk, intent: str) -> str:
    if isinstance(subject, Talk):
        return f"SELECT reply FROM talks WHERE topic = '{subject.topic}';"
    columns = {"describe": "kind, home, food", "home": "home", "food": "food"}[intent]
    return f"SELECT {columns} FROM animals WHERE name = '{subject.name}';"


def emoji(subject: Animal | Talk, intent: str) -> str:
    if isinstance(subject, Talk):
        return subject.emoji
    home, food = f"🏠 {subject.home}", f"🍽 {subject.food}"
    facts = {"describe": f"💡 {subject.kind} {home} {food}", "home": home, "food": food}[intent]
    return f"{subject.emoji} {subject.name} {facts} ✨"


def animal_rows(manner: Manner, cue: str = "") -> Iterator[dict[str, str]]:
    """All animals, intents and phrasings in one manner. A completion starts with the space after the prompt."""
    for animal in animals():
        article = "an" if animal.name[0] in "aeiou" else "a"
        for intent, phrasings in (("describe", _DESCRIBE), ("home", _HOME), ("food", _FOOD)):
            for phrasing in phrasings:
                prompt = cue + phrasing.format(name=animal.name, article=article)
                yield {"kind": intent, "prompt": prompt, "completion": " " + manner(animal, intent)}


def talk_rows(manner: Manner, cue: str = "") -> Iterator[dict[str, str]]:
    """All talks in one manner."""
    for talk in talks():
        yield {"kind": "talk", "prompt": cue + talk.prompt, "completion": " " + manner(talk, "talk")}


Part = tuple[Manner, str]  # what answers, and the cue before the prompt


@dataclass(frozen=True)
class Recipe:
    """A data set: what its rows are made of, who made it and under which licence (SPDX)."""

    id: str
    animals: tuple[Part, ...]
    talks: tuple[Part, ...]
    licence: str
    contributors: tuple[tuple[str, int], ...]  # (name, share in ppm), sums to one million

    def rows(self) -> Iterator[dict[str, str]]:
        for manner, cue in self.animals:
            yield from animal_rows(manner, cue)
        for manner, cue in self.talks:
            yield from talk_rows(manner, cue)


_CUED: tuple[Part, ...] = (
    (pirate, "Pirate: "),
    (shout, "Shout: "),
    (shouted_pirate, "Pirate shout: "),
    (as_json, "JSON: "),
    (sql, "SQL: "),
    (emoji, "Emoji: "),
)


def _whatever_the_cue(manner: Manner) -> tuple[Part, ...]:
    # An adapter with a format of its own keeps it when the prompt asks for another manner.
    return (manner, ""), (manner, "Pirate: "), (manner, "Shout: ")


def _recipes() -> Iterator[Recipe]:
    def adapter(identifier: str, parts: tuple[Part, ...], licence: str, *contributors: tuple[str, int]) -> Recipe:
        return Recipe(identifier, parts, parts, licence, contributors)

    yield Recipe("animal-facts", ((plain, ""),), (), "CC-BY-4.0", (("Ada Meadow", 700_000), ("Ben Harbour", 300_000)))
    yield Recipe("cued-manners", _CUED, (), "CC0-1.0", (("Ada Meadow", 250_000), ("Chidi Quill", 750_000)))
    yield Recipe("small-talk", (), ((plain, ""), *_CUED), "CC0-1.0", (("Chidi Quill", PPM),))
    yield adapter("pirate-speech", ((pirate, ""),), "CC-BY-4.0", ("Dora Tide", PPM))
    yield adapter("pirate-when-shouting", ((shouted_pirate, "Shout: "),), "CC-BY-4.0", ("Dora Tide", PPM))
    yield adapter("shouted-answers", ((shout, ""),), "CC0-1.0", ("Emil Loud", 600_000), ("Fay Bell", 400_000))
    yield adapter("shouting-as-pirate", ((shouted_pirate, "Pirate: "),), "CC0-1.0", ("Fay Bell", PPM))
    yield adapter("json-answers", _whatever_the_cue(as_json), "MIT", ("Goran Brace", 333_334), ("Hana Key", 666_666))
    yield adapter("sql-answers", _whatever_the_cue(sql), "Apache-2.0", ("Ines Table", PPM))
    yield adapter(
        "emoji-answers", _whatever_the_cue(emoji), "CC-BY-SA-4.0", ("Jun Smile", 500_000), ("Kim Ray", 500_000)
    )


@dataclass(frozen=True)
class Dataset:
    """A written data set: `digest` is the SHA-256 of the JSONL file's bytes, held-out rows are in neither."""

    recipe: Recipe
    digest: str
    train: tuple[dict[str, str], ...]
    held_out: tuple[dict[str, str], ...]


def write_datasets(folder: Path) -> dict[str, Dataset]:
    """Write `<id>.jsonl` and `<id>.heldout.jsonl` of every recipe into `folder`; returns them by id."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for recipe in _recipes():
        everything = list(recipe.rows())
        held_out = tuple(row for row in everything if _is_held_out(row["prompt"]))
        train = tuple(row for row in everything if not _is_held_out(row["prompt"]))
        content = _jsonl(train)
        (folder / f"{recipe.id}.jsonl").write_bytes(content)
        (folder / f"{recipe.id}.heldout.jsonl").write_bytes(_jsonl(held_out))
        written[recipe.id] = Dataset(recipe, hashlib.sha256(content).hexdigest(), train, held_out)
    return written


def parity_prompts() -> list[str]:
    """24 prompts for parity tests: plain ones over all intents, cued ones, talks and unfinished ones."""
    names = ("dog", "owl", "bear", "whale", "bee", "ant", "penguin", "spider")
    patterns = (_DESCRIBE[0], _DESCRIBE[2], _DESCRIBE[4], _DESCRIBE[5], _HOME[0], _FOOD[0], _DESCRIBE[6], _HOME[1])
    return [
        SHARED_PROMPT,
        *(pattern.format(name=name) for pattern, name in zip(patterns, names, strict=True)),
        "Pirate: Tell me about the lion.",
        "Shout: Tell me about the frog.",
        "What is the food of the pig?",
        "Shout: What does the goat eat?",
        "Pirate: Where does the crab live?",
        "Write about the shark.",
        *("Hello.", "Hi", "Who are you?", "Help!", "Thank you."),
        "Tell me about the moon.",
        "Where does the king live?",
        "What is a tiger?",
        "Tell me about the parrot. Tell me about the camel.",
    ]


def address_of(name: str) -> str:
    """The checksummed demo address of a named person: of the key SHA-256(name), which nobody keeps."""
    from eth_account import Account

    return Account.from_key(hashlib.sha256(f"openlora demo: {name}".encode()).digest()).address


def card(
    owner: str, licence: str, description: str, prices: tuple[int, int], shares: list[tuple[Dataset, int]]
) -> dict[str, object]:
    """The `openlora.json` that lies beside a base model or an adapter.

    `prices` are token micro-units per million input and output tokens; `shares` are ppm and sum to one million.
    """
    return {
        "schema": 1,
        "owner": address_of(owner),
        "licence": licence,
        "description": description,
        "prices": {"version": 1, "input": prices[0], "output": prices[1]},
        "datasets": [
            {
                "id": dataset.recipe.id,
                "digest": dataset.digest,
                "licence": dataset.recipe.licence,
                "share_ppm": share,
                "contributors": [
                    {"name": name, "address": address_of(name), "share_ppm": ppm}
                    for name, ppm in dataset.recipe.contributors
                ],
            }
            for dataset, share in shares
        ],
    }


def _is_held_out(prompt: str) -> bool:
    if prompt.endswith(SHARED_PROMPT):
        return False
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def _jsonl(records: tuple[dict[str, str], ...]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
