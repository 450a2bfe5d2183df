"""Tiny targets over several ranks: this process is rank 0, and followers are processes that the tests keep."""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from basestation.replicas.inner_link import InnerKey
from basestation.target.attention import ATTENTION_NAME
from basestation.target.pretrained import register_attention
from basestation.target.ranks import COLLECTIVE_SECONDS, FirstRank, Follower, RankAddress
from basestation.target.target_model import TargetModel, place_share
from basestation.target.tensor_parallel import Share
from basestation.target.vocabulary import Vocabulary
from tests.fakes import token_names
from tests.tiny_target import CPU, VOCAB, tiny_config

HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
LOOPBACK = "127.0.0.1"
KV_MEMORY = 2**24


@dataclass(frozen=True)
class Tiny:
    """A model with random weights, the same in every process."""

    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    kv_memory: int = KV_MEMORY

    def share(self, share: Share) -> Any:
        register_attention()
        torch.manual_seed(0)
        config = tiny_config(self.architecture, **{**HEADS, **self.changes})
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        place_share(model, share, CPU)
        return model

    def on_one_rank(self) -> TargetModel:
        return self._target(self.share(Share()), self.kv_memory, None)

    def at(self, rank: FirstRank | Follower) -> TargetModel:
        model = self.share(rank.share)
        return self._target(model, rank.join(CPU, self.kv_memory), rank)

    def _target(self, model: Any, kv_memory: int, ranks: FirstRank | Follower | None) -> TargetModel:
        vocabulary = Vocabulary(token_names(VOCAB), VOCAB, frozenset())
        return TargetModel(model, vocabulary, self.architecture, kv_memory, ranks=ranks)


@dataclass(frozen=True)
class Job:
    """What a follower's process is given."""

    share: Share
    address: RankAddress
    key: InnerKey
    timeout: float
    tiny: Tiny


@dataclass
class FollowerProcess:
    """Follows one group after another."""

    process: SpawnProcess
    jobs: "Connection[Job | None, None]"


def follow(jobs: "Connection[None, Job | None]") -> None:
    torch.set_num_threads(1)
    while (job := jobs.recv()) is not None:
        follower = Follower(job.share, job.address, job.key, job.timeout)
        job.tiny.at(follower)
        follower.follow()
        follower.close()


@contextmanager
def follower_process() -> Iterator[FollowerProcess]:
    spawn = multiprocessing.get_context("spawn")
    receiving, sending = spawn.Pipe(duplex=False)
    process = spawn.Process(target=follow, args=(receiving,), daemon=True)
    process.start()
    try:
        yield FollowerProcess(process, sending)
    finally:
        process.kill()
        process.join()


@contextmanager
def on_ranks(
    tiny: Tiny,
    followers: Sequence[FollowerProcess],
    follower_kv_memory: int = KV_MEMORY,
    timeout: float = COLLECTIVE_SECONDS,
) -> Iterator[TargetModel]:
    """The target at rank 0."""
    key, ranks = InnerKey.new(), len(followers) + 1
    first = FirstRank(ranks, LOOPBACK, key, timeout)
    theirs = Tiny(tiny.architecture, tiny.changes, min(tiny.kv_memory, follower_kv_memory))
    for rank, follower in enumerate(followers, 1):
        follower.jobs.send(Job(Share(rank, ranks), first.address, key, timeout, theirs))
    try:
        yield tiny.at(first)
    finally:
        first.close()
