"""CPU time of a frame, on one core and with keys: at a front, at a replica behind it, and in a single process."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import zmq

from basestation.devices.key_folder import KeyFolder
from basestation.engine.load import SessionKey
from basestation.logs import LogFormat
from basestation.replicas.front import FrontOptions
from basestation.replicas.front_process import FrontProcess, FrontSettings
from basestation.replicas.inner_link import InnerKey
from basestation.replicas.replica_settings import ReplicaOptions
from bench.setup.cores import Cores, running_on
from bench.setup.results import Row, number
from bench.station.echo import LIMITS, VOCAB, EchoReplica, EchoStation, echo_process
from device.link.curve_keys import CurveKeys, new_key
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Open, Sampling

_ANY_PORT = "tcp://127.0.0.1:0"
_START_SECONDS = 30
_WARM_UP_SECONDS = 1.0
FRONT, INNER_LINK, SINGLE = "front", "inner link, at the replica", "devices' socket, in one process"
BEYOND = "beyond a single process"


def measure_frames(seconds: float, devices: int, frame_bytes: int) -> list[Row]:
    """Rows of the front, the inner link and the single process, and what the first two cost beyond the last."""
    with tempfile.TemporaryDirectory() as folder:
        keys = KeyFolder.create(Path(folder) / "keys")
        owner = new_key(Path(folder) / "bench")
        keys.enroll("bench", owner)
        sessions = [(owner, session_id) for session_id in range(devices)]
        load = _Load(CurveKeys.read(Path(folder) / "bench", keys.public_key), devices, frame_bytes, seconds)
        rows = [*_measure_front(keys, sessions, load), _measure_single(keys, load)]
    front, inner, single = (number(row, "cpu_microseconds_per_frame") for row in rows)
    return [*rows, {**dict.fromkeys(rows[0]), "case": BEYOND, "cpu_microseconds_per_frame": front + inner - single}]


def _measure_front(keys: KeyFolder, sessions: Sequence[SessionKey], load: "_Load") -> list[Row]:
    cores, key = Cores.choose(), InnerKey.new()
    with _running_front(keys, key, cores.station) as front:
        link = ReplicaOptions("echo", front.inner_address, key, keyed=True)
        with echo_process(EchoReplica(link, sessions), cores.device) as replica, running_on(cores.device):
            assert front.pid
            measured = {FRONT: psutil.Process(front.pid), INNER_LINK: replica.process}
            return load.run(front.address(_START_SECONDS), measured)


def _measure_single(keys: KeyFolder, load: "_Load") -> Row:
    cores = Cores.choose()
    with echo_process(EchoStation(keys), cores.station) as station, running_on(cores.device):
        return load.run(station.address, {SINGLE: station.process})[0]


@contextmanager
def _running_front(keys: KeyFolder, key: InnerKey, core: int) -> Iterator[FrontProcess]:
    listening = FrontOptions(_ANY_PORT, _ANY_PORT, key, 1, LIMITS)
    front = FrontProcess(FrontSettings(listening, "echo", keys, False, 2**32, None, LogFormat.TEXT))
    try:
        with running_on(core):
            front.start()
        yield front
    finally:
        front.close()


class _Load:
    """Devices that send each frame again once it comes back.

    Args:
        keys: of all devices.
        devices: how many.
        frame_bytes: of each frame.
        seconds: that are measured.
    """

    def __init__(self, keys: CurveKeys, devices: int, frame_bytes: int, seconds: float) -> None:
        self._keys, self._devices, self._frame_bytes, self._seconds = keys, devices, frame_bytes, seconds

    def run(self, address: str, processes: dict[str, psutil.Process]) -> list[Row]:
        """A row for each process; a frame counts once on its way to the far end, and once back."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            sockets = [self._connect(context, address, index) for index in range(self._devices)]
            self._exchange(sockets, _WARM_UP_SECONDS)
            before, began = [_cpu_seconds(one) for one in processes.values()], time.monotonic()
            frames = self._exchange(sockets, self._seconds)
            elapsed = time.monotonic() - began
            used = [_cpu_seconds(one) - earlier for one, earlier in zip(processes.values(), before, strict=True)]
        finally:
            context.destroy(linger=0)
        return [_row(name, frames, elapsed, seconds) for name, seconds in zip(processes, used, strict=True)]

    def _connect(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, index: int) -> "zmq.Socket[bytes]":
        """A device that has opened a session and sent one Draft."""
        codec, socket = FrameCodec(VOCAB, LIMITS), context.socket(zmq.DEALER)
        self._keys.protect(socket)
        socket.connect(address)
        socket.send(codec.encode(Open(index, 0, Mode.IDS, Sampling(), (1, 2, 3))))
        draft = codec.encode(Draft(index, 1, tuple(range(8))))
        socket.send(draft + bytes(self._frame_bytes - len(draft)))
        return socket

    @staticmethod
    def _exchange(sockets: "Sequence[zmq.Socket[bytes]]", seconds: float) -> int:
        poller, frames, end = zmq.Poller(), 0, time.monotonic() + seconds
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        while time.monotonic() < end:
            for socket, _ in poller.poll(100):
                frames += 2 * _resend(socket)
        return frames


def _resend(socket: "zmq.Socket[bytes]") -> int:
    frames = 0
    with suppress(zmq.Again):
        while True:
            socket.send(socket.recv(zmq.NOBLOCK))
            frames += 1
    return frames


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _row(case: str, frames: int, elapsed: float, used: float) -> Row:
    return {
        "case": case,
        "frames_per_second": frames / elapsed,
        "core_share": used / elapsed,
        "cpu_microseconds_per_frame": 1e6 * used / frames,
        "frames_per_second_of_a_core": frames / used,
    }
