"""Several processes (ranks) that run one target: rank 0 sends each forward pass to all, and each computes its share.

Rank 0 has the engine. The others, its followers, keep no sequence's state: a message has all numbers of a pass, and
pages have the same numbers on every rank. Messages travel over ZeroMQ, so that an idle follower waits in no
collective, which would time out; collectives run within a pass alone.

If a rank fails, the group cannot go on: ``RankFailure`` ends the process of rank 0, and its followers' with it.
"""

import os
import socket
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import psutil
import torch
import zmq
from torch import Tensor, distributed

# PyTorch exports it without saying so to type checkers.
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from basestation.replicas.inner_link import Delivery, InnerKey, InnerSocket, connect_inner
from basestation.target.forward_pass import ForwardPass
from basestation.target.tensor_parallel import Share
from common.error_text import first_line

COLLECTIVE_SECONDS = 60.0
"""After which a rank that waits for another one in a pass fails."""
_CONNECT_SECONDS = 60.0
_POLL_MS = 200
_READY = b"ready"
_END = [b""]


class RankFailure(Exception):  # noqa: N818 - not one of a request, and no error of PyTorch that may mean "out of memory"
    """A rank is gone, or its part of a pass failed: the ranks cannot run another pass."""


@dataclass(frozen=True)
class RankAddress:
    """Where followers reach rank 0.

    Attributes:
        passes: ZeroMQ endpoint of the messages.
        host: of PyTorch's store, through which the ranks' collectives find each other.
        store_port: its port.
    """

    passes: str
    host: str
    store_port: int


class PassRunner(Protocol):
    """Runs forward passes; see ``ModelRunner``."""

    @property
    def gathered(self) -> int:
        """Sequences so far whose pages a pass had to copy into one run."""

    @property
    def window(self) -> int | None:
        """How many positions a pass reads for a token; None for all."""

    def run(self, forward_pass: ForwardPass) -> Tensor:
        """Run a pass; returns the logits [rows, V] of its ``logit_rows``."""


class Ranks:
    """One rank of a group.

    Args:
        share: which rank this is.
        timeout: in seconds, see ``COLLECTIVE_SECONDS``.

    Attributes:
        share: see above.
    """

    def __init__(self, share: Share, timeout: float) -> None:
        self.share = share
        self._timeout = timedelta(seconds=timeout)

    def join(self, torch_device: torch.device, kv_memory: int) -> int:
        """Meet the other ranks, once this one has loaded its share.

        Args:
            torch_device: where the share is.
            kv_memory: bytes that this rank has for the KV pool.

        Returns:
            The bytes that every rank has for it.
        """
        store = self._meet()
        backend = "nccl" if torch_device.type == "cuda" else "gloo"
        rank, ranks = self.share.rank, self.share.ranks
        distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=self._timeout)
        least = torch.tensor(kv_memory, device=torch_device)
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        return int(least)

    def shared(self, runner: PassRunner) -> PassRunner:
        """What runs passes at this rank."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the group; after a failure, where others may still wait in a collective, end the process instead."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def _meet(self) -> Store:
        """Wait for the other ranks; returns the store that all share."""
        raise NotImplementedError


class FirstRank(Ranks):
    """Rank 0, which listens for its followers.

    Args:
        ranks: how many there are, itself included.
        host: address of this machine that the others reach.
        key: that all ranks have.
        timeout: in seconds, see ``COLLECTIVE_SECONDS``.

    Attributes:
        address: for the followers.
        check: is called again and again while they load; it raises what keeps one from it.
    """

    def __init__(self, ranks: int, host: str, key: InnerKey, timeout: float = COLLECTIVE_SECONDS) -> None:
        super().__init__(Share(0, ranks), timeout)
        self.check: Callable[[], None] = lambda: None
        self._followers = [_identity(rank) for rank in range(1, ranks)]
        self._socket = InnerSocket(f"tcp://{host}:0", key)
        _use_interface_of(host)
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._store = TCPStore(
            host, port, ranks, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.address = RankAddress(self._socket.address, host, port)

    def shared(self, runner: PassRunner) -> "SharedPasses":
        """A runner whose passes all ranks run."""
        return SharedPasses(runner, self._send)

    def close(self) -> None:
        """End the followers too."""
        with suppress(RankFailure):
            self._send(_END)
        super().close()
        self._socket.close()

    def _meet(self) -> Store:
        missing = set(self._followers)
        while missing:
            self._socket.socket.poll(_POLL_MS)
            missing -= {parts[0] for parts in self._socket.receive()}
            self.check()
        return self._store

    def _send(self, message: Sequence[bytes]) -> None:
        for follower in self._followers:
            if self._socket.send(follower, message) is Delivery.GONE:
                raise RankFailure(f"{follower.decode()} is gone")


class Follower(Ranks):
    """Another rank than 0.

    Args:
        share: which one.
        address: of rank 0.
        key: that all ranks have.
        timeout: in seconds, see ``COLLECTIVE_SECONDS``.
    """

    def __init__(self, share: Share, address: RankAddress, key: InnerKey, timeout: float = COLLECTIVE_SECONDS) -> None:
        super().__init__(share, timeout)
        self._address = address
        self._key = key
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._runner: PassRunner | None = None
        _use_interface_of(address_towards(address.passes))

    def shared(self, runner: PassRunner) -> PassRunner:
        """The runner itself, which ``follow`` uses."""
        self._runner = runner
        return runner

    def follow(self) -> None:
        """Run the passes that rank 0 sends, until it leaves the group."""
        assert self._runner is not None
        for forward_pass in self._passes():
            self._runner.run(forward_pass)

    def close(self) -> None:
        """Leave the group."""
        super().close()
        self._context.destroy(linger=0)

    def _meet(self) -> Store:
        identity = _identity(self.share.rank)
        self._link = connect_inner(self._context, self._address.passes, self._key, identity)
        self._link.send(_READY)
        return TCPStore(
            self._address.host,
            self._address.store_port,
            self.share.ranks,
            is_master=False,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
        )

    def _passes(self) -> Iterator[ForwardPass]:
        while (message := self._link.recv_multipart()) != _END:
            yield decode_pass(message)


class SharedPasses:
    """Runs each pass on all ranks.

    Args:
        runner: of this rank's share.
        send: a message to the other ranks.
    """

    def __init__(self, runner: PassRunner, send: Callable[[Sequence[bytes]], None]) -> None:
        self._runner = runner
        self._send = send

    @property
    def gathered(self) -> int:
        """See ``ModelRunner``."""
        return self._runner.gathered

    @property
    def window(self) -> int | None:
        """See ``ModelRunner``."""
        return self._runner.window

    def run(self, forward_pass: ForwardPass) -> Tensor:
        """Run a pass.

        Raises:
            RankFailure: a rank is gone, or the pass failed here; not even a lack of memory can be mended by
                another pass, because the others still wait in this one.
        """
        self._send(encode_pass(forward_pass))
        try:
            return self._runner.run(forward_pass)
        except Exception as error:
            raise RankFailure(f"a pass of all ranks failed: {first_line(error)}") from error


def encode_pass(forward_pass: ForwardPass) -> list[bytes]:
    """A pass as the parts of a message: one for each row of numbers, the page tables last."""
    rows = (
        forward_pass.token_ids,
        forward_pass.positions,
        forward_pass.logit_rows,
        forward_pass.starts,
        forward_pass.counts,
        *forward_pass.page_tables,
    )
    return [array("q", row).tobytes() for row in rows]


def decode_pass(parts: Sequence[bytes]) -> ForwardPass:
    """The pass that ``encode_pass`` wrote."""
    token_ids, positions, logit_rows, starts, counts, *page_tables = (array("q", part).tolist() for part in parts)
    return ForwardPass(token_ids, positions, logit_rows, starts, counts, [*page_tables])


def address_towards(endpoint: str) -> str:
    """The address of this machine that a machine at a ZeroMQ endpoint (``tcp://HOST:PORT``) reaches."""
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def _identity(rank: int) -> bytes:
    return f"rank {rank}".encode()


def _use_interface_of(address: str) -> None:
    """Let collectives use the network interface with this address, unless the environment names one."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in {one.address for one in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return
