"""The sample bundle with a chat template that declares tools, as Qwen's does; the sample model's own has none."""

import os
from dataclasses import replace
from pathlib import Path

from protocol.bundle import CHAT_TEMPLATE_NAME, FileRecord, Manifest
from tests.sample import BUNDLE

_TEMPLATE = """\
{% if tools %}<|im_start|>system
Answer with a call: <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_tool_bundle(folder: Path) -> Path:
    """Write the bundle into a new folder, with links to the files of the sample bundle."""
    folder.mkdir()
    manifest = Manifest.read(BUNDLE)
    for name in manifest.files:
        if name != CHAT_TEMPLATE_NAME:
            os.link(BUNDLE / name, folder / name)
    template = folder / CHAT_TEMPLATE_NAME
    template.write_text(_TEMPLATE, encoding="utf-8")
    replace(manifest, files={**manifest.files, CHAT_TEMPLATE_NAME: FileRecord.of(template)}).write(folder)
    return folder
