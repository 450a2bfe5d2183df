"""The check of the text side of a bundle: the tokenizer and the chat template that ship, against what they should be.

Every added token must encode to its one id, most tokens' own text to themselves,
and the device's renderer must render conversations as transformers does.
"""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from common.chat_template import ChatTemplate
from protocol.errors import BundleError, QualityError
from protocol.vocabulary import used_tokens

MIN_OWN_TEXT = 0.9
"""Least share of tokens whose text encodes to themselves."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""The tokens of SentencePiece for bytes of characters without a token; most characters have one."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SAMPLE = 4000
_SEED = 20
_CONVERSATIONS: Sequence[Sequence[dict[str, str]]] = (
    [{"role": "user", "content": "Hello! <1 & 2> ünïcödé"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": " four "},
    ],
)


def check_tokenizer(path: Path) -> None:
    """Check a ``tokenizer.json``.

    Raises:
        QualityError: an added token does not encode to its id, or too few tokens encode to themselves.
    """
    tokenizer = Tokenizer.from_file(str(path))
    added = {entry.content: token_id for token_id, entry in tokenizer.get_added_tokens_decoder().items()}
    check_tokens(tokenizer, added)
    share = _own_text_share(tokenizer, set(added.values()))
    if share < MIN_OWN_TEXT:
        raise QualityError(
            f"{share:.2f} of the tokens encode to themselves; allowed: {MIN_OWN_TEXT:g} or more; "
            "use a tokenizer.json or a .gguf file that agrees with the model"
        )


def check_tokens(tokenizer: Tokenizer, tokens: Mapping[str, int]) -> None:
    """Check that tokens encode as themselves.

    Args:
        tokenizer: of the bundle.
        tokens: the ids of control and user-defined tokens.

    Raises:
        QualityError: names one that does not.
    """
    for token, token_id in tokens.items():
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if ids != [token_id]:
            raise QualityError(
                f"the token {token!r} encodes to {ids}; allowed: its id, {token_id}; "
                "use a tokenizer.json or a .gguf file that agrees with the model"
            )


def check_template(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the device renders conversations as transformers does.

    Raises:
        QualityError: a conversation is rendered otherwise, or only one of the two refuses it.
    """
    for conversation in _CONVERSATIONS:
        try:
            expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except Exception:  # noqa: BLE001 - a template may refuse a role in any way
            expected = None
        try:
            rendered = template.render(conversation)
        except BundleError:
            rendered = None
        if rendered != expected:
            raise QualityError(
                f"the chat template renders {rendered!r} on a device; transformers renders {expected!r}; "
                "use a template with no other variables than messages, bos_token, eos_token and add_generation_prompt"
            )


def _own_text_share(tokenizer: Tokenizer, added: set[int]) -> float:
    """Of a sample of tokens with a text of their own, how many encode to themselves."""
    ids = [
        token_id
        for token_id, token in used_tokens(tokenizer.get_vocab()).items()
        if token_id not in added and not _BYTE.fullmatch(token)
    ]
    sample = random.Random(_SEED).sample(ids, min(_SAMPLE, len(ids)))  # noqa: S311 - no secret
    texts = ((token_id, tokenizer.decode([token_id], skip_special_tokens=False)) for token_id in sample)
    outcomes = [
        _is_own_text(tokenizer, token_id, text) for token_id, text in texts if text and _REPLACEMENT not in text
    ]
    return sum(outcomes) / len(outcomes) if outcomes else 1.0


def _is_own_text(tokenizer: Tokenizer, token_id: int, text: str) -> bool:
    """Whether a text encodes to a token: alone, or on a new line where the tokenizer begins a text with a space."""

    def encode(content: str) -> list[int]:
        return list(tokenizer.encode(content, add_special_tokens=False).ids)

    if encode(text) == [token_id]:
        return True
    ids = [*encode("\n"), token_id]
    return encode(f"\n{text}") == ids and tokenizer.decode(ids, skip_special_tokens=False) == f"\n{text}"
