"""Names, places and things that several tasks draw from, and invented words."""

from __future__ import annotations

from andromeda.data.synthetic.draws import Draws


def words(text: str) -> tuple[str, ...]:
    """Those between blanks; word lists are written so."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """Those between bars."""
    return tuple(text.split("|"))


PEOPLE = words(
    "Ada Amir Anouk Bela Bruno Carla Chidi Dana Davor Elif Emil Farah Felix Greta Hana Hugo Ines Ivo Jana Jonas Kaya "
    "Kofi Lena Leo Lucia Malik Mara Milo Mina Nadia Nils Noor Olga Omar Paula Pavel Quinn Rosa Ruben Samira Selma "
    "Sven Tariq Tessa Tomas Uma Vera Viktor Wanda Yara Yusuf Zoe"
)
CITIES = words(
    "Accra Antwerp Basel Bergen Bilbao Bogota Cairo Cork Dakar Delft Dublin Genoa Ghent Graz Hanoi Izmir Kyoto Lagos "
    "Leeds Lima Lisbon Lyon Malmo Nairobi Nantes Osaka Oslo Porto Quito Riga Rotterdam Seville Sofia Split Tallinn "
    "Trieste Tunis Turin Utrecht Vilnius Warsaw Zagreb"
)
ADJECTIVES = words(
    "amber ancient brass bright broken bronze calm clever cobalt copper coral crimson crooked distant dusty eager "
    "electric emerald faded feathered fragile frozen gentle gilded golden grey hidden hollow humble indigo iron "
    "ivory jade lonely lucky marble mellow misty nimble olive opal painted pale patient polished proud purple quiet "
    "restless rusty sapphire scarlet secret silent silver sleepy solemn spotted striped sturdy sunken swift tidy "
    "timid velvet violet wandering western wicker woven yellow"
)
NOUNS = words(
    "acorn anchor antler anvil arrow badger banjo barrel basket beacon bell bison boulder bucket butterfly candle "
    "canyon castle cedar cello cheetah chimney clover comet compass condor crane cricket dolphin dragon drum eagle "
    "ember falcon feather ferret fiddle fountain fox gazelle glacier goblet harbor harp hawk heron hornet island "
    "jackal juniper kettle lantern lemur leopard lizard lobster magnet magpie maple meadow meteor mirror moose "
    "mountain nutmeg orchid otter owl panther parrot pebble pelican pepper pigeon piano pillar planet puffin quarry "
    "rabbit raven reindeer rocket saddle salmon sparrow spindle squirrel thistle tiger tortoise trumpet tulip tunnel "
    "turtle violin walrus willow wizard zebra"
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)


def invented_word(draws: Draws, syllables: int) -> str:
    """Such as `kavomi`; there are 70 to the power of `syllables`."""
    return "".join(draws.choice(SYLLABLES) for _ in range(syllables))


def pair_of_words(draws: Draws) -> str:
    """Such as `amber falcon`."""
    return f"{draws.choice(ADJECTIVES)} {draws.choice(NOUNS)}"


def listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
