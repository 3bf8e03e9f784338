"""Vectors of GB 32100-2015 (DOMAIN 2d), and the laws of check characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import DataError
from models.uscc import ALPHABET, body_check_character, check_character, is_valid, mask, normalise, parse

VALID = [
    "91110000600037341L",  # python-stdnum's documentation
    "91110108551385082Q",
    "91350100M000100Y43",  # the worked example of the standard
    "91110000802100433B",
    "9144030071526726XG",
    "914403001922038216",
    "91110000MA00000820",  # remainder 0: alphabet[31] does not exist
    "N2330108MA00000150",  # letters first: rural collectives, others
    "Y1310000MA0000015R",
]
WRONG_CHECK = ["91110000600037341N", "91440300713555564J", "91310000MA1FL6NCX7"]

first17 = st.tuples(
    st.text(ALPHABET, min_size=2, max_size=2),
    st.text("0123456789", min_size=6, max_size=6),
    st.text(ALPHABET, min_size=9, max_size=9),
).map("".join)


@pytest.mark.parametrize("code", VALID)
def test_valid_codes_pass(code: str) -> None:
    assert parse(code).code == code
    assert is_valid(code)


@pytest.mark.parametrize(("code", "right"), list(zip(WRONG_CHECK, "L95", strict=True)))
def test_wrong_check_characters_are_refused(code: str, right: str) -> None:
    assert check_character(code[:-1]) == right
    with pytest.raises(DataError, match="check character"):
        parse(code)


def test_known_check_characters() -> None:
    assert check_character("91350100M000100Y4") == "3"
    assert check_character("91110000MA0000082") == "0"  # the remainder is 0
    with pytest.raises(DataError, match="has at place 18 none"):
        parse("91350100M000100Y4Z")


@pytest.mark.parametrize("letter", "IOSVZ")
def test_excluded_letters_are_refused_with_their_place(letter: str) -> None:
    with pytest.raises(DataError, match="at place 10"):
        parse(f"91110108M{letter}0000000Q")


def test_region_must_be_digits() -> None:
    head = "91A1010855138508Q"
    with pytest.raises(DataError, match="places 3 to 8"):
        parse(head + check_character(head))


@pytest.mark.parametrize("text", ["", "9", "91110000600037341", "91110000600037341L0"])
def test_length_is_said(text: str) -> None:
    with pytest.raises(DataError, match=f"has {len(text)} characters"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "91110000600037341l",
        " 911100 0060003 7341L\n",
        "９１１１００００６０００３７３４１Ｌ",
        "91110000\u3000600037341L",
        "\ufeff9111\u200b0000600037341L\xa0",
    ],
)
def test_normalises_what_people_type(text: str) -> None:
    assert normalise(text) == "91110000600037341L"
    assert parse(text).code == "91110000600037341L"


def test_letters_are_not_guessed() -> None:
    # O for 0 is the most frequent typing error; guessing would turn it into somebody's valid code
    assert not is_valid("9111OOOO600037341L")


def test_body_check_is_reported_not_demanded() -> None:
    assert parse("91110108551385082Q").body_check_holds
    assert parse("9144030071526726XG").body_check_holds  # remainder 1: the check is X
    head = "91110108551385083"
    odd = parse(head + check_character(head))
    assert not odd.body_check_holds


@pytest.mark.parametrize(
    ("first8", "check"), [("55138508", "2"), ("71526726", "X"), ("MA000001", "5"), ("00000000", "0")]
)
def test_body_check_characters(first8: str, check: str) -> None:
    assert body_check_character(first8) == check


def test_individuals_are_personal() -> None:
    head = "92330108MA0000015"
    assert parse(head + check_character(head)).personal
    assert not parse("91110108551385082Q").personal


@given(first17)
@settings(derandomize=True, deadline=None)
def test_a_check_character_makes_a_valid_code(head: str) -> None:
    assert parse(head + check_character(head)).code == head + check_character(head)


@given(first17, st.integers(0, 17), st.sampled_from(ALPHABET))
@settings(derandomize=True, deadline=None)
def test_one_wrong_character_is_always_found(head: str, place: int, other: str) -> None:
    code = head + check_character(head)
    changed = code[:place] + other + code[place + 1 :]
    assert is_valid(changed) == (changed == code)


@given(first17, st.integers(0, 15))
@settings(derandomize=True, deadline=None)
def test_swapped_neighbours_are_always_found(head: str, place: int) -> None:
    code = head + check_character(head)
    swapped = code[:place] + code[place + 1] + code[place] + code[place + 2 :]
    assert is_valid(swapped) == (swapped == code)


@pytest.mark.parametrize(
    ("function", "text"), [(check_character, "9"), (check_character, "I" * 17), (body_check_character, "a" * 8)]
)
def test_check_characters_refuse_other_input(function: object, text: str) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="needs"):
        function(text)


def test_nothing_prints_a_code() -> None:
    code = "91110108551385082Q"
    assert mask(code) == "91***************Q"
    assert mask("911101") == "******"
    assert "551385082" not in repr(parse(code))
    with pytest.raises(DataError) as caught:
        parse("91110108551385082A")
    assert "551385082" not in str(caught.value)
