"""Pairs of table-driven models with different vocabularies.

The target's tokens include parts of characters, spaces and tabs; the draft model has some of them
under other ids, tokens that the target does not have, and every single byte that is needed.
"""

from dataclasses import replace
from typing import cast

from common.token_bytes import TokenBytes
from common.vocabulary_map import VocabularyMap
from device.drafting.draft_model import SequenceModel
from device.drafting.vocabulary_bridge import VocabularyBridge
from protocol.bundle import DraftVocabulary, Manifest, QualityFigures
from tests.fakes import FakeDraftModel, Table, manifest, random_table

SHEEP = "🐑".encode()
TARGET_TEXTS = [b"a", b"b", b"ab", b" a", b"\n    ", b"\t", "é".encode(), SHEEP[:2], SHEEP[2:], "ни".encode(), b"ba"]
END = len(TARGET_TEXTS)
"""The target's special token."""
TARGET_SIZE = END + 1
TARGET = TokenBytes(dict(enumerate(TARGET_TEXTS)), {"<end>": END}, eos_token="<end>")  # noqa: S106 - a token
_LEAST = sorted({bytes([byte]) for text in [*TARGET_TEXTS, b"<end>"] for byte in text})


def draft_tokens(common: int) -> TokenBytes:
    """Single bytes, longer tokens of its own, and the first ``common`` of the target's, in another order."""
    texts = [b"aa", b"b ", *TARGET_TEXTS[:common][::-1], SHEEP]
    texts += [byte for byte in _LEAST if byte not in texts]
    special = {"</s>": len(texts)}
    return TokenBytes(dict(enumerate(texts)), special, eos_token="</s>")  # noqa: S106 - a token


def draft_manifest(common: int, context_length: int = 4096) -> Manifest:
    tokens = draft_tokens(common)
    size = len(tokens.ordinary) + len(tokens.special)
    own = DraftVocabulary("table", size, "", "</s>", common, 0.9, QualityFigures(0.6, 0.5, 0.5, 0.5, positions=1))
    return replace(manifest(TARGET_SIZE, (), context_length), draft_vocabulary=own)


def bridged(
    common: int = len(TARGET_TEXTS), table: Table | None = None, context_length: int = 4096
) -> tuple[VocabularyBridge, TokenBytes]:
    """A draft model of another vocabulary behind a bridge, and its tokens; its logits are random without a table."""
    tokens = draft_tokens(common)
    table = random_table(len(tokens.ordinary) + len(tokens.special), seed=5) if table is None else table
    model = cast(SequenceModel, FakeDraftModel(table, draft_manifest(common, context_length)))
    return VocabularyBridge(model, VocabularyMap.build(TARGET, tokens, TARGET_SIZE)), tokens


def context_of(bridge: VocabularyBridge) -> list[int]:
    """The draft model's context: the translation of the bridge's ``token_ids``."""
    return [*bridge._model.token_ids]


def similar_table(target: Table, common: int) -> Table:
    """Logits of the draft model that are the target's for the tokens of the same bytes, where both have them.

    It looks at its own last two tokens, of which those that the target does not have count as its token 0.
    """
    tokens = draft_tokens(common)
    bridge = VocabularyMap.build(TARGET, tokens, TARGET_SIZE)
    size = len(tokens.ordinary) + len(tokens.special)
    target_ids = [0] * size
    for token_id, draft_id in enumerate(bridge.draft_ids.tolist()):
        if draft_id >= 0:
            target_ids[draft_id] = token_id
    table = 0.8 * target[target_ids][:, target_ids][:, :, target_ids]
    return cast(Table, (table + 0.5 * random_table(size, seed=6)).astype("float32"))
