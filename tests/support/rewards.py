"""A reward for runs in tests: the responses of a random model differ in it."""


def even(response: str, answer: str, problem: dict) -> bool:
    """Whether the sum of the characters is even."""
    return sum(map(ord, response)) % 2 == 0
