"""Rules for a member's ONNX graph: deterministic, self-contained, known operators.

Known operators are those of the ONNX standard, less those that it calls non-deterministic (every
source of random numbers, and dropout) and those that hold graphs of their own (branches, loops).
Operators of other domains, functions defined in the file and external weights are refused, too.
"""

from collections.abc import Iterator
from typing import Any

from redefense.errors import first_line, need

_DOMAINS = ("", "ai.onnx")
_FLOAT = 1  # TensorProto.FLOAT
_EXTERNAL = 1  # TensorProto.EXTERNAL
_GRAPHS = (5, 10)  # AttributeProto.GRAPH, GRAPHS


def graph_faults(model: bytes, shape: tuple[int, int, int], num_classes: int) -> list[str]:
    """Violations of the rules by an ONNX file; empty if it is valid as a member.

    Raises:
        ConfigError: if the package onnx is missing.
    """
    onnx = need("onnx")
    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # noqa: BLE001 - protobuf's errors share no narrower class
        return [_unsound(error)]
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    faults = [f"it uses the unknown domain {d!r}" for d in versions if d not in _DOMAINS]
    # a function would hide operators from the loop below
    faults += [f"it defines the function {function.name}" for function in proto.functions]
    if proto.training_info:
        faults.append("it contains training information")
    # both names mean the operators of the standard
    version = versions.get("", versions.get("ai.onnx", 0))
    for node in proto.graph.node:
        faults += _node_faults(onnx, node, version)
    faults += _weight_faults(proto.graph)
    faults += _ends_faults(proto.graph, shape, num_classes)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # noqa: BLE001 - the checker's errors share no narrower class
        faults.append(_unsound(error))
    # a fault that occurs in a hundred nodes is named once
    return list(dict.fromkeys(faults))


def _unsound(error: Exception) -> str:
    return f"it is not a valid ONNX file: {first_line(error) or '?'}"


def _node_faults(onnx: Any, node: Any, version: int) -> Iterator[str]:
    name = node.op_type
    if node.domain not in _DOMAINS or not onnx.defs.has(name, version, ""):
        yield f"it contains the unknown operator {node.domain or 'ai.onnx'}.{name}"
        return
    schema = onnx.defs.get_schema(name, version, "")
    if schema.node_determinism == schema.NodeDeterminism.NonDeterministic:
        yield f"it contains {name}, whose output is not determined by its inputs"
    for attribute in node.attribute:
        if attribute.type in _GRAPHS:
            yield f"{name} contains a subgraph"
        if attribute.t.data_location == _EXTERNAL:
            yield f"{name} reads data from outside the file"
        # deterministic by the standard, but one image would change the output for another
        if (name, attribute.name) == ("BatchNormalization", "training_mode") and attribute.i:
            yield "its batch norm is in training mode, so outputs depend on the whole batch"


def _weight_faults(graph: Any) -> Iterator[str]:
    names = [tensor.name for tensor in graph.initializer]
    if len(names) != len(set(names)):
        yield "it contains a weight twice"
    if graph.sparse_initializer:
        yield "it contains sparse weights"
    for tensor in graph.initializer:
        if tensor.data_location == _EXTERNAL or tensor.external_data:
            yield f"its weight {tensor.name} lies outside the file"


def _ends_faults(graph: Any, shape: tuple[int, int, int], num_classes: int) -> Iterator[str]:
    """Inputs and outputs: one of each, with a batch axis of any length."""
    for ends, values, name, rest in (
        ("inputs", graph.input, "images", list(shape)),
        ("outputs", graph.output, "logits", [num_classes]),
    ):
        if [value.name for value in values] != [name]:
            yield f"its {ends} must be [{name!r}], got {[value.name for value in values]}"
            continue
        kind = values[0].type.tensor_type
        batch, *sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if kind.elem_type != _FLOAT or batch is not None or sizes != rest:
            found = [d.dim_value or d.dim_param for d in kind.shape.dim]
            hint = ": take the number of images from x.shape[0], not from len(x)"
            yield (
                f"{name} must be float32 of shape [batch, {str(rest)[1:-1]}], it is {found}"
                + (hint if name == "images" and batch is not None else "")
            )
