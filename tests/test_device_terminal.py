"""The terminal shows unverified text at once, and strikes through what is replaced; a pipe gets verified text alone."""

import io

import pytest
from rich.console import Console

import device.terminal
from device.answers.answer import TextChunk
from device.session.session import AnswerToken, Origin
from device.terminal import ORIGIN_STYLES, AnswerDisplay
from tests.screen import Screen

WIDTH, HEIGHT = 16, 6


def committed(text: str, unverified: str = "") -> TextChunk:
    return TextChunk(text, Origin.ACCEPTED, AnswerToken(1, Origin.ACCEPTED), unverified)


def drafted(unverified: str) -> TextChunk:
    return TextChunk("", Origin.UNVERIFIED, None, unverified)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    output = io.StringIO()
    console = Console(
        file=output,
        force_terminal=True,
        color_system="standard",
        width=WIDTH,
        height=HEIGHT,
        highlight=False,
        soft_wrap=True,
    )
    monkeypatch.setattr(device.terminal, "console", console)
    return output


@pytest.mark.parametrize("first", ["", "one", "one two three four five", "x" * WIDTH, "line\n", "a\nb\n"])
@pytest.mark.parametrize("rest", ["good bad", "good bad and a long one\nof lines", "x" * 2 * WIDTH])
def test_replaced_text_is_struck_through_and_its_replacement_follows(
    written: io.StringIO, first: str, rest: str
) -> None:
    display = AnswerDisplay(origins=False)
    display.show(committed(first))
    for end in range(1, len(rest) + 1):
        display.show_unverified(drafted(rest[:end]))
    assert Screen(WIDTH, written.getvalue()).text() == (first + rest).replace("\n", "")
    display.show(committed(rest[:4], rest[4:]))
    assert Screen(WIDTH, written.getvalue()).text(struck=True) == ""
    display.show(committed("!new"))
    display.show(committed(" text"))
    screen = Screen(WIDTH, written.getvalue())
    assert screen.text(struck=True) == rest[4:].replace("\n", "")
    assert screen.text() == f"{first}{rest[:4]}!new text".replace("\n", "")


def test_a_second_replacement_is_struck_where_it_stands(written: io.StringIO) -> None:
    display = AnswerDisplay(origins=False)
    for right in ["one ", "two ", "three "]:
        display.show_unverified(drafted("wrong and wrong again "))
        display.show(committed(right))
    screen = Screen(WIDTH, written.getvalue())
    assert screen.text() == "one two three "
    assert screen.text(struck=True) == "wrong and wrong again " * 3


def test_replaced_text_that_has_left_the_screen_is_struck_as_far_as_it_is_seen(written: io.StringIO) -> None:
    display = AnswerDisplay(origins=False)
    lines = [f"line {number}\n" for number in range(HEIGHT + 3)]
    display.show_unverified(drafted("".join(lines)))
    display.show(committed("right"))
    assert f"\x1b[{HEIGHT - 1}A" in written.getvalue()
    assert Screen(WIDTH, written.getvalue()).text(struck=True) == "".join(lines[4:]).replace("\n", "")


def test_unverified_tokens_have_their_color_without_being_asked_for(written: io.StringIO) -> None:
    display = AnswerDisplay(origins=False)
    display.show(committed("plain"))
    display.show_unverified(drafted("unverified"))
    assert written.getvalue() == "plain\x1b[33munverified\x1b[0m"
    assert ORIGIN_STYLES[Origin.UNVERIFIED] == "yellow"


def test_a_pipe_gets_unverified_text_only_at_the_end_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(device.terminal, "console", Console(file=output, soft_wrap=True))
    display = AnswerDisplay(origins=False)
    display.show_unverified(drafted("wrong"))
    display.show(committed("right ", "and"))
    assert output.getvalue() == "right "
    display.show(TextChunk("and so on", Origin.UNVERIFIED, None))
    assert output.getvalue() == "right and so on"
