"""Domains: for each kind of problems, which anchors their solutions have and how responses to them are graded."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from megatron_paint.config.dialect import Flag, Text, setting, settings_class

DEFAULT_DOMAIN = "math"  # of rows that name none, unless data.domain or evaluation.domain names another
GRADERS = ("math", "exact", "choice", "regex")
BOXED_GRADERS = ("math",)  # those for which an answer is a box and nothing else
NAME = re.compile(r"[\w-]+", re.ASCII)
FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


@settings_class
class DomainSettings:
    """A domain of problems. A row names its domain in data.columns.domain; NAME is yours."""

    anchors: Annotated[
        Text | None,
        setting("anchor extractor of the solutions: math, code or text; null: that of objective.reveal.anchors"),
    ] = None
    grader: Annotated[
        Text,
        setting(
            "how responses are graded; math: the last box by value; exact: the final answer as text; choice: the "
            "letter of a choice; regex: what `pattern` finds; module:function: your own function"
        ),
    ] = "math"
    pattern: Annotated[
        Text | None,
        setting("grader=regex: a Python regular expression with one group, the answer; its last match counts"),
    ] = None
    ignore_case: Annotated[Flag, setting("grader=exact, regex: whether capital and small letters are the same")] = False
    white_space: Annotated[
        Literal["strip", "collapse", "remove"],
        setting(
            "grader=exact, regex: strip: white space at both ends does not count; collapse: also, any white space "
            "inside counts as one space; remove: no white space counts"
        ),
    ] = "strip"

    @property
    def function(self) -> str | None:
        """The user's `module:function`; None for a grader of the package."""
        return self.grader if ":" in self.grader else None


DEFAULTS = DomainSettings()


def known_domains(domains: Mapping[str, DomainSettings]) -> tuple[str, ...]:
    """Returns the names that a row may have: those of the section `domains`, and math."""
    return tuple(dict.fromkeys([*domains, DEFAULT_DOMAIN]))


def domain_of(domains: Mapping[str, DomainSettings], name: str) -> DomainSettings:
    """Returns the settings of a known domain. `math` has the defaults if the section does not name it."""
    return domains.get(name, DEFAULTS) if name == DEFAULT_DOMAIN else domains[name]


def contradictions_of(domains: Mapping[str, DomainSettings], defaults: Mapping[str, str]) -> Iterator[str]:
    """Yields what is wrong with the section `domains`. defaults: data.domain and evaluation.domain by their key."""
    for name, domain in domains.items():
        key = f"domains.{name}"
        if not NAME.fullmatch(name):
            yield f"{key}: {name!r} is no name of a domain: use letters, digits, - and _"
        if domain.grader not in GRADERS and not FUNCTION.fullmatch(domain.grader):
            yield (
                f"{key}.grader={domain.grader} is no grader: the graders are {', '.join(GRADERS)}, and module:function "
                "for a function of yours"
            )
        yield from _of_pattern(key, domain)
        compared = domain.grader in ("exact", "regex")
        for option in ("ignore_case", "white_space"):
            if not compared and getattr(domain, option) != getattr(DEFAULTS, option):
                yield (
                    f"{key}.{option}={_text(getattr(domain, option))} belongs to grader=exact and regex, but "
                    f"grader={domain.grader}; leave {option} out"
                )
    known = known_domains(domains)
    for key, name in defaults.items():
        if name not in known:
            yield f"{key}={name} is no domain: the domains are {', '.join(known)}; add it to the section domains"


def _of_pattern(key: str, domain: DomainSettings) -> Iterator[str]:
    if domain.grader != "regex":
        if domain.pattern is not None:
            yield f"{key}.pattern belongs to grader=regex, but grader={domain.grader}; leave pattern out"
        return
    if domain.pattern is None:
        yield f"{key}.pattern is not set: grader=regex searches for it; set it to a pattern with one group"
        return
    try:
        groups = re.compile(domain.pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        yield f"{key}.pattern={domain.pattern} is no regular expression: {error}"
        return
    if groups != 1:
        yield (
            f"{key}.pattern={domain.pattern} has {groups} groups; it must have one, which is the answer. Write other "
            "groups as (?:...)"
        )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
