"""A stop string ends the text where it first appears, wherever tokens cut it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.stop_strings import StopStrings


def passed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    strings, text = StopStrings(stops), ""
    for piece in pieces:
        text += strings.pass_on(piece)
        if strings.reached:
            break
    return text + strings.rest(), strings.reached


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    text, reached = passed(pieces, stops)
    whole = "".join(pieces)
    assert reached == any(stop in whole for stop in stops)
    assert text == min((whole.partition(stop)[0] for stop in stops), key=len, default=whole)


@pytest.mark.parametrize(
    ("piece", "comes_through"), [("Rivers", "Rivers"), ("Rivers\n", "Rivers"), ("\n\nEnd", ""), ("a\nb", "a\nb")]
)
def test_only_what_may_begin_a_stop_string_is_held_back(piece: str, comes_through: str) -> None:
    assert StopStrings(["\n\n"]).pass_on(piece) == comes_through
