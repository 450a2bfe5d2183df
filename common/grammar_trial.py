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
from protocol.errors import GrammarError, TransientGrammarError

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
            TransientGrammarError: the process cannot be started, was killed, or got too little time.
        """
        try:
            self._process = self._process or self._start()
            reply = _ask(self._process, text)
        except OSError as error:
            raise _transient(f"no process can be started for it: {error}") from error
        if not reply:
            _end(self._process)
            self._process = None
            raise _transient("the process that compiles grammars ended; see the log")
        if (exit_code := int(reply)) <= 0:
            raise _failure(exit_code)
        return exit_code * _MIB

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
    """Answer each grammar with a line: the ``_exit_code`` of compiling it, also of what is no grammar."""
    setup = _receive(sys.stdin.buffer)
    assert setup is not None
    tokenizer = new_tokenizer(*json.loads(setup))
    while (text := _receive(sys.stdin.buffer)) is not None:
        print(_exit_code(tokenizer, text), flush=True)  # noqa: T201 - the reply


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
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS + 1))  # SIGXCPU, not SIGKILL
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


def _failure(exit_code: int) -> GrammarError:
    """Why a grammar cannot be compiled, by the ``_exit_code``."""
    match -exit_code:
        case signal.SIGKILL:
            return _transient("the process that compiles it was killed, perhaps for lack of memory")
        case signal.SIGALRM:
            return _transient(f"it takes more than {_WALL_SECONDS} s on this busy machine")
        case signal.SIGXCPU:
            reason = f"it takes more than {_CPU_SECONDS} s"
        case _:
            reason = f"it takes more than {_MEMORY_MIB} MiB, or is nested too deeply"
    return GrammarError(f"the grammar cannot be compiled: {reason}")


def _transient(reason: str) -> TransientGrammarError:
    return TransientGrammarError(f"the grammar cannot be compiled: {reason}; try again")


if __name__ == "__main__":
    main()
