"""How many frames a front passes on: on one core, encrypted, between devices and a replica that echoes."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer
import zmq

from basestation.devices.key_folder import KeyFolder
from basestation.engine.load import Load
from basestation.logs import LogFormat
from basestation.replicas.front import FrontOptions
from basestation.replicas.front_process import FrontProcess, FrontSettings
from basestation.replicas.inner_link import InnerKey, connect_to_front
from basestation.replicas.inner_messages import Command, Report, decode_peer
from basestation.target.served_target import ServedTarget
from basestation.target.vocabulary import Vocabulary
from bench.setup.cores import Cores, running_on
from bench.setup.options import JsonOption, console
from bench.setup.results import Results, Row
from device.link.curve_keys import CurveKeys, new_key
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Draft, Mode, Open, Sampling

_ANY_PORT = "tcp://127.0.0.1:0"
_VOCAB = 49_152
_LIMITS = Limits(max_requests_per_second=10**7, max_bytes_per_second=2**31 - 1)
_WARM_UP_SECONDS = 1.0
_PASSES = {"10 rounds/s": 10, "50 rounds/s": 50, "200 rounds/s": 200}
"""Rounds that a replica verifies in a second; each is two frames at the front."""
_REPLICAS = (1, 10, 100, 1000)


def cluster(
    seconds: Annotated[float, typer.Option(help="Duration of the measurement.", min=0.1)] = 5.0,
    devices: Annotated[int, typer.Option(help="Devices that send at once.", min=1)] = 16,
    frame_bytes: Annotated[int, typer.Option(help="Bytes of a frame.", min=1)] = 64,
    json_file: JsonOption = None,
) -> None:
    """Measure the frames a front passes on, and how many replicas it is enough for."""
    row = measure_front(seconds, devices, frame_bytes)
    measured = Results({"seconds": seconds, "devices": devices, "frame_bytes": frame_bytes}, [row, *front_share(row)])
    measured.show(console)
    measured.write(json_file)


def front_share(measured: Row) -> list[Row]:
    """The share of one core that a front takes for numbers of replicas, each with a number of rounds a second."""
    seconds = measured["cpu_microseconds_per_frame"]
    assert isinstance(seconds, float)
    return [
        {"case": f"{replicas} replicas of {case}", "fronts": 2 * rounds * replicas * seconds / 1e6}
        for case, rounds in _PASSES.items()
        for replicas in _REPLICAS
    ]


def measure_front(seconds: float, devices: int, frame_bytes: int) -> Row:
    """A front on one core; devices and replica on another."""
    cores = Cores.choose()
    with (
        tempfile.TemporaryDirectory() as folder,
        _running_front(Path(folder), cores.station) as (front, keys, key),
        running_on(cores.device),
        closing(_Echo(front, key)) as echo,
    ):
        sockets = echo.connect_devices(front.address(10), keys, devices, frame_bytes)
        echo.run(sockets, _WARM_UP_SECONDS)
        assert front.pid
        process = psutil.Process(front.pid)
        before, began = _cpu_seconds(process), time.monotonic()
        frames = echo.run(sockets, seconds)
        elapsed, used = time.monotonic() - began, _cpu_seconds(process) - before
    return {
        "case": f"front, {frame_bytes} B, both directions",
        "frames_per_second": frames / elapsed,
        "core_share": used / elapsed,
        "cpu_microseconds_per_frame": 1e6 * used / frames,
        "frames_per_second_of_a_core": frames / used,
    }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def _running_front(folder: Path, core: int) -> Iterator[tuple[FrontProcess, CurveKeys, InnerKey]]:
    keys = KeyFolder.create(folder / "keys")
    keys.enroll("bench", new_key(folder / "bench"))
    key = InnerKey.new()
    listening = FrontOptions(_ANY_PORT, _ANY_PORT, key, 1, _LIMITS)
    settings = FrontSettings(listening, "echo", keys, False, 2**32, None, LogFormat.TEXT)
    with closing(FrontProcess(settings)) as front:
        with running_on(core):
            front.start()
        yield front, CurveKeys.read(folder / "bench", keys.public_key), key


class _Echo:
    """A replica that sends each frame back, and the devices that sent them."""

    def __init__(self, front: FrontProcess, key: InnerKey) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        tokens = {f"t{number}": number for number in range(_VOCAB)}
        self._target = ServedTarget("echo", 4096, Vocabulary(tokens, _VOCAB, frozenset()), has_grammars=False)
        self._digest = self._target.digest
        self._replica = connect_to_front(self._context, front.inner_address, key, b"echo")
        self._next_report = 0.0
        self._describe()

    def connect_devices(self, address: str, keys: CurveKeys, count: int, frame_bytes: int) -> "list[zmq.Socket[bytes]]":
        """Devices that have opened a session and sent one Draft."""
        codec, sockets = FrameCodec(_VOCAB, _LIMITS), list[zmq.Socket[bytes]]()
        for number in range(count):
            socket = self._context.socket(zmq.DEALER)
            keys.protect(socket)
            socket.connect(address)
            socket.send(codec.encode(Open(number, 0, Mode.IDS, Sampling(), (1, 2, 3))))
            draft = codec.encode(Draft(number, 1, tuple(range(8))))
            socket.send(draft + bytes(frame_bytes - len(draft)))
            sockets.append(socket)
        return sockets

    def run(self, devices: "Sequence[zmq.Socket[bytes]]", seconds: float) -> int:
        """Send what comes back once more, for this long; returns the frames that the front passed on."""
        poller, frames, end = zmq.Poller(), 0, time.monotonic() + seconds
        for socket in (self._replica, *devices):
            poller.register(socket, zmq.POLLIN)
        while time.monotonic() < end:
            for socket, _ in poller.poll(100):
                frames += self._echo() if socket is self._replica else self._resend(socket)
            self._report()
        return frames

    def close(self) -> None:
        """Close all sockets."""
        self._context.destroy(linger=0)

    def _describe(self) -> None:
        self._replica.recv_multipart()
        report = Report("echo", self._digest, Load(), target=self._target)
        self._replica.send_multipart([b"", report.encode()])

    def _report(self) -> None:
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + 1
            self._replica.send_multipart([b"", Report("echo", self._digest, Load()).encode()])

    def _echo(self) -> int:
        frames = 0
        with suppress(zmq.Again):
            while True:
                head, *frame = self._replica.recv_multipart(zmq.NOBLOCK)
                if head[0] == Command.REQUEST:
                    self._replica.send_multipart([decode_peer(head[1:]).address, *frame])
                    frames += 1
        return frames

    @staticmethod
    def _resend(socket: "zmq.Socket[bytes]") -> int:
        frames = 0
        with suppress(zmq.Again):
            while True:
                socket.send(socket.recv(zmq.NOBLOCK))
                frames += 1
        return frames
