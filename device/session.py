"""The device's side of a session: draft, send the Draft, commit the Verdict.

Knows tokens, not text; ``session_requests.py`` gets the requests answered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

from device.client import Client
from device.common_prefix import common_prefix
from device.draft_model import DraftModel
from device.drafter import Drafter
from device.planner import Planner
from device.session_requests import SessionRequests
from device.settings import DraftSettings
from protocol.errors import CancelledError, ContextLengthError, NonFiniteError
from protocol.limits import option_name
from protocol.messages import Mode, Sampling, Verdict

_PREFILL_INTERVAL = 8
"""While the target decodes alone, the draft model runs the new tokens in chunks of this size, which is cheaper."""


class Origin(StrEnum):
    """How a token of the answer was produced."""

    ACCEPTED = "accepted"
    RECOVERED = "recovered"
    BONUS = "bonus"
    TARGET = "target"


@dataclass(frozen=True)
class AnswerToken:
    """One committed token of an answer.

    ``origin`` is ``target`` where nothing was drafted. ``margin`` is the draft model's, in nats, of an accepted
    token; None where it was sampled from its distribution, and for tokens of the target.
    """

    token_id: int
    origin: Origin
    margin: float | None = None


@dataclass
class Counters:
    """What a session has done so far."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class DeviceSession:
    """One conversation: the committed tokens, and answers that continue them.

    Args:
        client: the greeted base station.
        planner: decides how much to draft.
        settings: how to draft and sample.
        model: the draft model.
        prompt_ids: the first prompt.

    Attributes:
        tokens: committed so far, the prompt included.
        counters: over all answers.

    Raises:
        SettingsError: the base station does not serve these settings.
        ContextLengthError: the prompt does not fit the target's context, or exceeds the base station's limit.
    """

    def __init__(
        self, client: Client, planner: Planner, settings: DraftSettings, model: DraftModel, prompt_ids: list[int]
    ) -> None:
        client.check_served(settings)
        self.counters = Counters()
        self.tokens: list[int] = []
        self._client = client
        self._planner = planner
        self._settings = settings
        self._target_alone = settings.mode is Mode.TARGET
        self._draft_context = model.manifest.context_length
        self._drafter = Drafter(
            model,
            settings.mode,
            settings.sampling,
            settings.uplink,
            client.vocab_size,
            client.stop_ids,
            client.check_cancelled,
        )
        self._requests = SessionRequests(client, settings.mode, settings.sampling, self.tokens)
        self._check_prompt(prompt_ids)
        began = client.now()
        try:
            self._requests.open(prompt_ids)
            self._planner.observe_opened(client.now().seconds - began.seconds)
            self._commit_prompt(prompt_ids)
        except (NonFiniteError, CancelledError):  # nobody else could close the session
            self.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether another prompt can continue the session: no reply is outstanding."""
        return self._requests.ready

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self._client.stop_ids

    def extend(self, prompt_ids: list[int], sampling: Sampling | None = None, planner: Planner | None = None) -> None:
        """Continue with a prompt; only what differs from the committed tokens is sent and run.

        Args:
            prompt_ids: the whole conversation.
            sampling: how the target is sampled from now on; None for no change.
            planner: for these settings; None for no change.

        Raises:
            ContextLengthError: it does not fit the target's context, or exceeds the base station's limit.
        """
        sampling = sampling or self._drafter.sampling
        self._planner = planner or self._planner
        start = common_prefix(self.tokens, prompt_ids[:-1])
        can_extend = self._requests.can_extend(sampling)
        self._check_prompt(prompt_ids, start if can_extend else 0)
        self._drafter.sampling = sampling
        if can_extend:
            self._requests.extend(start, prompt_ids[start:], sampling)
        else:  # the target still decodes an abandoned answer, or the base station is of an older version
            self._requests.reopen(prompt_ids, sampling)
        self._commit_prompt(prompt_ids)

    def answer(self, max_new_tokens: int) -> Iterator[AnswerToken]:
        """The answer to the prompt, each token as soon as its round is committed.

        Ends after a stop id, ``max_new_tokens`` tokens or at the end of the context.
        """
        start = len(self.tokens)
        end = start + max_new_tokens
        while (room := min(end, self._client.welcome.context_length) - len(self.tokens)) > 0:
            alone = self._decode_len(room)
            try:
                for token in self._decode(alone) if alone else self._round(room - 1):
                    self._client.check_cancelled()
                    yield token
                    if token.token_id in self.stop_ids:
                        return
            except ContextLengthError:  # the base station restarted with a context that the committed tokens fill
                if len(self.tokens) == start:
                    raise
                return

    def close(self) -> None:
        """End the session at the base station."""
        self._requests.close()

    def _round(self, room: int) -> list[AnswerToken]:
        """Draft up to ``room`` tokens, send them, and commit the accepted ones and the token that follows."""
        began = self._client.now()
        fixed = self._settings.draft_len
        draft_len = min(self._client.welcome.max_draft_len, room, self._draft_room, fixed or room)
        should_continue = self._planner.should_continue if fixed is None else None
        drafted = self._drafter.draft(self.tokens, draft_len, should_continue)
        sent = self._client.now()
        while_waiting = self._drafter.cache_last_token if self._settings.cache_last_token else None
        token_ids, verdict = self._requests.draft(drafted, while_waiting)
        received = self._client.now()
        reply_seconds = None if self._requests.take_prefilled() else received.seconds - sent.seconds
        margins = drafted.margins[: len(token_ids)]
        self._planner.observe(margins, verdict.accepted, sent.seconds - began.seconds, reply_seconds)
        self._client.record(self._settings.mode, verdict, draft_len, len(token_ids), (began, sent, received))
        self.counters.drafted += len(token_ids)
        self.counters.accepted += verdict.accepted
        return self._commit(token_ids, verdict, margins)

    def _decode_len(self, room: int) -> int:
        """How many tokens the target decodes alone now; 0 where the device drafts."""
        if self._target_alone or not self._draft_room:
            return room
        return 0 if self._settings.draft_len else min(self._planner.decode_len(), room)

    @property
    def _draft_room(self) -> int:
        """Tokens that fit the draft model's context after the committed ones; without any the target decodes alone."""
        return max(0, self._draft_context - len(self.tokens))

    def _decode(self, count: int) -> Iterator[AnswerToken]:
        """Let the target decode alone, and commit its tokens as they come."""
        moments = [self._client.now()]
        for verdict in self._requests.decode(count):
            moments.append(self._client.now())
            self._client.record(self._settings.mode, verdict, 0, 0, (moments[-2], moments[-2], moments[-1]))
            yield from self._commit((), verdict)
            if len(moments) % _PREFILL_INTERVAL == 0:
                self._prefill_draft_model()
        self._prefill_draft_model()
        seconds = [moment.seconds for moment in moments]
        first_seconds = None if self._requests.take_prefilled() else seconds[1] - seconds[0]
        self._planner.observe_decoded(len(seconds) - 1, first_seconds, seconds[-1] - seconds[1])

    def _prefill_draft_model(self) -> None:
        """Run the committed tokens through the draft model, so that drafting can start at once."""
        if not self._target_alone and self._draft_room:
            self._drafter.prefill(self.tokens)

    def _commit(
        self, drafted: Sequence[int], verdict: Verdict, margins: Sequence[float | None] = ()
    ) -> list[AnswerToken]:
        self.counters.rounds += 1
        last = Origin.BONUS if verdict.accepted == len(drafted) else Origin.RECOVERED
        accepted = islice(zip(drafted, margins, strict=True), verdict.accepted)
        committed = [AnswerToken(token_id, Origin.ACCEPTED, margin) for token_id, margin in accepted]
        committed.append(AnswerToken(verdict.token_id, last if drafted else Origin.TARGET))
        self.tokens += [token.token_id for token in committed]
        return committed

    def _commit_prompt(self, prompt_ids: list[int]) -> None:
        self.tokens[:] = prompt_ids
        self._prefill_draft_model()

    def _check_prompt(self, prompt_ids: list[int], start: int = 0) -> None:
        context_length = self._client.welcome.context_length
        if len(prompt_ids) >= context_length:
            allowed = f"at most {context_length - 1} (the target's context at the base station)"
            raise ContextLengthError("prompt", f"{len(prompt_ids)} tokens", allowed)
        new, most = len(prompt_ids) - start, self._client.welcome.max_prompt_len
        if new > most:
            allowed = f"at most {most} at once (the base station's {option_name('max_prompt_len')})"
            raise ContextLengthError("prompt", f"{new} new tokens", allowed)
