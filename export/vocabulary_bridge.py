"""A draft model with another vocabulary than its target: the files that the device needs, and the bridged graph."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.token_bytes import TokenBytes
from common.vocabulary_map import ABSENT, VocabularyMap
from export.quality import Continuation, TeacherForcing
from export.source_model import Models
from export.weight_choice import TargetText
from protocol.bundle import (
    DRAFT_TOKENIZER_NAME,
    TOKENIZER_NAME,
    VOCABULARY_MAP_NAME,
    DraftVocabulary,
    QualityFigures,
)


class BridgedForcing:
    """A graph that gets continuations of the target in its own tokens, and returns logits by target id.

    Args:
        forcing: the graph.
        vocabulary_map: of target ids to the graph's.
        prompts: in the graph's tokens, by the target's.
    """

    def __init__(
        self, forcing: TeacherForcing, vocabulary_map: VocabularyMap, prompts: dict[tuple[int, ...], list[int]]
    ) -> None:
        self._forcing = forcing
        self._map = vocabulary_map
        self._prompts = prompts

    def logits(self, expected: Continuation) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the logits, float32[V of the target], after the prompt and after each token except the last."""
        spellings = map(self._map.spelling, expected.token_ids[:-1])
        for logits in self._forcing.run([self._prompts[tuple(expected.prompt_ids)], *spellings]):
            yield self._map.target_logits(logits)


class ExportedBridge:
    """The bridge of a bundle whose tokenizers are written; the vocabulary map is written, too.

    Args:
        output: the bundle's folder.
        models: draft model and target.
        prompts: of the quality check, in the target's tokens.
        own_prompts: the same in the draft model's tokens.

    Raises:
        MismatchError: the draft model cannot spell the target's tokens.
        ModelError: the tokens of one do not stand for bytes.
    """

    def __init__(
        self, output: Path, models: Models, prompts: Sequence[list[int]], own_prompts: Sequence[list[int]]
    ) -> None:
        self._models = models
        self._prompts = dict(zip(map(tuple, prompts), own_prompts, strict=True))
        target, draft = (
            TokenBytes.read(output / name, model.vocab_size, model.bos_token, model.eos_token)
            for name, model in ((TOKENIZER_NAME, models.session), (DRAFT_TOKENIZER_NAME, models.draft))
        )
        self._map = VocabularyMap.build(target, draft, models.vocab_size)
        self._map.write(output / VOCABULARY_MAP_NAME)

    @property
    def notice(self) -> str:
        """How the vocabularies differ, in one line."""
        assert self._models.difference is not None
        token_id, own, other = self._models.difference
        return (
            f"the vocabularies differ: id {token_id} is {own!r} in the draft model and {other!r} in the target; "
            f"{self._map.common_tokens:,} of the draft model's {self._models.draft.vocab_size:,} tokens exist in both"
        )

    def forcing(self, forcing: TeacherForcing) -> BridgedForcing:
        """A graph that takes continuations of the target's prompts."""
        return BridgedForcing(forcing, self._map, self._prompts)

    def draft_vocabulary(self, text: TargetText, quality: QualityFigures) -> DraftVocabulary:
        """What the manifest says of it, with ``quality`` against the target."""
        ids = [token_id for one in (*text.greedy, *text.sampled) for token_id in one.token_ids]
        draft = self._models.draft
        return DraftVocabulary(
            target=self._models.session.public_name,
            vocab_size=draft.vocab_size,
            bos_token=draft.bos_token,
            eos_token=draft.eos_token,
            common_tokens=self._map.common_tokens,
            coverage=float(np.mean(self._map.draft_ids[ids] != ABSENT)),
            quality=quality,
        )
