"""A chat: turns, commands, lines that continue, Ctrl-C; each answer is the target's on what the conversation holds."""

import os
import pty
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from device.answers.answer import Conversation, TextChunk
from device.chat import Chat
from device.planning.planners import Planners
from device.session.session import Origin
from device.terminal import ORIGIN_STYLES, AnswerDisplay
from device.text.tokenizer import ChatMessage, Tokenizer
from protocol.messages import Draft, Extend, Message, Resume, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, target_alone
from tests.link_pair import CopyCount, MemoryTransport, Station, deliver_once, join
from tests.number_service import DRAFT, TARGET, NumberTokenizer, new_station, settings

TOKENS = 12


class PromptRecorder(NumberTokenizer):
    """Keeps each prompt: the target, a table, sees no further back than a token."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = (), continue_final: bool = False
    ) -> list[int]:
        self.prompts.append(super().encode_chat(messages, tools, continue_final))
        return self.prompts[-1]


class Terminal:
    """What the user types, and what the chat answers to each text; ``stop_after`` presses Ctrl-C at that token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[list[int]] = []
        self.tokenizer = PromptRecorder()
        self.stop_after: dict[int, int] = {}
        self.station = new_station()
        self.up: CopyCount = deliver_once
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(AnswerDisplay, "show", lambda _, chunk: self._show(chunk))

    def chat(self, lines: Sequence[str], system: str | None = None) -> list[list[int]]:
        typed = iter(lines)

        def read(prompt: str) -> str:
            if prompt == "> ":
                self.shown.append([])
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        self._monkeypatch.setattr("builtins.input", read)
        model = FakeDraftModel.make(DRAFT)
        client, _ = join(self.station, model, MemoryTransport(self.station, up=self.up))
        tokenizer = cast(Tokenizer, self.tokenizer)
        conversation = Conversation(client, Planners(model.manifest.quality), model, tokenizer, settings(Sampling()))
        Chat(conversation, TOKENS, False, system).run()
        return self.shown[:-1]

    def _show(self, chunk: TextChunk) -> None:
        self.shown[-1].append(int(chunk.text))
        if len(self.shown[-1]) == self.stop_after.get(len(self.shown)):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def answer(*parts: list[int]) -> list[int]:
    return [*target_alone(TARGET, [number for part in parts for number in part], TOKENS)]


FIRST, SECOND = [3, 1, 4], [9, 2, 6]


def test_a_turn_continues_the_conversation(terminal: Terminal) -> None:
    first, second = terminal.chat(["3 1 4", "9 2 6"])
    assert first == answer(FIRST)
    assert second == answer(FIRST, first, SECOND)
    assert terminal.tokenizer.prompts == [FIRST, [*FIRST, *first, *SECOND]]


def test_reset_forgets_all_turns_but_the_system_prompt(terminal: Terminal) -> None:
    shown = terminal.chat(["3 1 4", "/reset", "9 2 6"], system="5 5")
    assert shown == [answer([5, 5], FIRST), [], answer([5, 5], SECOND)]
    assert terminal.tokenizer.prompts == [[5, 5, *FIRST], [5, 5, *SECOND]]


def test_system_sets_the_system_prompt_and_forgets_all_turns(terminal: Terminal) -> None:
    assert terminal.chat(["3 1 4", "/system 7 8", "9 2 6"]) == [answer(FIRST), [], answer([7, 8], SECOND)]
    assert terminal.tokenizer.prompts == [FIRST, [7, 8, *SECOND]]


def test_a_backslash_continues_the_line(terminal: Terminal) -> None:
    assert terminal.chat(["3 1\\", "4"]) == [answer(FIRST)]
    assert terminal.tokenizer.prompts == [FIRST]


def test_an_empty_line_ends(terminal: Terminal) -> None:
    assert terminal.chat(["", "3 1 4"]) == []


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    return stderr


def test_a_prompt_beyond_the_context_ends_its_turn_alone(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.station = Station(FakeTarget.make(TARGET, context_length=40))
    first, second, third = terminal.chat(["3 1 4", "1 " * 40, "9 2 6"])
    assert (first, second, third) == (answer(FIRST), [], answer(FIRST, first, SECOND))
    assert "the target's context" in one_error(capsys)


@pytest.mark.parametrize("lost", [(Extend, Draft, Resume), (Draft, Resume)])
def test_a_base_station_that_is_away_ends_a_turn_alone(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], lost: tuple[type[Message], ...]
) -> None:
    terminal.up = lambda message: 0 if len(terminal.shown) == 2 and isinstance(message, lost) else 1
    first, _, third = terminal.chat(["3 1 4", "7 7", "9 2 6"])
    assert (first, third) == (answer(FIRST), answer(FIRST, first, SECOND))
    assert terminal.tokenizer.prompts[2] == [*FIRST, *first, *SECOND]
    assert "no base station answers" in one_error(capsys)


def test_a_system_prompt_that_is_not_utf8_changes_nothing(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, third = terminal.chat(["3 1 4", "/system a\udcff", "9 2 6"])
    assert (first, third) == (answer(FIRST), answer(FIRST, first, SECOND))
    assert "text in UTF-8" in one_error(capsys)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_an_interrupt_stops_the_answer_and_keeps_what_was_shown(terminal: Terminal, count: int) -> None:
    handler = signal.getsignal(signal.SIGINT)
    terminal.stop_after = {1: count}
    first, second = terminal.chat(["3 1 4", "9 2 6"])
    assert first == answer(FIRST)[: len(first)]
    assert count <= len(first) < TOKENS
    assert second == answer(FIRST, first, SECOND)
    assert terminal.tokenizer.prompts[1] == [*FIRST, *first, *SECOND]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """Opens a terminal as stdin; returns where the history is kept."""
    main, other = pty.openpty()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def open_terminal() -> Path:
        monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(other)))
        return tmp_path / "edgedraft" / "chat_history"

    yield open_terminal
    sys.stdin.close()
    os.close(main)
    os.close(other)


def test_the_history_of_a_terminal_is_kept_for_its_user_alone(terminal: Terminal, typed: Any) -> None:
    import readline

    path = typed()
    readline.clear_history()
    readline.add_history("3 1 4")
    terminal.chat([])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    readline.clear_history()
    terminal.shown.clear()
    terminal.chat([])
    assert [readline.get_history_item(number + 1) for number in range(readline.get_current_history_length())] == [
        "3 1 4"
    ]


def test_every_origin_has_a_color_of_its_own() -> None:
    assert len({ORIGIN_STYLES[origin] for origin in Origin}) == len(Origin)
