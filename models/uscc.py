"""Unified social credit code (统一社会信用代码, GB 32100-2015): normalise, check, classify, mask.

18 characters over an alphabet of 31 (digits and capitals without I, O, S, V, Z; a value is the place in the alphabet):
registering department, kind of body, 6 digits of region (GB/T 2260), 9 of the body's own code (GB 11714), check:
    check = (31 - sum(value_i * 3**(i-1) mod 31) mod 31) mod 31      (a remainder of 0 gives the check character "0")
The body's own code has a check character of its own (GB 11714: weights 3 7 9 10 5 8 4 2 over 0-9A-Z, 11 - sum mod 11,
10 is X, 11 is 0). Nearly all real codes keep it, GB 32100 does not demand it: a warning, not an error.
First characters may be letters (A, N, Y ...). Codes from 92 on belong to individuals' businesses (个体工商户): personal
data under the PIPL. USCC are enumerable: a hash of one hides nothing.
"""

import re
import unicodedata
from dataclasses import dataclass

from models.errors import DataError

ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"
LENGTH = 18

_VALUE = {character: value for value, character in enumerate(ALPHABET)}
_WEIGHTS = tuple(pow(3, place, 31) for place in range(LENGTH - 1))
_BODY_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BODY_WEIGHTS = (3, 7, 9, 10, 5, 8, 4, 2)
_REGION = slice(2, 8)
_BODY = slice(8, 17)
# blanks, zero-width and direction marks that spreadsheets and web pages leave inside codes
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u202a-\u202e\u2060\ufeff]+")


@dataclass(frozen=True, kw_only=True, repr=False)
class Uscc:
    """A valid code. `personal`: starts with 92. `body_check_holds`: the inner GB 11714 check character fits."""

    code: str
    personal: bool
    body_check_holds: bool

    def __repr__(self) -> str:
        return f"Uscc({mask(self.code)!r})"


def normalise(text: str) -> str:
    """Half-width, upper case, without blanks and invisible marks. Does not check, and does not guess O for 0."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).upper()


def parse(text: str) -> Uscc:
    """The valid code in `text` after `normalise`; DataError says what is wrong, with the code masked."""
    code = normalise(text)
    if len(code) != LENGTH:
        raise DataError(f"unified social credit code {mask(code)} has {len(code)} characters, must have {LENGTH}")
    odd = [place + 1 for place, character in enumerate(code) if character not in _VALUE]
    if odd:
        raise DataError(
            f"unified social credit code {mask(code)} has at place {odd[0]} none of the characters {ALPHABET}"
        )
    if not code[_REGION].isdecimal():
        raise DataError(f"unified social credit code {mask(code)} must have digits (the region) at places 3 to 8")
    if check_character(code[:-1]) != code[-1]:
        # the right character is not told: it would turn a typing error into somebody else's valid code
        raise DataError(
            f"unified social credit code {mask(code)} fails its check character; compare it with the licence"
        )
    body = code[_BODY]
    holds = all(c in _BODY_ALPHABET for c in body) and body_check_character(body[:-1]) == body[-1]
    return Uscc(code=code, personal=code.startswith("92"), body_check_holds=holds)


def is_valid(text: str) -> bool:
    """Whether `parse` accepts the text."""
    try:
        parse(text)
    except DataError:
        return False
    return True


def check_character(first17: str) -> str:
    """18th character for the first 17 (GB 32100-2015). ValueError for another length or alphabet."""
    if len(first17) != LENGTH - 1 or any(character not in _VALUE for character in first17):
        raise ValueError(f"needs {LENGTH - 1} characters of {ALPHABET}")
    total = sum(_VALUE[character] * weight for character, weight in zip(first17, _WEIGHTS, strict=True))
    return ALPHABET[(31 - total % 31) % 31]


def body_check_character(first8: str) -> str:
    """9th character of an organisation code for its first 8 (GB 11714-1997): a digit or X."""
    if len(first8) != len(_BODY_WEIGHTS) or any(character not in _BODY_ALPHABET for character in first8):
        raise ValueError(f"needs {len(_BODY_WEIGHTS)} characters of 0-9 A-Z")
    total = sum(
        _BODY_ALPHABET.index(character) * weight for character, weight in zip(first8, _BODY_WEIGHTS, strict=True)
    )
    return {10: "X", 11: "0"}.get(11 - total % 11, str(11 - total % 11))


def mask(text: str) -> str:
    """For logs: the first 2 characters and the last one, the rest as *; anything not 18 long is masked wholly.

    Left readable: department and kind of body, and the check character. The region is hidden: with it, a name is one
    search away.
    """
    return f"{text[:2]}{'*' * (LENGTH - 3)}{text[-1]}" if len(text) == LENGTH else "*" * min(len(text), LENGTH)
