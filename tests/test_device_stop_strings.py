"""A stop string ends the text where it first appears, however tokens divide it."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from device.text.stop_strings import StopStrings


def feed_all(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stop_strings, text = StopStrings(stops), ""
    for piece in pieces:
        text += stop_strings.feed(piece)
        if stop_strings.reached:
            break
    return text + stop_strings.flush(), stop_strings.reached


@example(["ab", "c"], ["abc", "b"])
@example(["a", "b", "d"], ["abc", "b"])
@example(["ab"], ["abc", "b"])
@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    text, reached = feed_all(pieces, stops)
    full_text = "".join(pieces)
    assert reached == any(stop in full_text for stop in stops)
    assert text == min((full_text.partition(stop)[0] for stop in stops), key=len, default=full_text)


@pytest.mark.parametrize(
    ("piece", "passed_on"), [("Rivers", "Rivers"), ("Rivers\n", "Rivers"), ("\n\nEnd", ""), ("a\nb", "a\nb")]
)
def test_only_a_possible_start_of_a_stop_string_is_held_back(piece: str, passed_on: str) -> None:
    assert StopStrings(["\n\n"]).feed(piece) == passed_on
