"""Records what a device would draft at every position of the target's answers.

In mode ``ids`` a draft is a function of the committed tokens, so drafts can be
recorded once and replayed by any number of clients.
"""

import time
from collections.abc import Callable, Sequence
from itertools import takewhile

from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from basestation.verification.verify import RoundToVerify, verify_rounds
from bench.station.recording import Recording
from device.drafting.draft_model import SequenceModel
from device.drafting.drafter import Drafter
from device.settings import UplinkSettings
from protocol.messages import Mode, Sampling

_GREEDY = Sampling()


def record(
    model: SequenceModel,
    target: TargetModel,
    prompts: Sequence[list[int]],
    answer_len: int,
    draft_len: int,
    advance: Callable[[], object],
) -> list[Recording]:
    """Generate the target's answers to all prompts, and a draft at every position of each answer."""
    recordings = []
    for prompt, answer in zip(prompts, greedy_answers(target, prompts, answer_len), strict=True):
        drafter = Drafter(model, Mode.IDS, _GREEDY, UplinkSettings.of_mode(Mode.IDS, 1, 1.0, 0))
        drafter.prefill(prompt)
        began = time.perf_counter()
        drafts = [drafter.draft([*prompt, *answer[:index]], draft_len).token_ids for index in range(len(answer))]
        seconds = (time.perf_counter() - began) / sum(map(len, drafts))
        recordings.append(Recording(tuple(prompt), tuple(answer), tuple(drafts), seconds))
        advance()
    return recordings


def greedy_answers(target: TargetModel, prompts: Sequence[list[int]], answer_len: int) -> list[list[int]]:
    """The target's answers to all prompts at once, of up to ``answer_len`` tokens, without stop ids."""
    sequences, kv_caches = [list(prompt) for prompt in prompts], [target.new_kv_cache() for _ in prompts]
    for tokens, kv_cache in zip(sequences, kv_caches, strict=True):
        target.forward([Segment(kv_cache, tokens[:-1], 0)])
    for _ in range(answer_len):
        pairs = zip(sequences, kv_caches, strict=True)
        logits = target.forward([Segment(kv_cache, tokens[-1:], 1) for tokens, kv_cache in pairs])
        results = verify_rounds(logits, [RoundToVerify(_GREEDY, len(tokens)) for tokens in sequences])
        for tokens, result in zip(sequences, results, strict=True):
            tokens.append(result.token_id)
    for kv_cache in kv_caches:
        kv_cache.release()
    stop_ids = target.vocabulary.stop_ids
    answers = [tokens[len(prompt) :] for tokens, prompt in zip(sequences, prompts, strict=True)]
    return [list(takewhile(lambda token: token not in stop_ids, answer)) or answer[:1] for answer in answers]
