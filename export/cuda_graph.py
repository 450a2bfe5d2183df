"""Which nodes of a graph ONNX Runtime's CUDA provider has kernels for, by type and data type; needs no GPU.

A node without one runs on the CPU, and its tensors are copied there and back at every step.
"""

from collections import Counter
from collections.abc import Mapping

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from rich.table import Table

from protocol.errors import ModelError

_HALF = frozenset({"float16", "bfloat16"})
_FLOATS = _HALF | {"float32"}
_NUMBERS = _FLOATS | {"int32", "int64"}
_KERNELS: Mapping[str, frozenset[str]] = {
    "GroupQueryAttention": _HALF,
    **dict.fromkeys(
        (
            "FastGelu", "Gelu", "LayerNormalization", "MatMul", "QuickGelu", "RotaryEmbedding", "Sigmoid",
            "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax",
            "Split", "Tanh", "Transpose",
        ),
        _FLOATS,
    ),
    **dict.fromkeys(
        (
            "Add", "Cast", "Concat", "Constant", "Div", "Gather", "Identity", "Mul", "ReduceSum", "Reshape", "Shape",
            "Slice", "Squeeze", "Sub", "Unsqueeze",
        ),
        _NUMBERS,
    ),
}  # fmt: skip
"""The data types of kernels, as ONNX Runtime documents them in OperatorKernels.md."""
_UNKNOWN = "unknown"


def node_types(model: ModelProto) -> Counter[tuple[str, str]]:
    """How many nodes of each type compute in which data type."""
    known = _types_of_sources(model.graph)
    counts: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
        dtype = _dtype(node, known)
        known.update(dict.fromkeys(node.output, dtype))
        counts[node.op_type, dtype] += 1
    return counts


def check_kernels(model: ModelProto) -> None:
    """Check that the CUDA provider runs every node of a graph.

    Raises:
        ModelError: names the types of nodes that it does not run, with their data types.
    """
    missing = [
        f"{op_type} of {dtype} ({count} nodes)"
        for (op_type, dtype), count in sorted(node_types(model).items())
        if dtype not in _KERNELS.get(op_type, ())
    ]
    if missing:
        raise ModelError(f"ONNX Runtime's CUDA provider has no kernel for {', '.join(missing)}; use --for cpu")


def node_table(model: ModelProto) -> Table:
    """The types of nodes for people."""
    table = Table("nodes for CUDA", "data type", "count")
    for (op_type, dtype), count in sorted(node_types(model).items()):
        table.add_row(op_type, dtype, str(count))
    return table


def _types_of_sources(graph: GraphProto) -> dict[str, str]:
    """The data types of a graph's inputs and weights."""
    known = {entry.name: _name(entry.type.tensor_type.elem_type) for entry in graph.input}
    return known | {weight.name: _name(weight.data_type) for weight in graph.initializer}


def _dtype(node: NodeProto, known: Mapping[str, str]) -> str:
    """The data type of a node's first output; of most nodes it is that of the first input."""
    if node.op_type == "Shape":
        return "int64"
    values = {entry.name: entry for entry in node.attribute}
    if node.op_type == "Cast":
        return _name(values["to"].i)
    if node.op_type == "Constant" and "value" in values:
        return _name(values["value"].t.data_type)
    return known.get(node.input[0], _UNKNOWN) if node.input else _UNKNOWN


def _name(data_type: int) -> str:
    return _UNKNOWN if data_type == TensorProto.UNDEFINED else helper.tensor_dtype_to_np_dtype(data_type).name
