"""Tokens per second on this board and link, predicted from a short session.

The draft model's time is measured on this board, and the target's with a few answers
over the link. They go through the planner's estimates into the model of a round
(``common/round_model.py``), as in any answer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from common.round_model import expected_tokens
from device.drafting.draft_model import SequenceModel
from device.planning.planner import FIRST_DRAFT_LEN, MAX_DRAFT_LEN, Planner
from device.planning.trials import TRIAL
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.errors import ModelError, SettingsError
from protocol.messages import Mode

TYPICAL_ANSWER = 128
"""Tokens of the answer that is predicted, unless answers are limited to fewer."""
_PROMPTS = (
    "Why do leaves change their colour in autumn?",
    "Write a short story about a clockmaker and her apprentice.",
    "How do I plan a small vegetable garden?",
)
_TARGET_TOKENS = 16
_DRAFTED_TOKENS = 64
_WHOLE = 10
"""Tokens per second from which no decimals are shown."""
_MOST_SECONDS = 20.0
"""After so long no further answer is begun."""


@dataclass(frozen=True)
class SpeedPrediction:
    """What an answer is predicted to take; the field names are those of ``doctor --json``.

    Attributes:
        answer_tokens: tokens of the answer.
        target_tokens_per_second: where the target decodes alone.
        drafting_tokens_per_second: with drafting; None in mode ``target``.
        draft_len: tokens drafted in a round.
        acceptance: the probability that a drafted token is accepted.
        draft_seconds: to draft a token.
        target_seconds: between two tokens of the target alone.
        round_seconds: of a round of ``draft_len`` tokens.
        first_token_seconds: from a prompt to the first token.
    """

    answer_tokens: int
    target_tokens_per_second: float
    drafting_tokens_per_second: float | None
    draft_len: int
    acceptance: float
    draft_seconds: float
    target_seconds: float
    round_seconds: float
    first_token_seconds: float

    @property
    def pays(self) -> bool:
        """Whether an answer takes no longer with drafting; also where none is wanted."""
        drafting = self.drafting_tokens_per_second
        return drafting is None or drafting >= self.target_tokens_per_second

    @property
    def text(self) -> str:
        """The prediction in one line."""
        alone = f"{_shown(self.target_tokens_per_second)} tokens/s"
        if self.drafting_tokens_per_second is None:
            return f"{alone} without drafting"
        drafting = f"{_shown(self.drafting_tokens_per_second)} tokens/s with drafting (draft length {self.draft_len})"
        return f"{drafting}, {alone} without, in answers of {self.answer_tokens} tokens"


class ShortSession:
    """Answers that measure the speed, with one planner.

    Args:
        client: the greeted base station.
        model: the draft model.
        tokenizer: of the same bundle.
        settings: how to draft and sample.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        client: Client,
        model: SequenceModel,
        tokenizer: Tokenizer,
        settings: DraftSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._model = model
        self._settings = settings
        self._prompts = [_encoded(tokenizer, prompt) for prompt in _PROMPTS]
        self._clock = clock
        self._planner = self._new_planner()

    def predict(self, answer_tokens: int) -> SpeedPrediction:
        """Measure, and predict an answer of so many tokens.

        Raises:
            EdgedraftError: the base station does not answer, or does not serve the settings.
            ModelError: the target ends each of its answers after one token.
        """
        began, alone = self._clock(), replace(self._settings, mode=Mode.TARGET)
        self._answer(self._prompts[0], alone, TRIAL)
        self._planner = self._new_planner()  # the first forward passes are slow, and do not count
        first_seconds = self._measure_target(alone)
        if self._settings.mode is not Mode.TARGET:
            for prompt in self._prompts:
                self._answer(prompt, self._settings, _DRAFTED_TOKENS)
                if self._clock() - began > _MOST_SECONDS:
                    break
        return self._prediction(answer_tokens, first_seconds)

    def _measure_target(self, alone: DraftSettings) -> float:
        """Let the target decode an answer that tells its speed; the seconds to the first token."""
        for prompt in reversed(self._prompts):
            first_seconds = self._answer(prompt, alone, _TARGET_TOKENS)
            if self._planner.times.target_seconds():
                return first_seconds
        raise ModelError(
            f"the target {self._client.welcome.model} ends each answer after one token, which tells no speed; "
            "check its stop ids and its chat template"
        )

    def _new_planner(self) -> Planner:
        return Planner(self._model.manifest.target_quality, self._settings.sampling.greedy)

    def _answer(self, prompt: list[int], settings: DraftSettings, count: int) -> float:
        """An answer in a session of its own; the seconds to its first token."""
        began, first_seconds = self._clock(), 0.0
        session = DeviceSession(self._client, self._planner, settings, self._model, prompt)
        try:
            for _ in session.answer(count):
                first_seconds = first_seconds or self._clock() - began
        finally:
            session.close()
        return first_seconds

    def _prediction(self, answer_tokens: int, first_seconds: float) -> SpeedPrediction:
        times, acceptance = self._planner.times, self._planner.alpha
        most = min(MAX_DRAFT_LEN, self._client.welcome.max_draft_len)
        draft_len = self._settings.draft_len or times.best_draft_len(acceptance, range(1, most + 1))
        target_seconds = times.target_seconds()
        alone_seconds = first_seconds + (answer_tokens - 1) * target_seconds
        trial = 0 if self._settings.draft_len else min(TRIAL, answer_tokens)
        trial_seconds = first_seconds + max(0, trial - 1) * target_seconds
        drafting_seconds = trial_seconds + self._seconds_of_rounds(draft_len, answer_tokens - trial)
        is_drafting = self._settings.mode is not Mode.TARGET
        return SpeedPrediction(
            answer_tokens,
            answer_tokens / alone_seconds,
            answer_tokens / drafting_seconds if is_drafting else None,
            draft_len if is_drafting else 0,
            acceptance,
            times.draft_seconds,
            target_seconds,
            times.seconds(draft_len),
            first_seconds,
        )

    def _seconds_of_rounds(self, draft_len: int, tokens: int) -> float:
        """Time of the rounds that yield so many tokens; a planned first round is short.

        The others are as fast as the measured ones: the planner drafts less where a rejection is likely, so they
        yield more than rounds of one draft length at the mean acceptance.
        """
        first = draft_len if self._settings.draft_len else min(draft_len, FIRST_DRAFT_LEN)
        length = max(0, min(first, tokens - 1))
        left = max(0.0, tokens - expected_tokens(self._planner.alpha, length))
        return min(tokens, 1) * self._planner.times.seconds(length) + left / self._planner.tokens_per_second


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    except SettingsError:  # a bundle without a chat template
        return tokenizer.encode(prompt)


def _shown(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.{0 if tokens_per_second >= _WHOLE else 1}f}"
