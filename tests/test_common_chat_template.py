"""A device renders chat templates as transformers does."""

import json
from datetime import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from common import chat_template
from common.chat_template import ChatTemplate, default_template
from protocol.errors import BundleError
from tests.gguf_files import CHATML

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Ünïcödé \"quotes\" 'n' 😀\n\tnew line "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": " Why? "},
]
TEMPLATES = {
    "chatml": CHATML,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "undefined variable": "{{ pad_token }}{% if unk_token is defined %}x{% endif %}{{ messages[0].content }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation with white space control": "{%- for m in messages -%}\n  {%- generation -%}\n {{ m.content }}\n"
    "  {%- endgeneration %}\n{%- endfor %}",
    "a variable of a generation block ends with it": "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}"
    "{% endgeneration %}{{ x }}",
    "break": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%d %b %Y') }}",
    "strftime_now if defined": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}",
    "tojson": "{% for m in messages %}{{ m.content | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "tojson with options": "{{ messages[1] | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "trimmed blocks": "  {% if messages %}\n  {{ messages[0].content }}\n  {% endif %}\n\nend\n",
    "tools and documents": "{% if tools %}t{% endif %}{% if documents is none %}d{% endif %}{{ tools is none }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro one(m) %}[{{ m.role }}] {{ m.content | trim }}{% endmacro %}"
    "{% for m in messages %}{{ one(m) }}{% endfor %}",
    "no prompt": "{{ messages[-1].content }}{% if not add_generation_prompt %}end{% endif %}",
    "escapes nothing": "{{ '<&>' }}{{ messages[0].content }}",
}
REFUSALS = {
    "raise_exception": "{{ raise_exception('Only\nuser roles') }}",
    "TypeError": "{{ messages[0].content + 1 }}",
    "a missing field": "{{ messages[0].parts[0].text }}",
    "division by zero": "{{ 1 // (messages | length - 4) }}",
    "a list is not changed": "{{ messages.append(1) }}",
    "a private attribute": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tojson of an undefined variable": "{{ unknown | tojson }}",
}


def transformers_render(template: str, messages: list[dict[str, str]] = MESSAGES, **options: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), **SPECIAL)
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **{"add_generation_prompt": True, **options}
    )
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name: str) -> None:
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(MESSAGES) == transformers_render(TEMPLATES[name])


def test_a_conversation_without_a_prompt_for_an_answer_renders_as_in_transformers() -> None:
    rendered = ChatTemplate(CHATML, SPECIAL).render(MESSAGES, add_generation_prompt=False)
    assert rendered == transformers_render(CHATML, add_generation_prompt=False)
    assert not rendered.endswith("assistant\n")


def test_tojson_keeps_text_and_the_date_is_today() -> None:
    assert ChatTemplate("{{ messages[0].content | tojson }}", {}).render([{"content": "<ü>"}]) == json.dumps(
        "<ü>", ensure_ascii=False
    )
    before = datetime.now().strftime("%Y-%m")  # noqa: DTZ005
    rendered = ChatTemplate("{{ strftime_now('%Y-%m') }}", {}).render([])
    assert rendered in (before, datetime.now().strftime("%Y-%m"))  # noqa: DTZ005


@pytest.mark.parametrize("name", REFUSALS)
def test_a_template_that_fails_raises_one_line(name: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever a template may raise
        transformers_render(REFUSALS[name])
    with pytest.raises(BundleError, match="the chat template refuses the conversation: ") as caught:
        ChatTemplate(REFUSALS[name], SPECIAL).render(MESSAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'open", "{% generation %}", "{% break %}", "{% for m in messages %}"]
)
def test_an_invalid_template_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(BundleError, match="the chat template is not valid: ") as caught:
        ChatTemplate(source, {})
    assert "\n" not in str(caught.value)


def test_a_special_token_without_a_value_is_not_defined() -> None:
    source = "{{ bos_token }}{{ bos_token is defined }}"
    assert ChatTemplate(source, {"bos_token": ""}).render([]) == ChatTemplate(source, {}).render([]) == "False"


def test_of_several_templates_the_default_counts() -> None:
    assert default_template({"default": "one", "tool_use": "two"}) == default_template("one") == "one"
    assert default_template({"tool_use": "two"}) is default_template(None) is None


def test_strftime_now_formats_the_current_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Fixed":
            return cls(2031, 5, 4)

    monkeypatch.setattr(chat_template, "datetime", Fixed)
    assert ChatTemplate("{{ strftime_now('%d %B %Y') }}", {}).render([]) == "04 May 2031"
