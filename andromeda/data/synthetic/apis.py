"""Functions that do not exist: an action on a thing, under a name and with parameters drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from andromeda.data.synthetic.api_parameters import PARAMETERS, Schema
from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.split import Split, split_of
from andromeda.data.synthetic.words import phrases

MOST_PARAMETERS = 5
FIND, REFERENCE = "find", "reference"


@dataclass(frozen=True)
class Action:
    """What can be done with things of one kind.

    Attributes:
        names: first words of function names, of which one is used.
        requests: ways to ask for it, with {a} for the thing with its article, {the} with `the`.
        needed: parameters that are always there, and required.
        others: parameters that may be there.
    """

    names: tuple[str, ...]
    description: str
    requests: tuple[str, ...]
    needed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """Things that the same actions suit."""

    things: tuple[str, ...]
    actions: dict[str, Action]


KINDS: dict[str, Kind] = {
    "bookings": Kind(
        phrases(
            "kayak|meeting room|bicycle|guided tour|concert seat|ferry cabin|tennis court|delivery van|piano lesson|"
            "mountain hut|rowing boat|hotel suite|parking space|sauna|photo studio|camper van|ski pass|dance class|"
            "horse ride|wine tasting|locker|campsite|hair appointment|banquet hall|airport shuttle|cooking course|"
            "massage|bowling lane|city bus tour|rehearsal room|beach chair|dental visit|museum visit|theatre box|"
            "sailing trip|squash court|swimming lane|language course|moving truck|balloon flight"
        ),
        {
            "reserve": Action(
                ("reserve", "book"), "Reserves {a}.", ("reserve {a}", "book {a}", "get me {a}"), (),
                ("date", "time", "city", "person", "people", "price", "grade", "insurance", "notify", "extras"),
            ),
            "cancel": Action(
                ("cancel", "drop"), "Cancels the booking of {a}.",
                ("cancel {the} booking", "call off {the} booking", "cancel the booking of {the}"),
                (REFERENCE,), ("reason", "notify"),
            ),
            FIND: Action(
                ("find", "search"), "Searches for {a}.", ("find {a}", "look for {a}", "search for {a}"), (),
                ("city", "date", "people", "price", "radius", "grade", "limit"),
            ),
            "extend": Action(
                ("extend", "prolong"), "Extends the booking of {a}.",
                ("extend {the} booking", "prolong {the} booking"), (REFERENCE, "more_minutes"), ("notify",),
            ),
            "rebook": Action(
                ("rebook", "reschedule"), "Moves the booking of {a} to another day.",
                ("move {the} booking", "reschedule {the} booking"),
                (REFERENCE, "new_date"), ("time", "reason", "notify"),
            ),
            "insure": Action(
                ("insure", "add_insurance_to"), "Adds insurance to the booking of {a}.",
                ("insure {the} booking", "take out insurance for {the} booking"), (REFERENCE,), ("person", "price"),
            ),
        },
    ),
    "documents": Kind(
        phrases(
            "invoice|report|newsletter|recipe|contract|survey|playlist|poster|timetable|shopping list|travel diary|"
            "photo album|business card|exam paper|floor plan|manual|menu|meeting protocol|tax form|invitation|"
            "cookbook|glossary|press release|lecture|certificate|crossword|song sheet|packing list|quiz|budget plan|"
            "short story|calendar|brochure|work sheet|questionnaire|slide show|family tree|seating plan|reading list|"
            "letter"
        ),
        {
            "create": Action(
                ("create", "new", "make"), "Creates {a}.", ("create {a}", "make {a}", "set up {a}"), ("title",),
                ("tags", "language", "priority", "due", "public"),
            ),
            "delete": Action(
                ("delete", "erase"), "Deletes {a}.", ("delete {the}", "erase {the}", "get rid of {the}"),
                (REFERENCE,), ("reason",),
            ),
            FIND: Action(
                ("find", "search"), "Searches for {a}.", ("find {a}", "look for {a}", "search for {a}"), (),
                ("title", "tags", "language", "limit", "priority"),
            ),
            "share": Action(
                ("share", "circulate"), "Shares {a} with others.", ("share {the}",), (REFERENCE, "recipients"),
                ("due", "email", "priority"),
            ),
            "print": Action(
                ("print",), "Prints {a}.", ("print {the}", "put {the} on paper"), (REFERENCE,),
                ("copies", "pages", "priority"),
            ),
            "translate": Action(
                ("translate",), "Translates {a}.", ("translate {the}",), (REFERENCE, "into"), ("pages", "due"),
            ),
            "rename": Action(
                ("rename", "retitle"), "Gives {a} another title.", ("rename {the}", "change the title of {the}"),
                (REFERENCE, "new_title"), ("public",),
            ),
            "export": Action(
                ("export", "download"), "Saves {a} as a file.", ("export {the}", "save {the}"),
                (REFERENCE, "file_type"), ("pages", "email"),
            ),
        },
    ),
    "devices": Kind(
        phrases(
            "lamp|heater|ceiling fan|alarm clock|lawn sprinkler|door lock|camera|loudspeaker|dishwasher|humidifier|"
            "window blind|garage door|coffee machine|aquarium pump|doorbell|oven|radiator|smoke detector|"
            "vacuum robot|water boiler|television|washing machine|air purifier|night light|bread maker|"
            "electric blanket|rice cooker|sun shade|pet feeder|wine cooler|towel warmer|projector|soil sensor|"
            "motion sensor|fountain pump|floor heating|hair dryer|record player|garden light|toaster"
        ),
        {
            "start": Action(
                ("start", "turn_on", "activate"), "Turns {a} on.", ("turn on {the}", "switch on {the}", "start {the}"),
                ("room",), ("percent", "minutes", "delay", "sound"),
            ),
            "stop": Action(
                ("stop", "turn_off"), "Turns {a} off.", ("turn off {the}", "switch off {the}", "shut down {the}"),
                ("room",), ("delay", "sound"),
            ),
            "schedule": Action(
                ("schedule", "plan"), "Has {a} run at set times.",
                ("schedule {the} to run", "have {the} run"), ("time",), ("room", "days", "hours", "percent", "zones"),
            ),
            "check": Action(
                ("check", "get_status_of"), "Reports the state of {a}.",
                ("check {the}", "tell me the state of {the}", "see how {the} is doing"), ("room",), ("zones",),
            ),
            "set": Action(
                ("set_level_of", "adjust"), "Sets the level at which {a} works.",
                ("set {the}", "adjust {the} to work"), ("percent",), ("room", "zones", "hours"),
            ),
            "reset": Action(
                ("reset", "restart"), "Resets {a} to its factory state.",
                ("reset {the}", "put {the} back to its factory state"), ("room",), ("delay", "notify"),
            ),
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Role:
    """What a function does: an action on a thing."""

    kind: str
    action: str
    thing: str

    @property
    def content(self) -> str:
        """What decides the split: the thing, so that all functions about it are on one side.

        Under this heading the hash leaves each kind some things for testing.
        """
        return f"function {self.thing}"

    @property
    def how(self) -> Action:
        return KINDS[self.kind].actions[self.action]


@dataclass(frozen=True)
class Function:
    """A function as it is offered; `parameters` maps its names to the keys of PARAMETERS."""

    role: Role
    name: str
    parameters: dict[str, str]
    schemas: dict[str, Schema]
    required: tuple[str, ...]

    @property
    def tool(self) -> dict[str, Any]:
        """As the chat template takes it: OpenAI's form, with JSON Schema for the parameters."""
        properties = {
            name: {**self.schemas[name], "description": PARAMETERS[key].description.format(thing=self.role.thing)}
            for name, key in self.parameters.items()
        }
        schema = {"type": "object", "properties": properties, "required": list(self.required)}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.role.how.description.format(a=with_article(self.role.thing)),
                "parameters": {**schema, "additionalProperties": False},
            },
        }


def draw_function(draws: Draws, role: Role) -> Function:
    """The role under one of its names, with some of the parameters that suit it, required or optional."""
    keys = [*role.how.needed]
    room = min(MOST_PARAMETERS - len(keys), len(role.how.others))
    keys += draws.sample(role.how.others, draws.between(0 if keys else 1, room))
    names = {key: draws.choice(PARAMETERS[key].names) for key in keys}
    order = draws.shuffled(keys)
    required = {key for key in keys if key in role.how.needed or draws.chance(3)} or {keys[0]}
    return Function(
        role,
        _written(draws, [*draws.choice(role.how.names).split("_"), *role.thing.split()]),
        {names[key]: key for key in order},
        {names[key]: PARAMETERS[key].schema(draws) for key in order},
        tuple(names[key] for key in order if key in required),
    )


@cache
def roles(split: Split) -> tuple[Role, ...]:
    """All of the split."""
    every = (Role(kind, action, thing) for kind, of in KINDS.items() for thing in of.things for action in of.actions)
    return tuple(role for role in every if split_of(role.content) == split)


def draw_others(draws: Draws, taken: Sequence[Role], count: int, split: Split) -> list[Role]:
    """Further roles: about half of them on the thing or with the action of one that is taken, the hard ones."""
    chosen: list[Role] = []
    while len(chosen) < count:
        role = draws.choice(_near(draws.choice(taken), split) if draws.chance(2) else roles(split))
        if role not in taken and role not in chosen:
            chosen.append(role)
    return chosen


@cache
def _near(role: Role, split: Split) -> tuple[Role, ...]:
    """The roles on the same thing or with the same action, the role itself among them."""
    action = (role.kind, role.action)
    return tuple(other for other in roles(split) if other.thing == role.thing or (other.kind, other.action) == action)


def with_article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _written(draws: Draws, words: list[str]) -> str:
    """A function's name: camelCase, one in four, or snake_case."""
    if draws.chance(4):
        return words[0] + "".join(word.capitalize() for word in words[1:])
    return "_".join(words)
