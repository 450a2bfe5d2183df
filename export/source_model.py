"""A source model by its name: configuration, tokenizer and card; and whether two of them have the same tokens."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.hub import model_name
from common.stop_ids import StopSources
from export import source
from export.model_card import read_model_card
from protocol.bundle import Origin
from protocol.errors import MismatchError
from protocol.vocabulary import first_difference, vocabulary_size


@dataclass(frozen=True)
class SourceModel:
    """A model's configuration and tokenizer, without its weights."""

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_sources: StopSources

    @classmethod
    def read(cls, name: str, scratch: Path, *, weights: bool) -> "SourceModel":
        """Read the configuration and tokenizer of model ``name``.

        Args:
            name: a model folder, a hub name or a ``.gguf`` file.
            scratch: an empty folder; a GGUF file is unpacked into it.
            weights: whether its weights will be needed.

        Raises:
            ModelError: the model does not exist or cannot be read.
        """
        folder = source.model_folder(name, scratch, weights=weights)
        tokenizer = source.load_tokenizer(folder)
        return cls(name, folder, source.load_config(folder), tokenizer, source.stop_sources_of(folder, tokenizer))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Map of token to id."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return vocabulary

    @property
    def vocab_size(self) -> int:
        """Ids in use that the model has an output for."""
        rows: int = self.config.get_text_config().vocab_size
        return min(vocabulary_size(self.vocabulary), rows)

    def origin(self, versions: dict[str, str]) -> Origin:
        """Whose model it is: as its card says, or else by its name."""
        card = read_model_card(self.folder)
        name = model_name(self.name) if Path(self.name).exists() else self.name
        return Origin(card.origin or name, card.licence, versions)


def check_match(draft: SourceModel, target: SourceModel) -> None:
    """Check that two models use the same token for every id that both know.

    Raises:
        MismatchError: names the first id that differs.
    """
    difference = first_difference(draft.vocabulary, target.vocabulary)
    if difference is not None:
        token_id, own, other = difference
        raise MismatchError(
            f"id {token_id} is {own!r} in {draft.name!r} and {other!r} in {target.name!r}; "
            "a draft model needs its target's vocabulary"
        )
