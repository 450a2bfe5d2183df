"""The bridge between a session in the target's tokens and a draft model with a vocabulary of its own.

It takes the place of the draft model: target tokens in, logits by target id out. The
draft model's context is the translation of the target tokens: a common token is one
token in both, another is spelled with the draft model's tokens, byte for byte, so
that the two contexts say the same also within a character. A prompt that the draft
model has in a form of its own, by its own chat template, is taken in that form.

Only tokens that both vocabularies have are ever drafted. Whatever is drafted is a
guess that the base station verifies, so that answers stay the target's own.
"""

from collections.abc import Sequence
from copy import copy
from typing import Self

import numpy as np

from common.common_prefix import common_prefix
from common.vocabulary_map import VocabularyMap
from device.drafting.draft_model import Logits, SequenceModel
from device.text.prompt import Prompt


class VocabularyBridge:
    """A draft model that takes and returns the target's token ids.

    Args:
        model: the draft model, whose KV cache nothing else may use.
        vocabulary_map: which of its tokens are the target's.

    Attributes:
        manifest: of the bundle.
        token_ids: the target tokens in the cache.
        forked_length: how many of them it was forked with.
    """

    def __init__(self, model: SequenceModel, vocabulary_map: VocabularyMap) -> None:
        self.manifest = model.manifest
        self.token_ids: list[int] = []
        self.forked_length = 0
        self._model = model
        self._map = vocabulary_map
        self._ends: list[int] = []  # the length of the draft model's context after each of token_ids
        self._prompt = Prompt(())  # token_ids are a prefix of it, or begin with it

    @property
    def length(self) -> int:
        """Target tokens in the cache."""
        return len(self.token_ids)

    def fork(self, length: int) -> Self:
        """The same with a cache of its own, which starts with a copy of the first ``length`` positions."""
        fork = copy(self)
        fork._model = self._model.fork(self._end(length))
        fork.token_ids, fork._ends = self.token_ids[:length], self._ends[:length]
        fork.forked_length = length
        return fork

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Translate a prompt as the draft model has it, if it does; what the cache shares with that is kept."""
        if not isinstance(prompt_ids, Prompt) or not prompt_ids.draft_ids:
            return
        draft_ids = prompt_ids.draft_ids
        shared = common_prefix(self._model.token_ids, draft_ids[:-1])
        count = min(len(prompt_ids) - 1, ((shared + 1) * len(prompt_ids) - 1) // len(draft_ids))
        self._prompt = prompt_ids
        self.token_ids = prompt_ids[:count]
        self._ends = [self._prompt_end(length) for length in range(1, count + 1)]
        self._model.rollback(self._end(count))

    def forward(self, token_ids: Sequence[int]) -> Logits:
        """Run one or more target tokens after the cached ones.

        Returns:
            float32 [the target's vocab_size], the logits after the last of them, -inf for tokens that are not common.
        """
        expected = self._prompt[self.length : self.length + len(token_ids)]
        if expected != list(token_ids[: len(expected)]):
            self._forget_prompt()
        translated: list[int] = []
        for token_id in token_ids:
            translated += self._translation(token_id)
            self.token_ids.append(token_id)
            self._ends.append(self._model.length + len(translated))
        if not translated:  # tokens without a text: the logits are those of the context before them
            return self._map.target_logits(self._last_logits())
        return self._map.target_logits(self._model.forward(translated))

    def rollback(self, length: int) -> None:
        """Shorten the cache to ``length`` target tokens."""
        self._model.rollback(self._end(min(length, self.length)))
        del self.token_ids[length:], self._ends[length:]

    def room(self, token_ids: Sequence[int]) -> int:
        """How many tokens fit the draft model's context after ``token_ids``; a drafted token is one in both."""
        prompt = token_ids if isinstance(token_ids, Prompt) and token_ids.draft_ids else self._prompt
        begins = list(token_ids[: len(prompt)]) == prompt
        start = len(prompt) if begins else 0
        used = len(prompt.draft_ids) if begins else 0
        cached = common_prefix(self.token_ids, token_ids)
        if cached > start:
            start, used = cached, self._end(cached)
        used += sum(len(self._map.spelling(token_id)) for token_id in token_ids[start:])
        return max(0, self.manifest.context_length - used)

    def _translation(self, token_id: int) -> Sequence[int]:
        """The draft model's tokens for the target token that follows ``token_ids``."""
        length = self.length
        if length < len(self._prompt):
            return self._prompt.draft_ids[self._prompt_end(length) : self._prompt_end(length + 1)]
        return self._map.spelling(token_id)

    def _prompt_end(self, length: int) -> int:
        """The length of the draft model's context after ``length`` tokens of the prompt: in proportion."""
        return length * len(self._prompt.draft_ids) // len(self._prompt)

    def _end(self, length: int) -> int:
        """The length of the draft model's context after ``length`` of ``token_ids``."""
        return self._ends[length - 1] if length else 0

    def _forget_prompt(self) -> None:
        """Translate ``token_ids``, with which the prompt began, one by one: what follows is not the prompt."""
        kept = [*self.token_ids]
        self.rollback(0)
        self._prompt = Prompt(())
        if kept:
            self.forward(kept)

    def _last_logits(self) -> Logits:
        """The draft model's logits after its context; those of no preference where that is empty."""
        if not (ids := self._model.token_ids):
            return np.zeros(self.manifest.graph_tokens, np.float32)
        last = ids[-1]
        self._model.rollback(len(ids) - 1)
        return self._model.forward([last])
