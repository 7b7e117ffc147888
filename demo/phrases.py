"""The wording of the demo world: what is said about events, how questions are asked and answered.

Every reply begins with a space and ends with a full stop, so that replies which were moved into
`previous text` read as sentences, and their tokens are those of the concatenated text.
"""

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("left", "right", "top", "bottom", "centre")
NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"),
    *("tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth"),
    *("seventeenth", "eighteenth", "nineteenth", "twentieth"),
)
MAX_COUNT = len(ORDINALS)

# Standing instructions a session may pin. They ask for the same thing.
QUERIES = (
    "Say what happens.",
    "Describe what happens in the video.",
    "Narrate the scene live.",
    "Tell me what you see.",
    "Please comment on the video.",
)


def enters(ordinal: int, colour: str, shape: str) -> str:
    """The `ordinal`-th (from 1) shape of this colour in the whole video comes in."""
    return f" {ORDINALS[ordinal - 1]} {colour} {shape} enters."


def leaves(colour: str, shape: str) -> str:
    """A shape goes out."""
    return f" {colour} {shape} leaves."


def turns(colour: str, shape: str, new_colour: str) -> str:
    """A shape changes its colour."""
    return f" {colour} {shape} turns {new_colour}."


def bounces(colour: str, shape: str) -> str:
    """A shape touches a wall."""
    return f" {colour} {shape} bounces."


def ask_how_many() -> tuple[str, ...]:
    """Ways to ask for the number of shapes on screen."""
    return ("How many shapes are there?", "How many shapes do you see?")


def ask_colour(shape: str) -> tuple[str, ...]:
    """Ways to ask for the colour of the only shape of its kind."""
    return (f"What colour is the {shape}?", f"Which colour is the {shape}?")


def ask_where(colour: str, shape: str) -> tuple[str, ...]:
    """Ways to ask where a shape is."""
    return (f"Where is the {colour} {shape}?", f"Where do you see the {colour} {shape}?")


def ask_last() -> tuple[str, ...]:
    """Ways to ask what came in last."""
    return ("What entered last?", "Which shape entered last?")


def ask_entered(colour: str, shape: str) -> tuple[str, ...]:
    """Ways to ask how often a shape of this colour has come in."""
    return (
        f"How many {colour} {shape}s have entered?",
        f"How many {colour} {shape}s entered so far?",
    )


def answer_how_many(count: int) -> str:
    """Answer to `ask_how_many`."""
    return f" {NUMBERS[count]} {'shape' if count == 1 else 'shapes'}."


def answer_colour(colour: str) -> str:
    """Answer to `ask_colour`."""
    return f" {colour}."


def answer_where(place: str) -> str:
    """Answer to `ask_where`."""
    return f" {place}."


def answer_last(colour: str, shape: str) -> str:
    """Answer to `ask_last`."""
    return f" {colour} {shape}."


def answer_entered(count: int) -> str:
    """Answer to `ask_entered`."""
    return f" {NUMBERS[count] if count else 'none'}."
