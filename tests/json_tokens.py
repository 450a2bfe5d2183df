"""A vocabulary of 20 pieces of JSON for the models that are tables, and their grammars."""

from collections.abc import Sequence

from llguidance import LLTokenizer, TokenizerWrapper

from common.grammar import GrammarCompiler

PIECES = ["{", "}", "[", "]", ", ", ": ", '"', "a", "b", "c", "0", "1", "2", "3", "true", "false", "null", "x", "", " "]
STOP = 18


class _Pieces:
    eos_token_id = STOP
    bos_token_id = None
    special_token_ids = (STOP,)
    tokens = tuple(piece.encode() or b"<stop>" for piece in PIECES)

    def __call__(self, text: bytes) -> list[int]:
        ids = []
        while text:
            found = [token_id for token_id, piece in enumerate(self.tokens) if text.startswith(piece)]
            longest = max(found, key=self._length, default=None)
            if longest is not None:
                ids.append(longest)
            text = text[1 if longest is None else self._length(longest) :]
        return ids

    def _length(self, token_id: int) -> int:
        return len(self.tokens[token_id])


def json_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Pieces()), eos_token=STOP)


COMPILER = GrammarCompiler(json_tokenizer, len(PIECES))


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[token_id] for token_id in token_ids)
