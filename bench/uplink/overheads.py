"""What a round costs besides the two models: the noise of mode coupled, and encoding and decoding of drafts."""

from collections.abc import Callable, Sequence
from itertools import chain
from statistics import median
from time import perf_counter

from basestation.kv_pool import Segment
from basestation.target_model import TargetModel
from basestation.verify import Draw, choose_tokens
from bench.setup.results import Value
from device.draft_model import DraftModel
from device.drafter import Drafter
from device.sampling import Uplink, coupled_token
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Sampling

GREEDY, SAMPLED = Sampling(), Sampling(1.0, seed=1)
DRAFT_LEN = 8
UPLINK_K = 32
REPEATS = 9


def device_rows(
    model: DraftModel, prompts: Sequence[list[int]], tokens: int, advance: Callable[[], object]
) -> tuple[list[dict[str, Value]], list[list[int]]]:
    """The device's rows, and each prompt with the tokens that the draft model went on with at temperature 1."""
    drafting, coupled, greedy, coding, rounds = [], [], [], [], []
    texts: list[list[int]] = []
    codec = FrameCodec(model.manifest.vocab_size)
    uplink = Uplink.of_mode(Mode.TOPK, UPLINK_K, 1.0, 0)
    for prompt in prompts:
        text = list(prompt)
        model.rollback(0)
        logits = model.forward(text)
        for _ in range(tokens):
            coupled.append(_seconds(lambda: coupled_token(logits, SAMPLED, len(text))))  # noqa: B023 - called at once
            greedy.append(_seconds(lambda: coupled_token(logits, GREEDY, len(text))))  # noqa: B023
            text.append(coupled_token(logits, SAMPLED, len(text))[0])
            began = perf_counter()
            logits = model.forward(text[-1:])
            drafting.append(perf_counter() - began)
        drafter = Drafter(model, Mode.TOPK, SAMPLED, uplink)
        drafter.prefill(text)
        began = perf_counter()
        drafted = drafter.draft(text, DRAFT_LEN)
        rounds.append(perf_counter() - began)
        draft = Draft(0, 1, drafted.token_ids, drafted.distributions)
        coding.append(_seconds(lambda: codec.decode(codec.encode(draft))))  # noqa: B023
        texts.append(text)
        advance()
    token = median(drafting) + median(coupled)
    return [
        _row("coupled: choosing a drafted token", median(coupled), "a drafted token", token),
        _row("of that, the noise", median(coupled) - median(greedy), "a drafted token", token),
        _row(f"encode and decode topk K = {UPLINK_K}", median(coding), "drafting the round", median(rounds)),
    ], texts


def station_rows(target: TargetModel, texts: Sequence[list[int]]) -> list[dict[str, Value]]:
    """The base station's rows: a pass that judges ``DRAFT_LEN`` tokens of every text, one session each."""
    judged = DRAFT_LEN + 1
    kv_caches = [target.new_kv_cache() for _ in texts]
    target.forward([Segment(kv_cache, text[:-judged], 0) for kv_cache, text in zip(kv_caches, texts, strict=True)])
    segments = [Segment(kv_cache, text[-judged:], judged) for kv_cache, text in zip(kv_caches, texts, strict=True)]
    passes: list[float] = []
    coupled: list[float] = []
    greedy: list[float] = []
    for _ in range(REPEATS):
        began = perf_counter()
        logits = target.forward(segments)
        passes.append(perf_counter() - began)
        for segment, text in zip(segments, texts, strict=True):
            segment.kv_cache.rollback(len(text) - judged)
        for sampling, spent in ((SAMPLED, coupled), (GREEDY, greedy)):
            ends = [range(len(text) - judged, len(text)) for text in texts]
            draws = [Draw(sampling, position) for position in chain(*ends)]
            spent.append(_seconds(lambda: choose_tokens(logits, draws)))  # noqa: B023
    name = f"a pass of {len(texts)} sessions × {judged} tokens"
    return [
        _row("coupled: choosing the target's tokens", median(coupled), name, median(passes)),
        _row("of that, the noise", median(coupled) - median(greedy), name, median(passes)),
    ]


def _row(case: str, seconds: float, part_of: str, whole: float) -> dict[str, Value]:
    return {
        "case": case,
        "milliseconds": seconds * 1e3,
        "part_of": part_of,
        "its_milliseconds": whole * 1e3,
        "share": seconds / whole,
    }


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
