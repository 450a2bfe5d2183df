"""A chat in a terminal: lines in, answers out, until an empty line or the end of input.

Knows the turns and the commands that a user types; not how an answer is made.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event
from types import FrameType

from common.command_line import print_error
from device.answers.answer import Conversation
from device.state_folder import state_folder
from device.terminal import AnswerDisplay, console, show_figures
from device.text.tokenizer import ChatMessage
from device.text.unicode import check_unicode
from protocol.errors import CancelledError, EdgedraftError

_HISTORY_LINES = 1000


class Chat:
    """The turns of a chat.

    Args:
        conversation: answers them.
        max_new_tokens: most tokens of an answer.
        origins: whether tokens are colored by origin.
        system: the system prompt, if there is one.
    """

    def __init__(self, conversation: Conversation, max_new_tokens: int, origins: bool, system: str | None) -> None:
        self._conversation = conversation
        self._max_new_tokens = max_new_tokens
        self._origins = origins
        self._messages: list[ChatMessage] = []
        self._start(system)

    def run(self) -> None:
        """Answer each text that the user types; an error ends its turn alone."""
        with _history():
            for text in _texts():
                try:
                    self._take(text)
                except EdgedraftError as error:
                    print_error(str(error))

    def _take(self, text: str) -> None:
        command, _, rest = text.partition(" ")
        if command == "/system" and rest.strip():
            check_unicode("system", rest)
            self._start(rest.strip())
        elif text.strip() == "/reset":
            self._start(self._system)
        else:
            self._answer(text)

    def _start(self, system: str | None) -> None:
        """Forget all turns."""
        self._system = system
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._conversation.close()

    def _answer(self, text: str) -> None:
        """Answer a text; one without an answer is forgotten."""
        self._messages.append({"role": "user", "content": text})
        shown = ""
        try:
            shown = self._show_answer()
        finally:
            if shown:
                self._messages.append({"role": "assistant", "content": shown})
            else:
                self._messages.pop()
            if not self._conversation.ready:
                self._conversation.close()

    def _show_answer(self) -> str:
        """Print the answer to the conversation; return its text, as far as it came if Ctrl-C stopped it."""
        prompt_ids = self._conversation.tokenizer.encode_chat(self._messages)
        display = AnswerDisplay(self._origins)
        stream = self._conversation.ask(prompt_ids, self._max_new_tokens, show_unverified=display.show_unverified)
        shown = ""
        with _interrupted() as interrupted, self._conversation.cancelled_by(interrupted.is_set):
            try:
                for chunk in stream:
                    display.show(chunk)
                    shown += chunk.text
            except CancelledError:
                shown += display.unverified
            finally:
                console.print()
        if not interrupted.is_set():
            show_figures(stream.answer)
        return shown


@contextmanager
def _interrupted() -> Iterator[Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts the program as usual."""
    event = Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _texts() -> Iterator[str]:
    """What the user types, until an empty line or the end of input; a backslash at its end continues a line."""
    text = ""
    while True:
        try:
            line = input("... " if text else "> ")
        except EOFError:
            console.print()
            return
        if line.endswith("\\"):
            text += f"{line[:-1]}\n"
            continue
        text += line
        if not text.strip():
            return
        yield text
        text = ""


@contextmanager
def _history() -> Iterator[None]:
    """On a terminal, keep the typed lines in a file that only the user can read."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    path = state_folder() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):  # a chat does not fail for its history
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
