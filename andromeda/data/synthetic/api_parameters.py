"""Parameters of made-up APIs: a JSON Schema, a value, and how a request says that value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.words import ADJECTIVES, CITIES, NOUNS, PEOPLE, listed, words

Schema: TypeAlias = dict[str, Any]
Said: TypeAlias = tuple[Any, str]  # a value, and the words for it

MONTHS = words("January February March April May June July August September October November December")
SMALL_NUMBERS = words("zero one two three four five six seven eight nine ten eleven twelve")


@dataclass(frozen=True)
class Parameter:
    """A parameter that functions may have.

    Attributes:
        names: of which a function uses one.
        description: with {thing} for what the function is about.
        schema: drawn for each function; every value that `say` gives for it is valid.
        say: a value for such a schema, with words for it.
        phrases: of the request, with {} for these words, of which one is used. "" where the words are all.
    """

    names: tuple[str, ...]
    description: str
    schema: Callable[[Draws], Schema]
    say: Callable[[Draws, Schema], Said]
    phrases: tuple[str, ...] = ("{}",)


# ---- values and their words ------------------------------------------------------------------------


def _always(**schema: Any) -> Callable[[Draws], Schema]:
    return lambda draws: dict(schema)


def _some_of(*values: str) -> Callable[[Draws], Schema]:
    """An enumeration of at least two of the values."""
    return lambda draws: {"type": "string", "enum": draws.sample(values, draws.between(2, len(values)))}


def _list_of(schema: Callable[[Draws], Schema]) -> Callable[[Draws], Schema]:
    return lambda draws: {"type": "array", "items": schema(draws)}


def _one_of(choices: tuple[str, ...]) -> Callable[[Draws, Schema], Said]:
    return lambda draws, schema: (chosen := draws.choice(choices), chosen)


def _whole(least: int, most: int) -> Callable[[Draws, Schema], Said]:
    """In figures, or small ones in words."""

    def say(draws: Draws, _: Schema) -> Said:
        value = draws.between(least, most)
        return value, SMALL_NUMBERS[value] if value < len(SMALL_NUMBERS) and draws.chance(2) else str(value)

    return say


def _decimal(least: int, most: int, places: int) -> Callable[[Draws, Schema], Said]:
    """With so many places, some of which may be zero: then it is said without them."""

    def say(draws: Draws, _: Schema) -> Said:
        value = draws.between(least * 10**places, most * 10**places) / 10**places
        value = draws.choice((value, float(int(value))))
        return (int(value) if value.is_integer() else value), f"{value:g}"

    return say


def _enumerated(draws: Draws, schema: Schema) -> Said:
    value = draws.choice(schema["enum"])
    return value, value


def _several_enumerated(draws: Draws, schema: Schema) -> Said:
    choices = schema["items"]["enum"]
    values = draws.sample(choices, draws.between(1, min(3, len(choices))))
    return values, listed(values)


def _several_of(choices: tuple[str, ...]) -> Callable[[Draws, Schema], Said]:
    def say(draws: Draws, _: Schema) -> Said:
        values = draws.sample(choices, draws.between(1, 4))
        return values, listed(values)

    return say


def _several_numbers(draws: Draws, _: Schema) -> Said:
    values = sorted(draws.sample(range(1, 25), draws.between(2, 4)))
    return values, listed([str(value) for value in values])


def _either(true: str, false: str) -> Callable[[Draws, Schema], Said]:
    def say(draws: Draws, _: Schema) -> Said:
        value = draws.chance(2)
        return value, true if value else false

    return say


def _date(draws: Draws, _: Schema) -> Said:
    year, month, day = draws.between(2030, 2039), draws.between(1, 12), draws.between(1, 28)
    written = f"{year}-{month:02}-{day:02}"
    spoken = (written, f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}")
    return written, draws.choice(spoken)


def _time(draws: Draws, _: Schema) -> Said:
    hour, minute = draws.between(7, 21), draws.choice((0, 15, 30, 45))
    spoken = f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}"
    return f"{hour:02}:{minute:02}", draws.choice((spoken, f"{hour:02}:{minute:02}"))


def reference(draws: Draws) -> str:
    """Such as `KX-4821`."""
    letters = "".join(draws.choice("ABCDEFGHJKLMNPRSTUVWXZ") for _ in range(2))
    return f"{letters}-{draws.digits(draws.between(4, 6))}"


def _reference(draws: Draws, _: Schema) -> Said:
    value = reference(draws)
    return value, value


def _title(draws: Draws, _: Schema) -> Said:
    value = f"{draws.choice(ADJECTIVES).capitalize()} {draws.choice(NOUNS).capitalize()}"
    return value, f'"{value}"'


def _address(draws: Draws, _: Schema) -> Said:
    value = f"{draws.choice(PEOPLE).lower()}.{draws.choice(NOUNS)}@example.{draws.choice(('com', 'net', 'org'))}"
    return value, value


# ---- the parameters ----------------------------------------------------------------------------------

LANGUAGES = ("English", "French", "German", "Italian", "Polish", "Portuguese", "Spanish", "Turkish")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROOMS = ("kitchen", "hall", "bathroom", "bedroom", "study", "cellar", "attic", "garage", "porch", "workshop")
TAGS = ("urgent", "draft", "private", "travel", "finance", "garden", "music", "school", "health", "family")
REASONS = ("illness", "bad weather", "a change of plans", "a double entry", "a late train", "high costs")

STRING, INTEGER, NUMBER, BOOLEAN = (_always(type=kind) for kind in ("string", "integer", "number", "boolean"))

PARAMETERS: dict[str, Parameter] = {
    "reference": Parameter(
        ("reference", "ref", "id"), "Reference of the {thing}.", STRING, _reference, ("with the reference {}",)
    ),
    "date": Parameter(
        ("date", "day", "on_date"), "Date, as YYYY-MM-DD.", _always(type="string", format="date"), _date, ("on {}",)
    ),
    "new_date": Parameter(
        ("new_date", "date", "to"), "The new date, as YYYY-MM-DD.", _always(type="string", format="date"), _date,
        ("to {}",),
    ),
    "due": Parameter(
        ("due", "deadline"), "Last day, as YYYY-MM-DD.", _always(type="string", format="date"), _date, ("due on {}",)
    ),
    "time": Parameter(("time", "start_time"), "Time of day, as HH:MM in 24 hours.", STRING, _time, ("at {}",)),
    "city": Parameter(("city", "town", "location"), "Name of the city.", STRING, _one_of(CITIES), ("in {}",)),
    "person": Parameter(
        ("name", "customer", "guest"), "First name of the customer.", STRING, _one_of(PEOPLE),
        ("in the name of {}", "under the name {}"),
    ),
    "people": Parameter(
        ("people", "party_size", "num_people"), "Number of people.", _always(type="integer", minimum=1), _whole(2, 12),
        ("for {} people", "for a group of {}"),
    ),
    "minutes": Parameter(
        ("minutes", "duration_minutes"), "Duration in minutes.", INTEGER, _whole(10, 240), ("for {} minutes",)
    ),
    "more_minutes": Parameter(
        ("minutes", "extra_minutes"), "How many minutes longer.", _always(type="integer", minimum=1), _whole(10, 240),
        ("by {} minutes",),
    ),
    "price": Parameter(
        ("max_price", "price_limit", "budget"), "Highest price in euros.", _always(type="number", minimum=0),
        _decimal(5, 400, 2), ("for at most {} euros", "costing no more than {} euros"),
    ),
    "radius": Parameter(
        ("radius_km", "max_distance"), "Distance from the centre in kilometres.", NUMBER, _decimal(1, 20, 1),
        ("within {} kilometres of the centre", "no farther than {} km from the centre"),
    ),
    "grade": Parameter(
        ("grade", "category", "quality"), "Quality of the {thing}.", _some_of("basic", "standard", "premium", "luxury"),
        _enumerated, ("of {} quality", "in the {} category"),
    ),
    "insurance": Parameter(
        ("insurance", "insured"), "Whether to add insurance.", BOOLEAN, _either("with insurance", "without insurance")
    ),
    "notify": Parameter(
        ("notify", "send_confirmation"), "Whether to send a confirmation.", BOOLEAN,
        _either("with a confirmation by mail", "without a confirmation by mail"),
    ),
    "extras": Parameter(
        ("extras", "options", "add_ons"), "Extras to include.",
        _list_of(_some_of("breakfast", "child seat", "guide", "helmet", "lunch", "map", "parking", "towels")),
        _several_enumerated, ("with these extras: {}", "including {}"),
    ),
    "reason": Parameter(("reason", "comment"), "The reason given.", STRING, _one_of(REASONS), ("because of {}",)),
    "title": Parameter(
        ("title", "heading"), "Title of the {thing}.", STRING, _title, ("called {}", "with the title {}")
    ),
    "new_title": Parameter(
        ("new_title", "to"), "The title that it gets.", STRING, _title, ("so that it is called {}", "to {}")
    ),
    "recipients": Parameter(
        ("recipients", "readers", "share_with"), "First names of those who get it.",
        _always(type="array", items={"type": "string"}), _several_of(PEOPLE), ("with {}",),
    ),
    "tags": Parameter(
        ("tags", "labels"), "Labels of the {thing}.", _always(type="array", items={"type": "string"}),
        _several_of(TAGS), ("tagged {}", "labelled {}"),
    ),
    "pages": Parameter(
        ("pages", "page_numbers"), "The pages that are meant.", _always(type="array", items={"type": "integer"}),
        _several_numbers, ("taking pages {} only", "only pages {}"),
    ),
    "language": Parameter(
        ("language", "lang"), "Language of the {thing}.", _some_of(*LANGUAGES), _enumerated, ("in {}",)
    ),
    "into": Parameter(
        ("target_language", "into"), "Language to translate into.", _some_of(*LANGUAGES), _enumerated, ("into {}",)
    ),
    "file_type": Parameter(
        ("format", "file_type"), "Type of the file.", _some_of("pdf", "html", "docx", "epub", "txt"), _enumerated,
        ("as a {} file", "in {} format"),
    ),
    "copies": Parameter(
        ("copies", "num_copies"), "Number of copies.", _always(type="integer", minimum=1), _whole(2, 40),
        ("in {} copies", "making {} copies"),
    ),
    "limit": Parameter(
        ("limit", "max_results", "top_k"), "Most results to return.", _always(type="integer", minimum=1), _whole(2, 50),
        ("giving at most {} results", "with no more than {} results"),
    ),
    "priority": Parameter(
        ("priority", "urgency"), "How urgent it is.", _some_of("low", "normal", "high", "critical"), _enumerated,
        ("with {} priority",),
    ),
    "public": Parameter(
        ("public", "is_public"), "Whether everyone may see it.", BOOLEAN,
        _either("visible to everyone", "not visible to the public"),
    ),
    "email": Parameter(
        ("email", "send_to"), "Mail address that gets a copy.", _always(type="string", format="email"), _address,
        ("with a copy to {}",),
    ),
    "room": Parameter(("room", "where"), "Room of the house.", _some_of(*ROOMS), _enumerated, ("in the {}",)),
    "percent": Parameter(
        ("level", "percent", "intensity"), "Level in percent.", _always(type="integer", minimum=0, maximum=100),
        _whole(5, 100), ("at {} percent", "at a level of {}%"),
    ),
    "hours": Parameter(
        ("hours", "duration_hours"), "Duration in hours.", _always(type="number", minimum=0), _decimal(2, 12, 1),
        ("for {} hours",),
    ),
    "zones": Parameter(
        ("zones", "circuits"), "Numbers of the zones.", _always(type="array", items={"type": "integer"}),
        _several_numbers, ("in zones {}", "for zones {}"),
    ),
    "days": Parameter(
        ("days", "weekdays"), "Days of the week.", _always(type="array", items={"type": "string", "enum": list(DAYS)}),
        _several_enumerated, ("every {}", "each {}"),
    ),
    "sound": Parameter(
        ("sound", "play_sound"), "Whether to make a sound.", BOOLEAN, _either("with a sound", "without any sound")
    ),
    "delay": Parameter(
        ("delay_seconds", "wait_s"), "Seconds to wait before.", _always(type="integer", minimum=0), _whole(3, 90),
        ("after a delay of {} seconds", "{} seconds from now"),
    ),
}  # fmt: skip
