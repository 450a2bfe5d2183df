"""The draft model as other libraries read it: the bundle's graph beside their configuration files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from protocol.bundle import MODEL_NAME, CacheKind, Manifest


@dataclass(frozen=True)
class Models:
    """What the loops load.

    Attributes:
        bundle: the draft model.
        folder: the bundle's graph, with the configurations of onnxruntime-genai and of transformers.
        target: the name of the model that the bundle was converted from.
    """

    bundle: Path
    folder: Path
    target: str


@contextmanager
def linked_models(bundle: Path, target: str) -> Iterator[Models]:
    """The bundle's graph as hard links in a temporary folder beside it.

    Raises:
        ModelError: the configuration of ``target`` cannot be read.
    """
    from export.source import load_config, model_folder  # imports torch, which a loop's process does not need

    with TemporaryDirectory() as scratch, TemporaryDirectory(dir=bundle.parent) as folder:
        config = load_config(model_folder(target, Path(scratch), weights=False))
        config.save_pretrained(folder)
        for path in bundle.glob(f"{MODEL_NAME}*"):
            os.link(path, Path(folder) / path.name)
        content = json.dumps(_genai_config(Manifest.read(bundle), config))
        Path(folder, "genai_config.json").write_text(content, encoding="utf-8")
        yield Models(bundle, Path(folder), target)


def _genai_config(manifest: Manifest, config: Any) -> dict[str, Any]:
    parts = ("key", "value")
    decoder = {
        "filename": MODEL_NAME,
        "head_size": manifest.head_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": manifest.layers,
        "num_key_value_heads": manifest.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            **{f"past_{part}_names": f"past_key_values.%d.{part}" for part in parts},
        },
        "outputs": {"logits": "logits", **{f"present_{part}_names": f"present.%d.{part}" for part in parts}},
        "session_options": {"provider_options": []},
    }
    model = {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": manifest.context_length,
        "bos_token_id": 0,
        "eos_token_id": config.vocab_size,  # no token, so that nothing ends early
        "pad_token_id": 0,
        "decoder": decoder,
    }
    search = {"do_sample": False, "past_present_share_buffer": manifest.cache_kind is CacheKind.SHARED}
    return {"model": model, "search": search}
