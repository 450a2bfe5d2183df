"""The base station in one process: the devices' socket, and the engine behind it."""

import zmq

from basestation.devices.device_socket import Admission, DeviceSocket
from basestation.devices.key_folder import KeyFolder
from basestation.engine.engine_host import EngineHost, PassOptions
from basestation.engine.pass_records import PassRecordFile
from basestation.engine.profiler import PassProfiler
from basestation.engine.scheduler import PassBudget
from basestation.kv_cache.memory_guard import MemoryGuard
from basestation.monitoring.metrics import Metrics
from basestation.target.target_model import TargetModel
from protocol.errors import EdgedraftError
from protocol.frames import FrameCodec
from protocol.limits import Limits


class Server(EngineHost):
    """A ROUTER socket in an I/O thread, and the engine behind it.

    Args:
        target: the model to serve.
        bind: a ZeroMQ endpoint like ``tcp://127.0.0.1:5755``; port 0 chooses a free port.
        limits: of what a device may request.
        keys: admit only the devices enrolled here; None admits every device.
        insecure: allow an address that other machines can reach without ``keys``.
        budget: of a forward pass.
        metrics: counters.
        records: gets a line for every round.
        profiler: traces some forward passes.
        memory_guard: refuses connections, and ends ``serve``, where peers take too much memory.

    Attributes:
        address: the endpoint that devices connect to.

    Raises:
        SettingsError: other machines can reach the address, and neither ``keys`` nor ``insecure`` is given.
        LinkError: the address cannot be bound.
    """

    def __init__(
        self,
        target: TargetModel,
        bind: str,
        limits: Limits | None = None,
        keys: KeyFolder | None = None,
        insecure: bool = False,
        budget: PassBudget | None = None,
        metrics: Metrics | None = None,
        records: PassRecordFile | None = None,
        profiler: PassProfiler | None = None,
        memory_guard: MemoryGuard | None = None,
    ) -> None:
        limits, metrics = limits or Limits(), metrics or Metrics()
        codec = FrameCodec(target.vocabulary.size, limits)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        admission = Admission(keys, insecure, memory_guard)
        try:
            socket = DeviceSocket(context, bind, codec.max_frame_bytes, limits, admission, metrics)
        except EdgedraftError:
            context.destroy(linger=0)
            raise
        self.address = socket.address
        passes = PassOptions(budget, metrics, records, profiler)
        super().__init__(target, limits, context, socket, codec, passes)
