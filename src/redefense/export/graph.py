"""Exports one network as one ONNX file: dynamic batch, weights inside, no local paths.

The weights of a network keep their names and values, batch norm included (the runtime folds it when
it loads a file), so that a bundle can be compared with a checkpoint bit by bit and loaded back into
torch. The exporter's metadata about the source, including local paths, are removed.
"""

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor, nn

from redefense.errors import ConfigError, ModelError, first_line, need
from redefense.networks import copied, set_evaluation, unwrapped
from redefense.types import Images, cannot_take

OPSET: Final = 18


def portable(net: nn.Module, *, as_given: bool = False) -> nn.Module:
    """A copy of a network for deployment: unwrapped, evaluation mode, float32, on the CPU.

    Args:
        net: the network, not changed.
        as_given: keep the modes of its layers.

    Raises:
        ConfigError: if it, or a part of it, is scripted or traced: the exporter does not support
            it.
        InputError: if it cannot be copied.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in net.modules()):
        raise ConfigError(
            "a scripted or traced network cannot be exported: give the network it was made from"
        )
    plain = unwrapped(copied(net))
    if not as_given:
        set_evaluation(plain)
    plain = plain.float().cpu()
    return plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it


def member_graph(net: nn.Module, shape: tuple[int, int, int]) -> bytes:
    """The ONNX file of a network in evaluation mode, float32; `net` is not changed.

    Equal networks give equal bytes.

    Raises:
        ConfigError: if torch cannot export the network, with the reason.
    """
    optimizer = need("onnxscript.optimizer")
    # two images: the exporter would take a batch of one for a constant
    plain, example = portable(net), torch.full((2, *shape), 0.5)
    _make_traceable(plain, example)
    try:
        with _quiet(), _operators_read_once(), torch.no_grad():
            program = torch.onnx.export(
                plain,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            state = set(plain.state_dict())
            # without the exporter's optimizer, which merges equal weights and folds batch norms, so
            # that they would differ from the checkpoint
            optimizer.fold_constants(
                program.model,
                should_fold=lambda node: (
                    False if node.op_type == "Unsqueeze" and node.inputs[0].name in state else None
                ),
            )
            optimizer.remove_unused_nodes(program.model)
            model = program.model_proto
    except Exception as error:  # the exporter runs the network, which may raise anything
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        why = first_line(cause) or type(cause).__name__
        raise ConfigError(f"{type(plain).__name__} cannot be exported: {why}") from error
    return tidied(model)


def _make_traceable(net: nn.Module, example: Images) -> None:
    """Adapt a network's forward pass to the exporter, in place.

    It needs one named argument and one tensor of float32, and in-place changes of the argument
    would be lost.
    """
    forward, given = net.forward, example.clone()
    with torch.no_grad():
        try:
            answer = net(given)
        except Exception as error:
            raise cannot_take(example, error) from error
    logits = _plain(answer)
    check_finite(logits)
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    # the exporter finds inputs by name, so *args do not do
    named = bool(kinds) and kinds[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD
    if not named or logits is not answer or not torch.equal(given, example):
        net.forward = lambda images: _plain(forward(images.clone()))


def _plain(answer: Any) -> Tensor:
    """Logits in float32; those of an object are its attribute `logits`, as in transformers."""
    logits: Tensor = answer if isinstance(answer, Tensor) else answer.logits
    return logits.float()


def check_finite(logits: Tensor) -> None:
    """Check that logits are finite; runtimes treat others in different ways.

    Raises:
        ModelError: in one line.
    """
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "the logits of a member are not all finite, which runtimes treat in different ways: "
            "look at its weights, and mask classes by a large negative number, such as -1e4"
        )


def tidied(model: Any) -> bytes:
    """A model's bytes without producer metadata, inner shapes and unused operator sets."""
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    graph.ClearField("value_info")
    used = {node.domain for node in graph.node}
    # folding may leave operator sets that no node uses, which old runtimes do not know
    imports = [entry for entry in model.opset_import if entry.domain in used]
    model.ClearField("opset_import")
    model.opset_import.extend(imports)
    return bytes(model.SerializeToString(deterministic=True))


def skeleton(graph: bytes, free: Callable[[Any], bool]) -> bytes:
    """A model's computation: its bytes without the values of some initializers.

    Args:
        graph: an ONNX file.
        free: whether an initializer's value is excluded; names, types and shapes are kept.
    """
    model = need("onnx").load_from_string(graph)
    for tensor in model.graph.initializer:
        if free(tensor):
            for field in ("raw_data", "float_data", "int32_data", "int64_data"):
                tensor.ClearField(field)
    # the order of weights in the file has no effect and differs between versions of the exporter
    ordered = sorted(model.graph.initializer, key=lambda tensor: str(tensor.name))
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(ordered)
    # the producer of the file is no part of the computation
    for field in ("producer_name", "producer_version", "ir_version"):
        model.ClearField(field)
    model.graph.ClearField("name")
    return tidied(model)


@functools.cache
def _table_of(kind: Any) -> Callable[..., Any]:
    return functools.cache(kind.from_torchlib)


@contextlib.contextmanager
def _operators_read_once() -> Iterator[None]:
    """Cache the exporter's table of operators, which takes as long as exporting a small network."""
    try:
        kind = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        before, table = vars(kind)["from_torchlib"], _table_of(kind)
    except (ImportError, AttributeError, KeyError):
        # another version of torch, which builds the table each time
        yield
        return
    kind.from_torchlib = staticmethod(table)
    try:
        yield
    finally:
        kind.from_torchlib = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings on unused packages and deprecations in torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # for weights computed in each call, as the exported graph does, too
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            yield
    finally:
        logger.setLevel(level)
