"""Targets over two ranks against the same targets on one: logits, answers in all modes, pool use; failures."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from basestation.engine.scheduler import BUSY_SECONDS
from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.kv_cache.memory import OutOfMemory, catch_out_of_memory, parameter_count
from basestation.launch_options import ClusterOptions
from basestation.replicas.inner_link import InnerKey
from basestation.target.forward_pass import ForwardPass
from basestation.target.int8_linear import may_be_int8
from basestation.target.ranks import FirstRank, RankFailure, SharedPasses, address_towards, decode_pass, encode_pass
from basestation.target.segment import Segment
from basestation.target.supported_models import SUPPORTED
from basestation.target.target_model import TargetModel
from basestation.target.tensor_parallel import SPLITTABLE, refuse_unsplittable
from device.settings import DraftSettings
from protocol.errors import ModelError, SettingsError
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, random_table
from tests.invariants import settings_name, token_ids_of
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.rank_group import KV_MEMORY, LOOPBACK, FollowerProcess, Tiny, follower_process, on_ranks
from tests.tiny_target import CPU, VOCAB, WINDOW, WINDOWS, ids, tiny_config

LLAMA = Tiny("llama")
SPLIT_WINDOWS = [architecture for architecture in WINDOWS if architecture in SPLITTABLE]
SAMPLED = Sampling(1.0, seed=7)
SETTINGS = [
    *(DraftSettings(mode, Sampling(), 4, 4) for mode in Mode),
    *(DraftSettings(mode, SAMPLED, 4, 4) for mode in Mode if mode is not Mode.IDS),
    DraftSettings(Mode.TOPK, SAMPLED, 4, 4, block_verification=True),
]
SHARED_PROMPT = ids(PAGE_SIZE + 20, 11)
TURNS = 2


@pytest.fixture(scope="module")
def follower() -> Iterator[FollowerProcess]:
    with follower_process() as started:
        yield started


@dataclass
class Conversations:
    """Sessions in all modes that take turns on one target: they share a prefix, and more than fit into the pool."""

    target: TargetModel
    answers: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    passes: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    """Of each pass the used positions of the pool, and the pages of each sequence."""
    evictions: int = 0
    most_shared: int = 0

    def run(self) -> None:
        run_pass, station = self.target.forward, Station(self.target)
        self._count_evictions(station)

        def forward(segments: Sequence[Segment]) -> torch.Tensor:
            logits = run_pass(segments)
            pool = self.target.kv_pool
            self.most_shared = max(self.most_shared, pool.shared)
            self.passes.append((pool.used, [list(segment.kv_cache.page_table) for segment in segments]))
            return logits

        self.target.forward = forward  # type: ignore[method-assign]
        sessions = []
        for index, settings in enumerate(SETTINGS):
            model = FakeDraftModel.make(random_table(VOCAB, seed=2))
            client, _ = join(station, model, MemoryTransport(station, peer=bytes([index])))
            sessions.append(open_session(client, settings, model, [*SHARED_PROMPT, *ids(60 + 9 * index, index)]))
            station.now += 2 * BUSY_SECONDS
        for turn in range(TURNS):
            for settings, session in zip(SETTINGS, sessions, strict=True):
                if turn:
                    session.extend([3, 5, 4])
                self.answers[settings_name(settings), turn] = token_ids_of(session, 8)
                station.now += 2 * BUSY_SECONDS

    def _count_evictions(self, station: Station) -> None:
        metrics = vars(station.engine)["_metrics"]
        metrics.count_eviction = self._count_eviction

    def _count_eviction(self) -> None:
        self.evictions += 1


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((one, {}) for one in SPLITTABLE), *((one, WINDOWS[one]) for one in SPLIT_WINDOWS)],
    ids=[*SPLITTABLE, *(f"{one}-window" for one in SPLIT_WINDOWS)],
)
def test_logits_and_pages_are_those_of_one_rank(
    architecture: str, changes: dict[str, Any], follower: FollowerProcess
) -> None:
    """Two sequences, prefilled in chunks, rolled back and continued."""
    tiny = Tiny(architecture, changes)

    def seen_by(target: TargetModel) -> tuple[list[torch.Tensor], list[int]]:
        kv_caches, logits, used = [target.new_kv_cache() for _ in range(2)], [], []
        for text in (ids(40, 0), ids(150, 1), ids(9, 2)):
            logits.append(target.forward([Segment(kv_cache, text, 3) for kv_cache in kv_caches]))
            used.append(target.kv_pool.used)
            kv_caches[0].rollback(kv_caches[0].length - 2)
        return logits, used

    with on_ranks(tiny, [follower]) as target:
        logits, used = seen_by(target)
    expected, expected_use = seen_by(tiny.on_one_rank())
    assert used == expected_use
    for one, other in zip(logits, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-4, rtol=1e-4), float((one - other).abs().max())


@pytest.mark.parametrize("changes", [{}, {"sliding_window": WINDOW}], ids=["full attention", "window"])
def test_answers_and_pool_use_are_those_of_one_rank(changes: dict[str, Any], follower: FollowerProcess) -> None:
    """In all modes, with shared prefixes, and with evictions where full attention fills the pool."""
    architecture = "mistral" if changes else "llama"
    alone = Tiny(architecture, changes, 9 * PAGE_SIZE * 3 * 2 * 4 * 8 * 4)
    halves = Tiny(architecture, changes, alone.kv_memory // 2)
    expected = Conversations(alone.on_one_rank())
    expected.run()
    with on_ranks(halves, [follower]) as target:
        assert target.kv_pool.capacity == 9 * PAGE_SIZE
        conversations = Conversations(target)
        conversations.run()
    assert conversations.answers == expected.answers
    assert conversations.passes == expected.passes
    assert expected.most_shared == conversations.most_shared > 0
    assert expected.evictions == conversations.evictions
    assert bool(changes) or expected.evictions > 0


def test_every_rank_has_as_many_pages_as_the_smallest(follower: FollowerProcess) -> None:
    with on_ranks(LLAMA, [follower], follower_kv_memory=KV_MEMORY // 4) as target:
        assert KV_MEMORY // 5 < target.kv_bytes <= KV_MEMORY // 4
        target.forward([Segment(target.new_kv_cache(), [5], 1)])


def test_idle_ranks_outlast_the_timeout_of_collectives(follower: FollowerProcess) -> None:
    with on_ranks(LLAMA, [follower], timeout=1) as target:
        for _ in range(2):
            target.forward([Segment(target.new_kv_cache(), [5], 1)])
            time.sleep(2.5)
        target.forward([Segment(target.new_kv_cache(), [5], 1)])


def test_a_followers_death_ends_the_group() -> None:
    with follower_process() as follower, on_ranks(LLAMA, [follower]) as target:
        station = Station(target)
        model = FakeDraftModel.make(random_table(VOCAB, seed=2))
        client, _ = join(station, model)
        session = open_session(client, SETTINGS[0], model, [3, 4, 5])
        assert len(token_ids_of(session, 5)) == 5
        follower.process.kill()
        follower.process.join()
        session.extend([3])
        with pytest.raises(RankFailure, match=r"rank 1 is gone|a pass of all ranks failed"):
            token_ids_of(session, 20)


class _FailingRunner:
    """Runs out of memory."""

    gathered = 0
    window: int | None = None

    def run(self, forward_pass: ForwardPass) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_lack_of_memory_in_a_pass_ends_the_group_and_is_not_tried_again() -> None:
    sent: list[Sequence[bytes]] = []
    with pytest.raises(RankFailure, match="CUDA out of memory"), catch_out_of_memory():
        SharedPasses(_FailingRunner(), sent.append).run(ForwardPass([1], [0], [0], [0], [1], [[0]]))
    assert len(sent) == 1
    assert not issubclass(RankFailure, OutOfMemory)


def test_a_pass_arrives_as_it_was_sent() -> None:
    forward_pass = ForwardPass([5, 6, 7], [0, 9, 10], [0, 2], [0, 9], [1, 2], [[4], [2, 3]])
    assert decode_pass(encode_pass(forward_pass)) == forward_pass
    assert decode_pass(encode_pass(ForwardPass())) == ForwardPass()


def test_what_keeps_a_follower_from_loading_is_raised_at_rank_0() -> None:
    first = FirstRank(2, LOOPBACK, InnerKey.new())

    def check() -> None:
        raise ModelError("rank 1 finds no target")

    first.check = check
    with pytest.raises(ModelError, match="rank 1 finds no target"):
        first.join(CPU, KV_MEMORY)
    first.close()


@pytest.mark.parametrize(("heads", "kv_heads", "ranks", "allowed"), [(9, 3, 2, "1, 3"), (8, 4, 8, "1, 2, 4")])
def test_heads_that_do_not_divide_are_refused_by_name(heads: int, kv_heads: int, ranks: int, allowed: str) -> None:
    config = tiny_config("llama", num_attention_heads=heads, num_key_value_heads=kv_heads)
    text = (
        f"tensor-parallel is {ranks}; allowed: {allowed}, which divide {heads} attention heads and {kv_heads} key-value"
    )
    with pytest.raises(SettingsError, match=text):
        refuse_unsplittable(config, ranks)
    refuse_unsplittable(config, 1)


@pytest.mark.parametrize("architecture", sorted(set(SUPPORTED) - set(SPLITTABLE)))
def test_an_architecture_that_is_not_split_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(ModelError, match=f"architecture '{architecture}' is not split over ranks; .* is for gemma, "):
        refuse_unsplittable(tiny_config(architecture), 2)


def test_quantised_weights_are_refused_with_ranks() -> None:
    config = tiny_config("llama", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelError, match="quantised by 'bitsandbytes' are not split over ranks; leave out"):
        refuse_unsplittable(config, 2)


def test_int8_weights_are_refused_with_ranks() -> None:
    with pytest.raises(SettingsError, match="weights is 'int8'; allowed: dtype or auto: they are not split over ranks"):
        may_be_int8("int8", CPU, ranks=2)
    assert not may_be_int8("auto", CPU, ranks=2)


def test_ranks_need_replicas() -> None:
    with pytest.raises(SettingsError, match="tensor-parallel is 2; allowed: left out without --replicas"):
        ClusterOptions.of(None, None, None, 2)


def test_a_share_has_about_half_of_the_parameters() -> None:
    whole, share = (parameter_count(tiny_config("llama"), ranks) for ranks in (1, 2))
    assert whole / 2 < share < whole


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5755", "tcp://127.0.0.2:1"])
def test_ranks_listen_where_the_front_is_reached(endpoint: str) -> None:
    assert address_towards(endpoint) == LOOPBACK or endpoint.startswith(f"tcp://{address_towards(endpoint)}:")
