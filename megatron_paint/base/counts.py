"""Counts in messages: `1 problem`, `2 problems`, `1,234 problems`."""


def count_text(number: int, noun: str) -> str:
    """A number and its noun, which is given in the singular: `count_text(2, "process")` is `2 processes`."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of a noun, such as `processes`, `entries` or `keys`."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def agreeing(number: int, one: str, many: str) -> str:
    """The form of a verb or pronoun that belongs to a number: `agreeing(2, "has", "have")` is `have`."""
    return one if number == 1 else many
