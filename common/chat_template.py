"""The renderer of chat templates: the device's at run time, and export's when it checks a bundle.

It gives templates what transformers gives them: loop controls, the ``generation``
block, ``strftime_now``, ``raise_exception`` and a ``tojson`` that leaves text as it is.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import BundleError


class _GenerationBlock(Extension):
    """``{% generation %}`` … ``{% endgeneration %}`` marks the assistant's text for training; it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it as a set

    def parse(self, parser: Parser) -> nodes.Node:
        """The body as a block of its own: variables that it sets end with it, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """A chat template.

    Args:
        source: in Jinja.
        special_tokens: variables such as ``bos_token``; one with an empty value is not defined.

    Attributes:
        source: see above.
        knows_tools: whether it reads the variable ``tools``.

    Raises:
        BundleError: it is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._special_tokens = {name: token for name, token in special_tokens.items() if token}
        try:
            self._template = environment.from_string(source)
            self.knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # what jinja2 accepts may still be no valid Python, or nested too deeply
            raise BundleError(
                f"the chat template is not valid: {_one_line(error)}; correct it in the model and export again"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text of a conversation.

        Raises:
            BundleError: the template refuses the conversation, or fails at it.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template may compute anything
            raise BundleError(f"the chat template refuses the conversation: {_one_line(error)}") from error


def default_template(setting: str | Mapping[str, str] | None) -> str | None:
    """A tokenizer's chat template; of several the one named "default", None if there is none."""
    return setting.get("default") if isinstance(setting, Mapping) else setting


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(reason: str) -> None:
    raise TemplateError(reason)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the date where the user is


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
