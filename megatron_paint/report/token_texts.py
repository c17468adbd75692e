"""The text of each token of a response, so that the pieces put together are the response."""

from collections.abc import Sequence

from megatron_paint.data.decoding import Decode

BROKEN = "\N{REPLACEMENT CHARACTER}"  # decoding returns it for an incomplete character
LONGEST_CHARACTER = 4  # tokens
MOST_KNOWN = 500_000  # texts that are remembered


class TokenTexts:
    """Decodes single tokens and remembers their texts: a run repeats few tokens many times."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self._known: dict[tuple[int, ...], str] = {}

    def text(self, *ids: int) -> str:
        """The text of a few tokens in a row."""
        found = self._known.get(ids)
        if found is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[ids] = found = self.decode(list(ids))
        return found

    def pieces(self, ids: Sequence[int], text: str) -> list[tuple[str, int]] | None:
        """The text in pieces, each with its number of tokens. None: the tokens do not spell this text.

        A piece is one token, or the tokens of one character. A tokenizer that drops the first space of a text gets
        its pieces from pairs of tokens.
        """
        for divide in (self._alone, self._in_pairs):
            found = divide(ids)
            if "".join(piece for piece, _ in found) == text:
                return found
        return None

    def _alone(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        pieces, start = [], 0
        for end in range(1, len(ids) + 1):
            group = ids[start:end]
            piece = self.text(*group)
            if piece.endswith(BROKEN) and len(group) < LONGEST_CHARACTER and end < len(ids):
                continue
            pieces.append((piece, len(group)))
            start = end
        return pieces

    def _in_pairs(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        pieces = []
        for index, token in enumerate(ids):
            before = self.text(ids[index - 1]) if index else ""
            both = self.text(ids[index - 1], token) if index else self.text(token)
            pieces.append((both.removeprefix(before), 1))
        return pieces


def length_in_browser(text: str) -> int:
    """The length of a text in UTF-16 units, in which a browser counts."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2
