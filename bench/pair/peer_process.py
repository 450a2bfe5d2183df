"""Another program in a process of its own, which answers prompts: a JSON object a line, in and out.

It prints "ready" when its models are loaded, and may print other lines before. A
request has a ``case``, ``prompt_ids`` and ``max_new_tokens``; its answer has
``token_ids`` or an ``error``.
"""

import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from protocol.errors import LinkError

_READY_SECONDS = 600.0
_ANSWER_SECONDS = 600.0
_STOP_SECONDS = 10.0


class PeerProcess:
    """The requests and answers of a running process.

    Args:
        name: of the program, for messages.
        process: with pipes for all three streams.
    """

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._name = name
        self._requests = process.stdin
        self._lines: queue.Queue[str] = queue.Queue()
        self._last_errors: deque[str] = deque(maxlen=1)
        self._threads = [
            threading.Thread(target=self._read, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_ready(self) -> None:
        """Wait until the models are loaded.

        Raises:
            LinkError: the program ended, or took too long.
        """
        while self._next_line(_READY_SECONDS) != "ready":
            pass

    def answer(self, case: str, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt.

        Raises:
            LinkError: the program reported an error, ended, or took too long.
        """
        request = {"case": case, "prompt_ids": prompt_ids, "max_new_tokens": max_new_tokens}
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except OSError as error:
            raise self._ended() from error
        answer = json.loads(self._next_line(_ANSWER_SECONDS))
        if "error" in answer:
            raise LinkError(f"{self._name}: {answer['error']}")
        token_ids: list[int] = answer["token_ids"]
        return token_ids

    def join(self) -> None:
        """Wait for the end of the process's output."""
        for thread in self._threads:
            thread.join()

    def _next_line(self, seconds: float) -> str:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise LinkError(f"{self._name} did not answer within {seconds:g} s") from None
        if not line:
            raise self._ended()
        return line.strip()

    def _ended(self) -> LinkError:
        self._threads[1].join(_STOP_SECONDS)
        return LinkError(f"{self._name} ended: {''.join(self._last_errors).strip() or 'it printed no error'}")

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put("")

    def _read_errors(self, stderr: IO[str]) -> None:
        self._last_errors.extend(line for line in stderr if line.strip())


@contextmanager
def peer_process(name: str, command: Sequence[str], folder: Path | None = None) -> Iterator[PeerProcess]:
    """Start a program in ``folder``, and yield once it is ready.

    Raises:
        LinkError: it ended before, or took too long; the message holds its last line.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=folder) as process:  # noqa: S603
        peer = PeerProcess(name, process)
        try:
            peer.wait_until_ready()
            yield peer
        finally:
            process.kill()
            peer.join()
