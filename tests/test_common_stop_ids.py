"""Stop ids: every source that names one counts."""

import pytest

from common.stop_ids import all_stop_ids, stop_sources
from tests.gguf_files import CHATML

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif"
    " %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ADDED = {
    token: token_id
    for token_id, token in enumerate(
        [
            "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>",
            "<|end|>", "<|endoftext|>", "\n", "<|im", "",
        ]
    )
}  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (MISTRAL, "</s>"), (PHI3, "<|end|>")],
    ids=["chatml", "llama3", "gemma", "mistral", "phi3"],
)
def test_the_token_that_ends_the_templates_turn_counts(template: str, end: str) -> None:
    assert stop_sources({}, ADDED, template, SPECIAL) == {"chat template": frozenset({ADDED[end]})}


def test_a_chatml_fine_tune_whose_configuration_names_another_token_stops_at_the_end_of_its_turn() -> None:
    sources = stop_sources({"config.json": 0, "tokenizer": ADDED["<|im_end|>"]}, ADDED, CHATML, SPECIAL)
    assert sources == {
        "config.json": frozenset({0}),
        "tokenizer": frozenset({4}),
        "chat template": frozenset({4}),
    }
    assert all_stop_ids(sources) == {0, 4}


@pytest.mark.parametrize("setting", [None, [], -1, [-1]], ids=repr)
def test_a_source_that_names_no_token_is_left_out(setting: int | list[int] | None) -> None:
    assert stop_sources({"config.json": setting}, {}, None, {}) == {}
    assert all_stop_ids({}) == frozenset()


def test_several_ids_of_a_source_all_count() -> None:
    sources = stop_sources({"generation_config.json": [2, 7], "config.json": 2}, {}, None, {})
    assert all_stop_ids(sources) == {2, 7}


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no example') }}",
        "{% if %}",
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}",
        "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
        "<|user|> nothing of the conversation",
    ],
    ids=["none", "refuses", "invalid", "no token", "content in parts", "no answer"],
)
def test_where_the_template_does_not_tell_the_names_of_tokens_do(template: str | None) -> None:
    added = {"<|user|>": 1, "<|im_end|>": 4, "<end_of_turn>": 9}
    assert stop_sources({}, added, template, SPECIAL) == {"token names": frozenset({4, 9})}


def test_text_that_follows_an_answer_is_no_end() -> None:
    template = "{% for m in messages %}{{ m['content'] }}### {% endfor %}<|user|>"
    assert stop_sources({}, {"<|user|>": 1}, template, SPECIAL) == {}
