"""A small client of the protocol over a persistent connection, for measuring and auditing."""

import http.client
import json
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from redefense.serve.draws import Floats
from redefense.serve.model import INPUT
from redefense.serve.protocol import BINARY_HEADER

Form = Literal["json", "binary", "uint8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A response, and how long it took from the first byte sent to the last received."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)

    def output(self, name: str) -> list[Any]:
        """The data of one output tensor."""
        (data,) = [entry["data"] for entry in self.json()["outputs"] if entry["name"] == name]
        return list(data)


def tensor_request(images: Floats, form: Form = "binary") -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference request for images (N, C, H, W) in [0, 1]."""
    datatype = "UINT8" if form == "uint8" else "FP32"
    tensor: dict[str, Any] = {"name": INPUT, "shape": list(images.shape), "datatype": datatype}
    if form == "json":
        tensor["data"] = images.ravel().tolist()
        return json.dumps({"inputs": [tensor]}).encode(), {"Content-Type": "application/json"}
    scaled = np.rint(images * 255).astype("u1") if form == "uint8" else images.astype("<f4")
    blob = scaled.tobytes()
    tensor["parameters"] = {"binary_data_size": len(blob)}
    header = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Content-Type": "application/octet-stream", BINARY_HEADER: str(len(header))}
    return header + blob, headers


class Client:
    """One connection to a server; the model's name is requested once.

    Args:
        source: the address to connect from; on this machine any of 127.0.0.0/8.
    """

    def __init__(self, url: str, *, source: str | None = None, timeout: float = 30.0) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(
            str(parts.hostname),
            parts.port,
            timeout=timeout,
            source_address=None if source is None else (source, 0),
        )
        self._name: str | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        started = time.perf_counter()
        self._connection.request(method, path, body, headers or {})
        response = self._connection.getresponse()
        content = response.read()
        return Reply(
            status=response.status,
            headers=response.getheaders(),
            body=content,
            seconds=time.perf_counter() - started,
        )

    def model_path(self) -> str:
        if self._name is None:
            self._name = str(self.request("GET", "/about.json").json()["name"])
        return f"/v2/models/{self._name}"

    def infer(
        self, images: Floats, form: Form = "binary", headers: dict[str, str] | None = None
    ) -> Reply:
        body, own = tensor_request(images, form)
        return self.request("POST", f"{self.model_path()}/infer", body, own | (headers or {}))
