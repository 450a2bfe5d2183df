"""Edits to a draft model's ONNX graph.

Knows ONNX nodes and tensors. Does not know which converter wrote the graph, nor
to which precision its weights are quantized.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from protocol.bundle import CACHE_DTYPES, CacheKind
from protocol.errors import ModelError

LOGITS = "logits"
_ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Tanh"})
_INT64_MAX = 2**63 - 1
_EXTERNAL_BYTES = 1024  # smaller tensors stay in the graph file


@dataclass(frozen=True)
class Cache:
    """A graph's KV cache inputs and outputs, each [batch, kv_heads, length, head_size] of ``dtype``."""

    kind: CacheKind
    layers: int
    kv_heads: int
    head_size: int
    dtype: str = "float32"

    @classmethod
    def of(cls, model: ModelProto) -> Self:
        """Read the shape of the KV cache from a graph's inputs.

        Raises:
            ModelError: the graph has no KV cache, or its layers have different shapes.
        """
        past = {entry.name: entry for entry in model.graph.input if entry.name.startswith("past_key_values.")}
        shapes = {tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim) for entry in past.values()}
        if len(shapes) != 1:
            raise ModelError(
                f"the graph has KV cache inputs of {len(shapes)} shapes; allowed: 1, the same for every layer"
            )
        _, kv_heads, _, head_size = shapes.pop()
        dtypes = {helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type).name for entry in past.values()}
        if len(dtypes) != 1 or not dtypes <= set(CACHE_DTYPES):
            raise ModelError(f"the graph has a KV cache of {', '.join(dtypes)}; allowed: {' or '.join(CACHE_DTYPES)}")
        shared = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
        cache = cls(
            CacheKind.SHARED if shared else CacheKind.GROWING, len(past) // 2, kv_heads, head_size, dtypes.pop()
        )
        cache._check_names(model.graph)
        return cache

    @property
    def past_names(self) -> list[str]:
        """The cache inputs, key and value of each layer."""
        return [f"past_key_values.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    @property
    def present_names(self) -> list[str]:
        """The cache outputs, in the order of ``past_names``."""
        return [f"present.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    def _check_names(self, graph: GraphProto) -> None:
        wanted = {"input_ids", "attention_mask", *self.past_names}, {LOGITS, *self.present_names}
        inputs = {entry.name for entry in graph.input} - {"position_ids"}
        outputs = {entry.name for entry in graph.output}
        wrong = (inputs ^ wanted[0]) | (outputs ^ wanted[1])
        if wrong:
            raise ModelError(f"the graph has missing or unexpected inputs or outputs: {', '.join(sorted(wrong))}")


def load(path: Path) -> ModelProto:
    """Load the graph at ``path`` with its weights."""
    return onnx.load(path)


def save(model: ModelProto, path: Path) -> None:
    """Write the graph to ``path`` and its weights to ``path.data``."""
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=_EXTERNAL_BYTES,
    )


def keep_last_position(model: ModelProto) -> None:
    """Reduce the output ``logits`` to the last position, [batch, 1, V].

    The hidden states are sliced before the head, so a prompt of T tokens does not
    compute [T, V] logits. If no head is found, the logits are sliced instead.
    """
    graph = model.graph
    head = find_head(graph)
    del graph.value_info[:]  # inferred shapes, now out of date
    if head is None:
        _rename_output(graph, LOGITS, "all_logits")
        _insert_slice(graph, len(graph.node), "all_logits", LOGITS)
    else:
        hidden, head.input[0] = head.input[0], "last_hidden"
        _insert_slice(graph, list(graph.node).index(head), hidden, "last_hidden")
    output = next(output for output in graph.output if output.name == LOGITS)
    output.type.tensor_type.shape.dim[1].Clear()
    output.type.tensor_type.shape.dim[1].dim_value = 1


def cast_logits(model: ModelProto) -> None:
    """Let the output ``logits`` be float32, whatever they are computed in."""
    graph = model.graph
    output = next(output for output in graph.output if output.name == LOGITS)
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        _rename_output(graph, LOGITS, "computed_logits")
        graph.node.append(
            helper.make_node("Cast", ["computed_logits"], [LOGITS], name="cast_logits", to=TensorProto.FLOAT)
        )
        output.type.tensor_type.elem_type = TensorProto.FLOAT


def find_head(graph: GraphProto) -> NodeProto | None:
    """Find the MatMul that computes the logits; bias, scaling and soft-capping may follow it."""
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get(LOGITS)
    while node is not None and node.op_type in _ELEMENTWISE:
        computed = [producers[name] for name in node.input if _is_computed(producers.get(name))]
        node = computed[0] if len(computed) == 1 else None
    return node if node is not None and node.op_type == "MatMul" else None


def fold_transposes(model: ModelProto) -> None:
    """Fold each Transpose of a weight into a weight; a head tied to the embedding has one."""
    graph = model.graph
    weights = initializers(graph)
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        permutation = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
        folded = numpy_helper.to_array(weights[node.input[0]]).transpose(permutation)
        graph.initializer.append(numpy_helper.from_array(folded.copy(), node.output[0]))
        graph.node.remove(node)


def remove_unread_weights(model: ModelProto) -> None:
    """Remove the weights that no node uses."""
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    for weight in [weight for weight in graph.initializer if weight.name not in used]:
        graph.initializer.remove(weight)


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    """Return the weights of ``graph`` by name."""
    return {weight.name: weight for weight in graph.initializer}


def embedding_lookups(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes that gather rows of a weight by ``input_ids``."""
    weights = initializers(graph)
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in weights and node.input[1] == "input_ids":
            yield node


def _is_computed(node: NodeProto | None) -> bool:
    return node is not None and node.op_type != "Constant"


def _rename_output(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.output[:] = [new if name == old else name for name in node.output]


def _insert_slice(graph: GraphProto, index: int, source: str, result: str) -> None:
    bounds = {"last_starts": -1, "last_ends": _INT64_MAX, "last_axes": 1}
    graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [1], [bound]) for name, bound in bounds.items()
    )
    graph.node.insert(index, helper.make_node("Slice", [source, *bounds], [result], name="last_position"))
