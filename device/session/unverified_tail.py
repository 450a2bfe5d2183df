"""The unverified tail of an answer: tokens that the draft model adds while the base station does not answer.

Once it answers again the tail is sent in Drafts, like any drafted tokens. Knows tokens; not how an outage is
noticed.
"""

from collections.abc import Sequence

from common.grammar import Grammar
from device.drafting.draft_model import SequenceModel
from device.drafting.drafter import DraftedToken, Drafter
from device.session.client import Client
from device.settings import DraftSettings
from protocol.errors import ContextLengthError, GrammarError
from protocol.messages import Sampling


class AnswerEndedError(Exception):
    """The answer has ended with unverified tokens; ``reason`` is ``stop`` or ``length``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnverifiedTail:
    """The unverified tokens of one answer after the other, in one conversation.

    Args:
        client: tells the stop ids and the target's context once it is greeted.
        model: the draft model of the conversation, which its session uses too.
        settings: how to draft.

    Attributes:
        drafted: the tail, which follows the committed tokens.
    """

    def __init__(self, client: Client, model: SequenceModel, settings: DraftSettings) -> None:
        self._drafter = Drafter(
            model, settings.mode, settings.sampling, settings.uplink, before_pass=client.check_cancelled
        )
        self.drafted: list[DraftedToken] = []
        self._client = client
        self._prompt_ids: Sequence[int] = ()
        self._tokens: list[int] = []
        self._answer_start = self._end = self._start = 0
        self._sampling = settings.sampling
        self._grammar: Grammar | None = None
        self._has_begun = self._took_model = False

    def draft_with(self, drafter: Drafter) -> None:
        """Use the session's drafter from now on; give up a tail that was drafted for another vocabulary size."""
        self._drafter, self._has_begun = drafter, False
        distributions = [token.distribution for token in self.drafted if token.distribution]
        if any(distribution.vocab_size != self._client.vocab_size for distribution in distributions):
            self.drafted.clear()

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Check that a prompt fits the draft model's context, where no base station is used.

        Raises:
            ContextLengthError: it does not.
        """
        if self._client.is_offline and not self._drafter.room(prompt_ids):
            most = self._drafter.context_length - 1
            raise ContextLengthError(
                "prompt", f"{len(prompt_ids)} tokens", f"at most {most} (the draft model's context)"
            )

    def begin(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, grammar: Grammar | None
    ) -> None:
        """Prepare for the answer to a prompt; nothing of it is drafted yet."""
        self.drafted.clear()
        self._tokens = [*prompt_ids]
        self._prompt_ids = prompt_ids
        self._answer_start, self._end = len(prompt_ids), len(prompt_ids) + max_new_tokens
        self._sampling, self._grammar = sampling, grammar
        self._has_begun = False

    def commit(self, token_id: int) -> None:
        """Append the next committed token of the answer; the tail ends where it differs."""
        self._tokens.append(token_id)
        if self.drafted and self.drafted[0].token_id == token_id:
            del self.drafted[0]
        else:
            self.drafted.clear()

    def following(self, pending_ids: Sequence[int]) -> list[DraftedToken]:
        """The part of the tail that follows drafted tokens on their way, up to a stop id; empty where they differ."""
        count = len(pending_ids)
        if [token.token_id for token in self.drafted[:count]] != [*pending_ids]:
            return []
        rest, stop_ids = self.drafted[count:], self._drafter.stop_ids
        return rest[: next((index + 1 for index, token in enumerate(rest) if token.token_id in stop_ids), len(rest))]

    def draft_token(self) -> bool:
        """Add a token to the tail; whether the draft model can: the conversation may be too long for it.

        Raises:
            AnswerEndedError: the answer has ended.
            ContextLengthError: the prompt does not fit the draft model's context, and no base station is used.
            GrammarError: the grammar exceeds a limit, and no base station is used.
        """
        tokens = [*self._tokens, *(token.token_id for token in self.drafted)]
        drafter = self._begun_drafter()
        self._check_end(tokens)
        if not drafter.room(tokens):
            if not self._client.is_greeted:
                self._end_at_context(tokens)
            return False
        if not self.drafted:
            self._start = len(tokens)
        drafter.follow(tokens)
        token = drafter.draft_token(len(tokens) - self._start)
        if drafter.grammar and drafter.grammar.error:  # the token was drafted without it
            if self._client.is_offline:
                raise GrammarError(f"the grammar cannot be applied: {drafter.grammar.error}")
            return False
        self.drafted.append(token)
        return True

    def take_model(self) -> bool:
        """Whether the draft model has drafted here since the last call, so that its cache holds other tokens."""
        took, self._took_model = self._took_model, False
        return took

    def _begun_drafter(self) -> Drafter:
        self._took_model = True
        if not self._has_begun:
            self._drafter.sampling, self._drafter.grammar = self._sampling, self._grammar
            self._drafter.answer_start = self._answer_start
            self._drafter.begin(self._prompt_ids)
            self._has_begun = True
        return self._drafter

    def _check_end(self, tokens: Sequence[int]) -> None:
        """End the answer after a stop id, at its longest, or at the end of the target's context."""
        if self.drafted and tokens[-1] in self._drafter.stop_ids:
            raise AnswerEndedError("stop")
        is_full = self._client.is_greeted and len(tokens) >= self._client.welcome.context_length
        if len(tokens) >= self._end or is_full:
            raise AnswerEndedError("length")

    def _end_at_context(self, tokens: Sequence[int]) -> None:
        """End the answer at the end of the draft model's context, as long as the target's is not known."""
        if self.drafted:
            raise AnswerEndedError("length")
        self.check_prompt(tokens)
