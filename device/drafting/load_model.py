"""The draft model of a bundle, in the tokens of the session."""

from collections.abc import Sequence
from pathlib import Path

from common.vocabulary_map import VocabularyMap
from device.drafting.draft_model import DraftModel, SequenceModel
from device.drafting.vocabulary_bridge import VocabularyBridge


def load_model(bundle: Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> SequenceModel:
    """Load a bundle as ``DraftModel`` does, with a bridge where the draft model has a vocabulary of its own.

    Raises:
        BundleError: as ``DraftModel``; or its vocabulary map is damaged or wrong.
        SettingsError: as ``DraftModel``.
    """
    model = DraftModel(bundle, threads, providers)
    own = model.manifest.draft_vocabulary
    return model if own is None else VocabularyBridge(model, VocabularyMap.read(bundle, model.manifest, own))
