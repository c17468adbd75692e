"""Names of a text: capitalised words, as in English. The rules are ours and need no model.

A name at the beginning of a sentence may be a plain word there, so it counts only if the text has it again.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

SHORTEST_WORD = 3  # letters of a name of one word
_TOKEN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+|(?<=[0-9])[.,](?=[0-9])[^\W_]+)*|\n|[^\s\w]|_+")
_ENDS = frozenset(".!?\u2026:\n")  # of sentences, and before a new one
_OPENINGS = frozenset("\"'\u201c\u2018\u00ab([{*#>-\u2022")  # signs that may stand before the first word
_POSSESSIVE = ("'s", "\u2019s")
_TITLES = frozenset(("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Jr", "Sr", "Gen", "Col", "Capt", "Sen", "Rep", "Gov"))
_CONNECTORS = frozenset(("of", "the", "de", "van", "von", "der", "la", "le", "du", "da", "di", "al", "bin", "del"))
# Capitalised, but no part of a name where they begin a sentence. Months and days are no names anywhere.
_PLAIN_TEXT = """
a after again all also although an and answer any are as at because before between both but by can could did do does
each either every few finally first for from had has have he hence her here his how however i if in into is it its
later let many may more most much my neither next no nor not note now of on once one only or other our over second she
should since so solution some soon step still such than that the their then there therefore these they this those
though three through thus to today two under unless until was we were what when where whether which while who whom
whose why will with without would yes yet you your
"""
_PLAIN_WORDS = frozenset(_PLAIN_TEXT.split())
_NO_BEGINNINGS = _PLAIN_WORDS | _CONNECTORS
_CALENDAR_TEXT = """
January February March April May June July August September October November December Jan Feb Mar Apr Jun Jul Aug
Sep Sept Oct Nov Dec Monday Tuesday Wednesday Thursday Friday Saturday Sunday
"""
_CALENDAR = frozenset(_CALENDAR_TEXT.split())


class Name(NamedTuple):
    """A name of a text: text[start:end], with single spaces between its words."""

    text: str
    start: int
    end: int


class _Word(NamedTuple):
    text: str
    start: int
    end: int
    begins_sentence: bool
    follows: bool  # nothing but white space, or the full stop of an initial, is before it and after the last word


def names_in(text: str) -> list[Name]:
    """Returns the names of a text in order: of several words, of one word inside a sentence, and acronyms."""
    runs = [_stripped(run) for run in _runs(text)]
    names = [(_name(text, run), run[0].begins_sentence and not _is_acronym(run)) for run in runs if run]
    count = Counter(name.text for name, _ in names)
    return [name for name, is_doubtful in names if not is_doubtful or count[name.text] > 1]


def _words(text: str) -> Iterator[_Word]:
    begins, follows, last = True, False, ""
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token[0].isalnum():
            yield _Word(token, match.start(), match.end(), begins, follows)
            begins, follows, last = False, True, token
        elif token == "." and (last in _TITLES or (len(last) == 1 and last.isupper())):
            continue  # an abbreviation, and not the end of a sentence
        else:
            begins = token in _ENDS or (begins and token in _OPENINGS)
            follows, last = False, ""


def _runs(text: str) -> Iterator[list[_Word]]:
    """Yields the longest sequences of capitalised words. Small words such as `of` may be between them."""
    run: list[_Word] = []
    between: list[_Word] = []
    for word in _words(text):
        capital = word.text[0].isupper() and word.text not in _CALENDAR
        if run and not word.follows:
            yield run
            run, between = [], []
        if capital:
            run += [*between, word]
            between = []
        elif run and word.text in _CONNECTORS and len(between) < 2:
            between.append(word)
        elif run:
            yield run
            run, between = [], []
    if run:
        yield run


def _stripped(run: list[_Word]) -> list[_Word]:
    """Returns a run without plain words at its beginning; an empty one if it is no name."""
    first = next((i for i, word in enumerate(run) if word.text.casefold() not in _NO_BEGINNINGS), len(run))
    run = run[first:]
    if len(run) == 1 and not _is_acronym(run) and len(run[0].text) < SHORTEST_WORD:
        return []
    return run


def _is_acronym(run: list[_Word]) -> bool:
    return any(len(word.text) > 1 and word.text.isupper() for word in run)


def _name(text: str, run: list[_Word]) -> Name:
    start, end = run[0].start, run[-1].end
    if text[start:end].endswith(_POSSESSIVE):
        end -= 2
    return Name(" ".join(text[start:end].split()), start, end)
