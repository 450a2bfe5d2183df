"""What devices are told of a target: enough to answer Hello without the model."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from basestation.target.vocabulary import Vocabulary

if TYPE_CHECKING:
    from basestation.target.target_model import TargetModel  # imports PyTorch


@dataclass(frozen=True)
class ServedTarget:
    """A target as the handshake sees it.

    Attributes:
        name: the last part of its path or hub name.
        context_length: in tokens.
        vocabulary: see ``Vocabulary``.
        has_grammars: whether grammars can be compiled for it.
    """

    name: str
    context_length: int
    vocabulary: Vocabulary
    has_grammars: bool

    @classmethod
    def of(cls, target: "TargetModel") -> Self:
        """What devices are told of a loaded target."""
        return cls(target.name, target.context_length, target.vocabulary, target.grammar_compiler is not None)

    def encode(self) -> bytes:
        """The target as JSON, for another process."""
        vocabulary = self.vocabulary
        fields = {
            "name": self.name,
            "context_length": self.context_length,
            "tokens": dict(vocabulary.tokens),
            "rows": vocabulary.rows,
            "stop_ids": sorted(vocabulary.stop_ids),
            "has_grammars": self.has_grammars,
        }
        return json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def decode(cls, text: bytes) -> Self:
        """The target that ``encode`` wrote."""
        fields = json.loads(text)
        vocabulary = Vocabulary(fields["tokens"], fields["rows"], frozenset(fields["stop_ids"]))
        return cls(fields["name"], fields["context_length"], vocabulary, fields["has_grammars"])

    def obstacle(self, other: "ServedTarget") -> str:
        """Why a replica of ``other`` cannot serve devices that were told of this target; "" if it can.

        The context length may differ: it depends on the memory that is free where a replica runs.
        """
        if other.name != self.name:
            return f"its target is {other.name!r}, that of the others {self.name!r}"
        if other.vocabulary != self.vocabulary:
            return f"its target {other.name!r} has another vocabulary or other stop ids than that of the others"
        if self.has_grammars and not other.has_grammars:
            return "it cannot compile grammars as the others do; install llguidance there"
        return ""
