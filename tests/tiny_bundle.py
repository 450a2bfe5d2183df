"""A bundle in a few kilobytes: the next token's logits depend on the last token alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from protocol.bundle import CHAT_TEMPLATE_NAME, MODEL_NAME, TOKENIZER_NAME, FileRecord
from tests.fakes import Table, manifest

WORDS = ("the", "a", "cat", "sees", "🙂", "é", "dog", ".")
VOCAB = len(WORDS)
_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def write_bundle(folder: Path, logits: npt.NDArray[np.float32]) -> Path:
    """Write a bundle whose logits after token i are ``logits[i]``."""
    folder.mkdir()
    onnx.save(_graph(logits), str(folder / MODEL_NAME))
    model = {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(WORDS)}, "unk_token": "."}
    tokenizer = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    (folder / TOKENIZER_NAME).write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / CHAT_TEMPLATE_NAME).write_text(_TEMPLATE, encoding="utf-8")
    files = {path.name: FileRecord.of(path) for path in folder.iterdir()}
    replace(manifest(VOCAB), files=files).write(folder)
    return folder


def table_of(logits: npt.NDArray[np.float32]) -> Table:
    """The target that has the same logits."""
    return np.broadcast_to(logits, (len(logits), *logits.shape)).copy()


def one_word(word: str) -> npt.NDArray[np.float32]:
    """Logits that always favour one word."""
    logits = np.zeros((VOCAB, VOCAB), np.float32)
    logits[:, WORDS.index(word)] = 5
    return logits


def _graph(logits: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """One layer, whose keys and values are the token ids."""
    past, present = (
        [
            helper.make_tensor_value_info(f"{name}.0.{kind}", TensorProto.FLOAT, [1, 1, None, 1])
            for kind in ("key", "value")
        ]
        for name in ("past_key_values", "present")
    )
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["numbers", "shape"], ["new"]),
        *(
            helper.make_node("Concat", [old.name, "new"], [now.name], axis=2)
            for old, now in zip(past, present, strict=True)
        ),
    ]
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, [1, None]) for name in ("input_ids", "attention_mask")
    )
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None, VOCAB])
    constants = [numpy_helper.from_array(logits, "table"), numpy_helper.from_array(np.array([1, 1, -1, 1]), "shape")]
    graph = helper.make_graph(nodes, "tiny", [ids, mask, *past], [output, *present], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
