"""Open Inference Protocol v2: requests to images, answers to JSON or binary tensors.

Pure functions; invalid requests raise an HTTPException with a status below 500.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from redefense.serve.description import VERSION, output_types
from redefense.serve.draws import Floats
from redefense.serve.engine import CONFIDENCE, Answers
from redefense.serve.model import INPUT, Model
from redefense.serve.settings import Settings

BINARY_HEADER: Final = "Inference-Header-Content-Length"
# UINT8 holds 0 to 255 and is divided by 255: the smallest way to send an image
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "UINT8": np.dtype("u1"),
}
_ID_LENGTH = 256
_SHOWN = 60  # characters of a client's value in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One inference request.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        wanted: names of the requested outputs, and whether each is sent as binary tensor.
    """

    images: Floats
    wanted: Mapping[str, bool]
    id: str | None = None


def refuse(message: str, status: int = 400) -> NoReturn:
    raise HTTPException(status, message)


def read_question(
    body: bytes, header_length: str | None, model: Model, settings: Settings
) -> Question:
    """Parse an inference request, JSON alone or JSON followed by binary tensors."""
    header, blobs = body, b""
    if header_length is not None:
        # isdigit alone accepts other scripts, and int() of a long number is slow
        if not header_length.isascii() or not header_length.isdigit() or len(header_length) > 12:
            refuse(f"{BINARY_HEADER} must be a number of bytes")
        if int(header_length) > len(body):
            refuse(f"{BINARY_HEADER} is {int(header_length)}, the body has {len(body)} bytes")
        header, blobs = body[: int(header_length)], body[int(header_length) :]
    request = _json_object(header)
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        refuse(f"inputs must hold one tensor, {INPUT}")
    images = _images(inputs[0], blobs, model, settings)
    identity = request.get("id")
    if identity is not None and not (isinstance(identity, str) and len(identity) <= _ID_LENGTH):
        refuse(f"id must be a string of at most {_ID_LENGTH} characters")
    wanted = _wanted(request, output_types(settings, len(model.classes)))
    return Question(images=images, wanted=wanted, id=identity)


def _json_object(content: bytes) -> dict[str, Any]:
    def not_a_number(name: str) -> NoReturn:
        refuse(f"{name} is not a JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # other readers of the request, such as a proxy, may use the first of two
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                refuse(f"{_shown(name)} occurs {count} times in one object, it may occur once")
        return dict(pairs)

    try:
        value = json.loads(content, parse_constant=not_a_number, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        refuse(f"the request is not valid JSON: {error}")
    if not isinstance(value, dict):
        refuse("the request must be a JSON object")
    return value


def _shown(value: object) -> str:
    """A client's value, shortened for a message."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _parameters(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:  # clients send null for missing values
        return {}
    if not isinstance(parameters, dict):
        refuse(f"parameters must be an object, got {_shown(parameters)}")
    return parameters


def _is_count(value: object) -> bool:
    # true is an int in Python
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _images(tensor: Mapping[str, Any], blobs: bytes, model: Model, settings: Settings) -> Floats:
    name, datatype, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
    if name != INPUT:
        refuse(f"the input is named {INPUT}, got {_shown(name)}")
    if not isinstance(datatype, str) or datatype not in _DTYPES:
        refuse(f"datatype must be one of {', '.join(_DTYPES)}, got {_shown(datatype)}")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        refuse(f"shape must be a list of whole numbers, got {_shown(shape)}")
    if len(shape) != 4 or tuple(shape[1:]) != model.shape or shape[0] < 1:
        refuse(
            f"shape must be [number of images, {', '.join(map(str, model.shape))}], got "
            + _shown(shape)
        )
    if shape[0] > settings.max_batch:
        refuse(f"at most {settings.max_batch} images a request, got {_shown(shape[0])}", 413)
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        if blobs:
            refuse("the body continues after the JSON part, but no input has binary_data_size")
        values = _numbers(tensor.get("data"), datatype)
    else:
        values = _from_bytes(size, blobs, tensor, datatype)
    if values.size != np.prod(shape):
        refuse(f"shape {shape} needs {int(np.prod(shape))} values, got {values.size}")
    if values.ndim > 1 and list(values.shape) != shape:  # reshaping would scramble its pixels
        refuse(f"data must be flat or nested as in shape {shape}, got {list(values.shape)}")
    return _checked(values.reshape(shape), datatype)


def _from_bytes(
    size: object, blobs: bytes, tensor: Mapping[str, Any], datatype: str
) -> NDArray[Any]:
    if tensor.get("data") is not None:
        refuse("an input has data or binary_data_size, not both")
    if size != len(blobs) or isinstance(size, bool):
        refuse(f"binary_data_size must be the {len(blobs)} bytes after the JSON part")
    if len(blobs) % _DTYPES[datatype].itemsize:
        refuse(f"{len(blobs)} bytes are not a whole number of {datatype} values")
    values: NDArray[Any] = np.frombuffer(blobs, dtype=_DTYPES[datatype])
    return values


def _numbers(data: object, datatype: str) -> NDArray[Any]:
    if not isinstance(data, list):
        refuse("data must be a list of numbers")
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        refuse("data must be numbers, flat or nested as in the shape")
    # strings and nulls become arrays of objects, which no reshaping would refuse
    if values.dtype.kind not in "iuf":
        refuse("data must be numbers, flat or nested as in the shape")
    if datatype == "UINT8":
        if values.dtype.kind == "f":
            refuse("UINT8 data must be whole numbers")
        return values
    with np.errstate(over="ignore"):  # too large values become infinite, and are refused
        return values.astype(_DTYPES[datatype])


def _checked(values: NDArray[Any], datatype: str) -> Floats:
    low, high = values.min(), values.max()
    bound = 255 if datatype == "UINT8" else 1
    # NaN compares false with everything, so this also catches it
    if not (low >= 0 and high <= bound):
        found = f"found {low!s} to {high!s}"  # every digit: 1.0000001 is not 1
        refuse(f"{datatype} images must be finite and lie in [0, {bound}], {found}")
    images = values.astype(np.float32)
    return images / np.float32(255) if datatype == "UINT8" else images


def _wanted(request: Mapping[str, Any], known: Mapping[str, object]) -> dict[str, bool]:
    everything_binary = _flag(_parameters(request), "binary_data_output", default=False)
    outputs = request.get("outputs")
    if outputs is None or outputs == []:
        return dict.fromkeys(known, everything_binary)
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        refuse("outputs must be a list of objects")
    wanted: dict[str, bool] = {}
    for output in outputs:
        name = output.get("name")
        if not isinstance(name, str) or name not in known or name in wanted:
            refuse(f"outputs are {', '.join(known)}, each at most once, got {_shown(name)}")
        wanted[name] = _flag(_parameters(output), "binary_data", default=everything_binary)
    return wanted


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        refuse(f"{name} must be true or false, got {_shown(value)}")
    return value


def columns(answers: Answers, model: Model) -> dict[str, Sequence[Any] | NDArray[Any]]:
    """The answers as output tensors by name."""
    values: dict[str, Sequence[Any] | NDArray[Any]] = {
        "label": [model.classes[i] for i in answers.label],
        "class_id": answers.label,
        "confidence": [CONFIDENCE[i] for i in answers.confidence],
    }
    if answers.scores is not None:
        values["scores"] = answers.scores
    if answers.member is not None:
        values["member"] = answers.member
    return values


def write_answers(
    answers: Answers, question: Question, model: Model, settings: Settings
) -> tuple[bytes, int | None]:
    """Body of the response; the length of its JSON where binary tensors follow."""
    types = output_types(settings, len(model.classes))
    values = columns(answers, model)
    outputs, blobs = [], []
    for output, binary in question.wanted.items():
        datatype, shape = types[output]
        entry: dict[str, Any] = {
            "name": output,
            "datatype": datatype,
            "shape": [len(answers.label), *shape[1:]],
        }
        if binary:
            blobs.append(_to_bytes(values[output], datatype))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = _flat(values[output])
        outputs.append(entry)
    response = {"model_name": model.name, "model_version": VERSION, "outputs": outputs}
    if question.id is not None:
        response["id"] = question.id
    header = json.dumps(response).encode()
    return header + b"".join(blobs), len(header) if blobs else None


def _flat(values: Sequence[Any] | NDArray[Any]) -> list[Any]:
    return values.ravel().tolist() if isinstance(values, np.ndarray) else list(values)


def _to_bytes(values: Sequence[Any] | NDArray[Any], datatype: str) -> bytes:
    if isinstance(values, np.ndarray):
        return values.astype("<i8" if datatype == "INT64" else "<f4").tobytes()
    encoded = [str(value).encode() for value in values]
    # how the protocol sends strings: each behind its length in four bytes
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
