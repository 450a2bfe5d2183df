"""What a beginning that sessions have in common costs in a pass, and what it saves a newcomer and the memory."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

from basestation.kv_pool import STEP, Segment
from basestation.target_model import TargetModel
from bench.setup.results import Row
from bench.station.passes import PackedPass, seconds_of
from protocol.errors import SettingsError

REPEATS = 25
_CHUNK = 256


def measure_prefixes(
    target: TargetModel, sessions: int, context: int, shared: int, new: int, advance: Callable[[], object]
) -> list[Row]:
    """Passes of ``new`` tokens a session behind ``context`` others, and prefills, ``shared`` of them in common or none.

    Raises:
        SettingsError: ``shared`` is not whole blocks, or more than the context.
    """
    if shared % STEP or not 0 < shared < context:
        raise SettingsError("shared", shared, f"a multiple of {STEP} below the context of {context}")
    generator = torch.Generator().manual_seed(0)
    beginning, *ends = (
        torch.randint(target.vocabulary.size, (length,), generator=generator).tolist()
        for length in (shared, *[context - shared + new] * sessions)
    )
    texts = [[*beginning, *end] for end in ends]
    rows = []
    for case, seconds in _pass_seconds(target, texts, new, shared, advance).items():
        rows.append({"case": f"pass, {case}", "sessions": sessions, **seconds})
    for case, spent in _prefill_seconds(target, texts[0][:context], shared, advance).items():
        rows.append({"case": f"prefill, {case}", "sessions": 1, "milliseconds": 1e3 * spent, "kv_positions": None})
    return rows


def _pass_seconds(
    target: TargetModel, texts: Sequence[list[int]], new: int, shared: int, advance: Callable[[], object]
) -> dict[str, Row]:
    passes: dict[str, PackedPass] = {}
    positions: dict[str, int] = {}
    spent: dict[str, list[float]] = {"nothing in common": [], f"{shared} in common": []}
    for case, length in zip(spent, (0, shared), strict=True):
        before = target.kv_pool.used
        passes[case] = PackedPass(target, texts, new, length)
        passes[case].run()
        positions[case] = target.kv_pool.used - before
        advance()
    for _ in range(REPEATS):
        for case, packed in passes.items():
            spent[case].append(seconds_of(packed.run, target.torch_device))
    for packed in passes.values():
        packed.release()
    return {
        case: {"milliseconds": 1e3 * median(times), "kv_positions": positions[case]} for case, times in spent.items()
    }


def _prefill_seconds(
    target: TargetModel, text: list[int], shared: int, advance: Callable[[], object]
) -> dict[str, float]:
    """Until a newcomer's tokens are all run: all of them, or those behind what it joins, which is a block already."""
    source, newcomer = target.new_kv_cache(), target.new_kv_cache()

    def prefill(start: int) -> None:
        newcomer.release()
        newcomer.join(source, start)
        for place in range(start, len(text), _CHUNK):
            target.forward([Segment(newcomer, text[place : place + _CHUNK], 0)])

    target.forward([Segment(source, text, 0)])
    spent: dict[str, list[float]] = {"all": [], f"behind {shared} in common": []}
    for _ in range(REPEATS // 3):
        for times, start in zip(spent.values(), (0, shared), strict=True):
            times.append(seconds_of(lambda: prefill(start), target.torch_device))  # noqa: B023 - called at once
        advance()
    for kv_cache in (source, newcomer):
        kv_cache.release()
    return {case: median(times[1:]) for case, times in spent.items()}
