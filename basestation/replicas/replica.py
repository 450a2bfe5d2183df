"""A replica: the engine of one target behind the front, which has the devices' socket."""

import zmq

from basestation.engine.engine_host import EngineHost, PassOptions
from basestation.engine.load import Load
from basestation.monitoring.metrics import Metrics
from basestation.replicas.front_link import FrontLink
from basestation.replicas.replica_settings import ReplicaOptions
from basestation.target.served_target import ServedTarget
from basestation.target.target_model import TargetModel
from protocol.frames import FrameCodec
from protocol.limits import Limits


class Replica(EngineHost):
    """The engine of a target, behind a front.

    Args:
        target: the model to serve.
        limits: of what a device may request; the same as the front's.
        options: how it reaches the front.
        passes: how forward passes run and who watches them.
    """

    def __init__(self, target: TargetModel, limits: Limits, options: ReplicaOptions, passes: PassOptions) -> None:
        codec = FrameCodec(target.vocabulary.size, limits)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        metrics = passes.metrics or Metrics()
        link = FrontLink(context, options, ServedTarget.of(target), metrics)
        super().__init__(
            target, limits, context, link, codec, PassOptions(passes.budget, metrics, passes.records, passes.profiler)
        )
        link.engine = self

    @property
    def load(self) -> Load:
        """The engine's load, which its thread measures again for the next report."""
        self._inbox.put(self._engine.measure_load, always=True)
        return self._engine.load
