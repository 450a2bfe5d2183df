"""Sessions whose draft model runs batched beside the target, as a station without devices would serve them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from basestation.verification.verify import RoundToVerify, verify_rounds
from bench.station.recording import Recording
from bench.station.replay_client import Score
from protocol.messages import Sampling

_GREEDY = Sampling()


@dataclass
class ColocatedScore(Score):
    """Also the seconds of the draft model's forward passes, and of the target's with its verification."""

    draft_seconds: list[float] = field(default_factory=list)
    verify_seconds: list[float] = field(default_factory=list)


class ColocatedSessions:
    """Sessions that answer their prompts over and over, all in the same forward passes, at temperature 0.

    Args:
        draft: the draft model, with the target's vocabulary.
        target: the target model.
        recordings: a prompt per session, and the length of its answer.
        draft_len: tokens drafted per round, γ.

    Attributes:
        score: of the last run.
        sequences: the committed tokens of each session, its prompt included.
    """

    def __init__(
        self, draft: TargetModel, target: TargetModel, recordings: Sequence[Recording], draft_len: int
    ) -> None:
        self.score = ColocatedScore()
        self._draft = draft
        self._target = target
        self._recordings = recordings
        self._draft_len = draft_len
        self.sequences = [list(recording.prompt_ids) for recording in recordings]
        self._draft_caches = [draft.new_kv_cache() for _ in recordings]
        self._target_caches = [target.new_kv_cache() for _ in recordings]
        for model, kv_caches in ((draft, self._draft_caches), (target, self._target_caches)):
            for kv_cache, tokens in zip(kv_caches, self.sequences, strict=True):
                model.forward([Segment(kv_cache, tokens[:-1], 0)])

    def run(self, seconds: float) -> ColocatedScore:
        """Run at least one round, and for this long; the score is of this time alone."""
        self.score, end = ColocatedScore(), time.monotonic() + seconds
        self.run_round()
        while time.monotonic() < end:
            self.run_round()
        return self.score

    def run_round(self) -> None:
        """Draft for all sessions, γ forward passes, and verify in another."""
        began = time.perf_counter()
        drafted = self._drafts()
        drafting_ended = time.perf_counter()
        self._verify(drafted)
        ended = time.perf_counter()
        self.score.verify_seconds.append(ended - drafting_ended)
        self.score.rounds += [ended - began] * len(self.sequences)

    def release(self) -> None:
        """Free the KV caches."""
        for kv_cache in (*self._draft_caches, *self._target_caches):
            kv_cache.release()

    def _drafts(self) -> list[list[int]]:
        drafted: list[list[int]] = [[] for _ in self.sequences]
        vocab_size = self._target.vocabulary.size
        for _ in range(self._draft_len):
            began = time.perf_counter()
            segments = [
                Segment(kv_cache, [*tokens, *draft][kv_cache.length :], 1)
                for kv_cache, tokens, draft in zip(self._draft_caches, self.sequences, drafted, strict=True)
            ]
            best = self._draft.forward(segments)[:, :vocab_size].argmax(dim=-1)
            for draft, token_id in zip(drafted, best.tolist(), strict=True):
                draft.append(token_id)
            self.score.draft_seconds.append(time.perf_counter() - began)
        return drafted

    def _verify(self, drafted: Sequence[list[int]]) -> None:
        segments = [
            Segment(kv_cache, [tokens[-1], *draft], len(draft) + 1)
            for kv_cache, tokens, draft in zip(self._target_caches, self.sequences, drafted, strict=True)
        ]
        rounds = [
            RoundToVerify(_GREEDY, len(tokens), draft) for tokens, draft in zip(self.sequences, drafted, strict=True)
        ]
        results = verify_rounds(self._target.forward(segments), rounds)
        for index, result in enumerate(results):
            self._commit(index, [*drafted[index][: result.accepted], result.token_id])
            self.score.drafted += len(drafted[index])
            self.score.accepted += result.accepted
            self.score.tokens += result.accepted + 1

    def _commit(self, index: int, tokens: Sequence[int]) -> None:
        """Append the tokens of a round; at the end of the answer, start it again."""
        sequence, recording = self.sequences[index], self._recordings[index]
        sequence += tokens
        ended = any(token_id in self._target.vocabulary.stop_ids for token_id in tokens)
        if ended or len(sequence) - len(recording.prompt_ids) >= len(recording.answer_ids):
            del sequence[len(recording.prompt_ids) :]
        for kv_cache in (self._draft_caches[index], self._target_caches[index]):
            kv_cache.rollback(len(sequence) - 1)
