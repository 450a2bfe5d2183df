"""Weight-only quantization of a draft model's graph.

Knows ONNX Runtime's block-wise weight formats. Does not know how good the result
is: export/quality.py measures that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from export.graph import embedding_lookups, find_head, fold_transposes, initializers, remove_unread_weights

_BLOCK_SIZE = 32  # of the embedding; of 16 to 256, the best agreement with the source model
_ACCURACY_LEVEL = 4  # int8 activations; 8-bit weights run 40 times slower with float activations


class Precision(StrEnum):
    """The precision of a draft model's weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored.

    Attributes:
        name: of the format, unique.
        precision: of the matrices.
        block_size: weights that share a scale.
        symmetric: whether blocks have no zero point.
    """

    name: str
    precision: Precision
    block_size: int = 32
    symmetric: bool = False


FORMATS: Mapping[Precision, WeightFormat] = {one: WeightFormat(one.value, one) for one in Precision}
"""The format of a precision that the user chooses."""
CANDIDATES = (
    FORMATS[Precision.INT8],
    WeightFormat("int8-block128", Precision.INT8, block_size=128),
    FORMATS[Precision.INT4],
    WeightFormat("int4-symmetric", Precision.INT4, symmetric=True),
)
"""The formats that an automatic choice compares."""


def quantize(model: ModelProto, weights: WeightFormat) -> ModelProto:
    """Quantize the weights of ``model``; with INT4, the embedding and the head get 8 bits."""
    if weights.precision in (Precision.FP32, Precision.FP16):
        return model
    fold_transposes(model)
    _quantize_embedding(model)
    remove_unread_weights(model)
    if weights.precision is Precision.INT4:
        head = find_head(model.graph)
        model = _quantize_matmuls(model, 4, weights, exclude=[head.name] if head else [])
    return _quantize_matmuls(model, 8, weights, exclude=[])


def _quantize_matmuls(model: ModelProto, bits: int, weights: WeightFormat, exclude: list[str]) -> ModelProto:
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=weights.block_size,
        is_symmetric=weights.symmetric,
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
