"""A source model by its name: configuration, tokenizer and card; and whether another one has the same tokens."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.hub import model_name
from common.stop_ids import StopSources
from export import source
from export.model_card import read_model_card
from protocol.bundle import Origin
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
    def read(cls, name: str, scratch: Path) -> "SourceModel":
        """Read the configuration and tokenizer of model ``name``.

        Args:
            name: a model folder, a hub name or a ``.gguf`` file.
            scratch: an empty folder; the tokenizer of a GGUF file is written into it.

        Raises:
            ModelError: the model does not exist or cannot be read.
        """
        folder = source.model_folder(name, scratch, weights=False)
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

    @property
    def bos_token(self) -> str:
        """The token that starts a text, "" if there is none."""
        return self.tokenizer.bos_token or ""

    @property
    def eos_token(self) -> str:
        """The token that ends a text or a turn, "" if there is none."""
        return self.tokenizer.eos_token or ""

    @property
    def public_name(self) -> str:
        """As its card says, or else its name; a folder without its path."""
        name = model_name(self.name) if Path(self.name).exists() else self.name
        return read_model_card(self.folder).origin or name

    def origin(self, versions: dict[str, str]) -> Origin:
        """Whose model it is: as its card says, or else by its name."""
        return Origin(self.public_name, read_model_card(self.folder).licence, versions)


@dataclass(frozen=True)
class Models:
    """A draft model and its target, if one is given."""

    draft: SourceModel
    target: SourceModel | None

    @cached_property
    def are_bridged(self) -> bool:
        """Whether the two have different tokens for an id."""
        return self.difference is not None

    @cached_property
    def difference(self) -> tuple[int, str, str] | None:
        """The first id with different tokens, and these tokens of draft model and target."""
        return None if self.target is None else first_difference(self.draft.vocabulary, self.target.vocabulary)

    @property
    def session(self) -> SourceModel:
        """The model whose tokens, stop ids and chat template the session has."""
        return self.target if self.target is not None and self.are_bridged else self.draft

    @property
    def vocab_size(self) -> int:
        """Tokens of the session that the device knows."""
        models = [self.session] if self.are_bridged or self.target is None else [self.draft, self.target]
        return min(model.vocab_size for model in models)

    @property
    def graph_tokens(self) -> int:
        """Tokens that the draft model's graph is used with."""
        return self.draft.vocab_size if self.are_bridged else self.vocab_size
