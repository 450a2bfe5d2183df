"""The ids that end an answer, from every source that names one.

A model's configuration, its generation settings and its tokenizer may disagree, and
a fine-tune may end its turns with a token that none of them names. All of them count.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from common.chat_template import ChatTemplate
from common.gguf_metadata import GgufVocabulary
from protocol.errors import BundleError

EosSetting: TypeAlias = int | Sequence[int] | None
"""What configuration files call ``eos_token_id``."""
StopSources: TypeAlias = Mapping[str, frozenset[int]]
"""Stop ids by the source that names them; sources that name none are left out."""
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn by their name, for models whose chat template does not tell."""
_ANSWER = "edgedraft"
GGUF_STOP_ROLES = ("eos", "eot", "eom")
"""The special tokens of a GGUF file that end an answer: end of sequence, of turn, of message."""


def stop_sources(
    settings: Mapping[str, EosSetting],
    added_tokens: Mapping[str, int],
    chat_template: str | None,
    special_tokens: Mapping[str, str],
) -> StopSources:
    """Collect the stop ids of a model.

    Args:
        settings: ``eos_token_id`` by the file or object that holds it.
        added_tokens: id of each control or user-defined token.
        chat_template: in Jinja, if the model has one.
        special_tokens: variables of the template, such as ``bos_token``.
    """
    found = {source: _ids_of(setting) for source, setting in settings.items()}
    token = None if chat_template is None else _turn_end(chat_template, special_tokens, added_tokens)
    if token is None:
        found["token names"] = frozenset(added_tokens[name] for name in _TURN_ENDS if name in added_tokens)
    else:
        found["chat template"] = frozenset({added_tokens[token]})
    return {source: ids for source, ids in found.items() if ids}


def gguf_stop_sources(vocabulary: GgufVocabulary) -> StopSources:
    """Collect the stop ids of a GGUF file."""
    return stop_sources(
        {f"{role}_token_id": vocabulary.special_ids.get(role) for role in GGUF_STOP_ROLES},
        vocabulary.added_tokens,
        vocabulary.chat_template,
        {f"{role}_token": vocabulary.tokens[token_id] for role, token_id in vocabulary.special_ids.items()},
    )


def all_stop_ids(sources: StopSources) -> frozenset[int]:
    """The ids of all sources."""
    return frozenset().union(*sources.values())


def _ids_of(setting: EosSetting) -> frozenset[int]:
    """The ids of a setting; some configurations write -1 for none."""
    ids = () if setting is None else (setting,) if isinstance(setting, int) else setting
    return frozenset(token_id for token_id in ids if token_id >= 0)


def _turn_end(source: str, special_tokens: Mapping[str, str], added_tokens: Collection[str]) -> str | None:
    """The added token that follows an assistant's text; None where none does, or the template refuses the example."""
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = ChatTemplate(source, special_tokens).render(conversation, add_generation_prompt=False)
    except BundleError:
        return None
    _, answer, after = text.rpartition(_ANSWER)
    if not answer:
        return None
    return max((token for token in added_tokens if token and after.lstrip().startswith(token)), key=len, default=None)
