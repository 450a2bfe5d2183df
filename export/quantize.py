"""Weight-only quantization of a draft model's graph.

Knows ONNX Runtime's block-wise weight formats. Does not know how good the result
is: export/quality.py measures that.
"""

from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from export.graph import embedding_lookups, find_head, fold_transposes, initializers, remove_unread_weights

_BLOCK_SIZE = 32  # of 16 to 256, the best agreement with the source model
_ACCURACY_LEVEL = 4  # int8 activations; 8-bit weights run 40 times slower with float activations


class Precision(StrEnum):
    """The precision of a draft model's weights."""

    FP32 = "fp32"
    INT8 = "int8"
    INT4 = "int4"


def quantize(model: ModelProto, precision: Precision) -> ModelProto:
    """Quantize the weights of ``model``; with INT4, the embedding and the head get 8 bits."""
    if precision is Precision.FP32:
        return model
    fold_transposes(model)
    _quantize_embedding(model)
    remove_unread_weights(model)
    if precision is Precision.INT4:
        head = find_head(model.graph)
        model = _quantize_matmuls(model, bits=4, exclude=[head.name] if head else [])
    return _quantize_matmuls(model, bits=8, exclude=[])


def _quantize_matmuls(model: ModelProto, bits: int, exclude: list[str]) -> ModelProto:
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=_BLOCK_SIZE,
        is_symmetric=False,
        accuracy_level=_ACCURACY_LEVEL,
        nodes_to_exclude=exclude,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    return quantizer.model.model


def _quantize_embedding(model: ModelProto) -> None:
    graph = model.graph
    weights = initializers(graph)
    for node in list(embedding_lookups(graph)):
        embedding = numpy_helper.to_array(weights[node.input[0]])
        if embedding.shape[1] % _BLOCK_SIZE == 0:
            data, scales = _quantize_rows(embedding)
            names = [f"{node.input[0]}_Q8", f"{node.input[0]}_scales"]
            graph.initializer.extend(map(numpy_helper.from_array, (data, scales), names))
            graph.node.insert(list(graph.node).index(node), _quantized_lookup(node, *names))
            graph.node.remove(node)


def _quantize_rows(embedding: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return uint8[V, hidden] with zero point 128, and the scales of the blocks, float32[V, hidden / block]."""
    blocks = embedding.reshape(len(embedding), -1, _BLOCK_SIZE)
    scales = np.maximum(np.abs(blocks).max(axis=2, keepdims=True) / 127, np.finfo(np.float32).tiny)
    data = np.rint(blocks / scales) + 128
    return data.astype(np.uint8).reshape(embedding.shape), scales[:, :, 0].astype(np.float32)


def _quantized_lookup(lookup: NodeProto, data: str, scales: str) -> NodeProto:
    attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": _BLOCK_SIZE, "bits": 8}
    return helper.make_node(
        "GatherBlockQuantized",
        [data, lookup.input[1], scales],
        list(lookup.output),
        name=f"{lookup.name}_Q8",
        domain="com.microsoft",
        **attributes,
    )
