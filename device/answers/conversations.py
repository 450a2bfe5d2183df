"""The conversations that are kept, each with a session and a KV cache of its own, within a budget of tokens.

Without a base station they have KV caches alone.

A prompt continues the conversation whose last prompt it contains. Another prompt
begins a new one, with a copy of the longest common prefix that is cached. The least
recently used conversations are dropped first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.common_prefix import common_prefix
from device.answers.answer import Conversation
from device.drafting.draft_model import SequenceModel
from device.planning.planners import Planners
from device.session.client import Client
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.errors import AdmissionError, CancelledError, EdgedraftError, FaultError, LinkError, ProtocolError


class Conversations:
    """Conversations with one base station.

    Args:
        model: the draft model; its own KV cache stays empty.
        tokenizer: of the same bundle.
        cache_tokens: tokens that all conversations may have; the last one may exceed them alone.
        planners: decide how much to draft.
    """

    def __init__(self, model: SequenceModel, tokenizer: Tokenizer, cache_tokens: int, planners: Planners) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._planners = planners
        self._cache_tokens = cache_tokens
        self._max_sessions = 1
        self._kept: list[Conversation] = []

    @contextmanager
    def for_prompt(self, client: Client, prompt_ids: Sequence[int], settings: DraftSettings) -> Iterator[Conversation]:
        """The conversation that the prompt continues, or a new one; afterwards it is kept if it can go on.

        Others are dropped for it once the prompt and its settings are checked; a refused one changes nothing.

        Raises:
            SettingsError: the base station does not serve these settings.
            ContextLengthError: the prompt does not fit the context, or exceeds the base station's limit.
            GrammarError: the grammar cannot be compiled.
        """
        conversation = self._continued_by(prompt_ids, settings)
        if conversation is None:
            model = self._model_with_prefix_of(prompt_ids)
            conversation = Conversation(client, self._planners, model, self._tokenizer, settings)
        conversation.check(prompt_ids, settings)
        conversation.settings = settings
        self._kept = [*(one for one in self._kept if one is not conversation), conversation]
        self._max_sessions = client.welcome.max_sessions if client.is_greeted else len(self._kept)  # none is open
        self._drop_oldest(len(prompt_ids))
        try:
            yield conversation
        except CancelledError:
            self._settle(conversation)
            raise
        except FaultError as fault:
            if fault.session_id is not None:
                self._end(conversation)
            raise
        except (LinkError, AdmissionError, ProtocolError):  # no session can be closed over a broken link
            raise
        except EdgedraftError:
            self._end(conversation)
            raise
        self._settle(conversation)

    def make_room(self, client: Client) -> None:
        """Drop the least recently used until the base station lets this device open one more session."""
        while len(self._kept) >= max(1, client.welcome.max_sessions):
            self._end(self._kept[0])

    def end_all(self) -> None:
        """Drop all conversations and close their sessions."""
        for conversation in [*self._kept]:
            self._end(conversation)

    def forget(self) -> None:
        """Drop all conversations; their sessions went with the connection."""
        self._kept.clear()

    def _continued_by(self, prompt_ids: Sequence[int], settings: DraftSettings) -> Conversation | None:
        found = [one for one in self._kept if one.accepts(settings) and one.is_continued_by(prompt_ids)]
        return max(found, key=lambda one: len(one.token_ids), default=None)

    def _settle(self, conversation: Conversation) -> None:
        """Keep a conversation after its answer if another prompt can continue it."""
        if conversation.ready:
            self._drop_oldest(len(conversation.token_ids))
        else:
            self._end(conversation)

    def _end(self, conversation: Conversation) -> None:
        """Drop a conversation and close its session."""
        self._kept.remove(conversation)
        conversation.close()

    def _model_with_prefix_of(self, prompt_ids: Sequence[int]) -> SequenceModel:
        """The draft model with a KV cache of its own, copied from the one that starts most like the prompt."""
        models = [self._model, *(one.model for one in self._kept)]
        lengths = [common_prefix(model.token_ids, prompt_ids[:-1]) for model in models]
        longest = max(lengths)
        return models[lengths.index(longest)].fork(longest)

    def _drop_oldest(self, last_length: int) -> None:
        """Drop the least recently used until the last one fits with ``last_length`` tokens."""
        while len(self._kept) > 1:
            tokens = sum(len(one.token_ids) for one in self._kept[:-1]) + last_length
            if tokens <= self._cache_tokens and len(self._kept) <= self._max_sessions:
                return
            self._end(self._kept[0])
