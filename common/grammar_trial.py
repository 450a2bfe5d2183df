"""Compiles grammars first in another process, so that one that takes too much ends nothing else.

The other process (``python -m common.grammar_trial``) keeps the tokenizer and forks for
each grammar. It loads neither NumPy nor a model.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING

from common.grammar_matcher import new_matcher, new_tokenizer
from protocol.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_CPU_SECONDS = 1
_WALL_SECONDS = 10
_MIB = 2**20
_MEMORY_MIB = 32
_STACK_BYTES = _MIB  # less than any thread has that compiles afterwards
_NICENESS = 10
_LENGTH = struct.Struct("<I")


class GrammarTrial:
    """The other process; starts with the first grammar and ends with this object. For one thread at a time.

    Args:
        tokenizer_json: the text of a ``tokenizer.json``.
        vocab_size: length of the masks.
        stop_ids: that end a text.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, stop_ids: list[int]) -> None:
        self._setup = json.dumps([tokenizer_json, vocab_size, stop_ids])
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, text: str) -> int:
        """Compile a grammar there; the bytes that it takes, at most, in whole MiB.

        Raises:
            GrammarError: it takes too much time, memory or recursion.
        """
        try:
            self._process = self._process or self._start()
            reply = _ask(self._process, text)
        except OSError as error:
            raise GrammarError(f"the grammar cannot be compiled: no process can be started for it: {error}") from error
        if not reply:
            _end(self._process)
            self._process = None
            raise GrammarError("the grammar cannot be compiled: the process that compiles grammars ended; see the log")
        outcome = json.loads(reply)
        if isinstance(outcome, str):
            raise GrammarError(f"the grammar cannot be compiled: {outcome}")
        return int(outcome) * _MIB

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt at the terminal is not for it
        )
        weakref.finalize(self, _end, process)
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended; the next question sees that
            _send(process.stdin, self._setup)
        return process


def _ask(process: "subprocess.Popen[bytes]", text: str) -> bytes:
    """The reply; empty if the process has ended."""
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):
        _send(process.stdin, text)
    return process.stdout.readline()


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(BrokenPipeError), process:  # closes the pipes and waits
        pass


def _send(stream: IO[bytes], text: str) -> None:
    data = text.encode()
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> str | None:
    """The next text; None at the end."""
    header = stream.read(_LENGTH.size)
    return stream.read(*_LENGTH.unpack(header)).decode() if header else None


def main() -> None:
    """Answer each grammar with a line in JSON: the MiB it takes, or why it cannot be compiled; 1 for what is none."""
    setup = _receive(sys.stdin.buffer)
    assert setup is not None
    tokenizer = new_tokenizer(*json.loads(setup))
    while (text := _receive(sys.stdin.buffer)) is not None:
        print(json.dumps(_outcome(_exit_code(tokenizer, text))), flush=True)  # noqa: T201 - the reply


def _exit_code(tokenizer: "LLTokenizer", text: str) -> int:
    """That of a process that compiles a grammar within limits: the MiB it takes, 0 where it fails, minus a signal."""
    child = os.fork()
    if not child:
        try:
            _limit_this_process()
            before = _private_bytes()
            matcher = new_matcher(tokenizer, text)
            os._exit((_private_bytes() - before) // _MIB + 1 if matcher else 0)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _limit_this_process() -> None:
    import resource

    os.nice(_NICENESS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what an allocation that fails prints
    signal.alarm(_WALL_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = _memory_bytes()[0] + _MEMORY_MIB * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _private_bytes() -> int:
    """Memory of this process that is no file's."""
    _, resident, shared, *_ = _memory_bytes()
    return resident - shared


def _memory_bytes() -> list[int]:
    """Mapped, resident, shared and further kinds."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return [int(count) * os.sysconf("SC_PAGESIZE") for count in pages]


def _outcome(exit_code: int) -> int | str:
    if exit_code > 0:
        return exit_code
    if -exit_code in (signal.SIGKILL, signal.SIGXCPU, signal.SIGALRM):
        return f"it takes more than {_CPU_SECONDS} s"
    return f"it takes more than {_MEMORY_MIB} MiB, or is nested too deeply"


if __name__ == "__main__":
    main()
