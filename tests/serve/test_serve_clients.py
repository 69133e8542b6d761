"""Requests as clients of the Open Inference Protocol write them: what is optional may be null."""

import gzip
import http.client
import json
import socket
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from redefense.serve.audit.client import Client, tensor_request
from redefense.serve.model import Model
from redefense.serve.protocol import BINARY_HEADER
from redefense.serve.settings import Settings
from serve_tools import SHAPE, make_bundle, pictures, serving

PATH = "/v2/models/toy"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = Model(make_bundle(tmp_path_factory.mktemp("clients") / "toy", 1), threads=1)
    with serving(model, Settings(max_batch=8, max_body=4096, grace=0.0)) as opened:
        yield opened


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as opened:
        yield opened


def question(**changes: Any) -> dict[str, Any]:
    """The question about image 3, in JSON."""
    data = pictures(np.array([3])).ravel().tolist()
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, *SHAPE], "data": data}
    return {"inputs": [tensor | changes]}


def post(client: Client, value: object, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    reply = client.request("POST", f"{PATH}/infer", body, headers)
    return reply.status, reply.json()


@pytest.mark.parametrize(
    "sent",
    [
        question() | {"parameters": None},
        question() | {"parameters": {}},
        question() | {"parameters": {"binary_data_output": None}},
        question() | {"parameters": {"timeout": 5, "priority": 1}},
        question() | {"id": None},
        question() | {"outputs": None},
        question() | {"outputs": []},
        question() | {"outputs": [{"name": "class_id", "parameters": None}]},
        question() | {"outputs": [{"name": "class_id", "parameters": {"binary_data": None}}]},
        question(parameters=None),
        question(parameters={}),
        question(parameters={"binary_data_size": None}),
        question() | {"id": "x" * 256},
        question(datatype="FP64"),
        # as FP32 this is 1, whatever its double is
        question(
            data=[1.00000001 if v == 1 else v for v in pictures(np.array([3])).ravel().tolist()]
        ),
    ],
)
def test_what_is_optional_may_be_null_or_empty(client: Client, sent: dict[str, Any]) -> None:
    status, answer = post(client, sent)
    assert status == 200, answer
    (classes,) = [o["data"] for o in answer["outputs"] if o["name"] == "class_id"]
    assert classes == [3]
    assert answer.get("id") == sent.get("id")


def test_data_may_be_null_beside_binary_tensors(client: Client) -> None:
    body, headers = tensor_request(pictures(np.array([3])))
    length = int(headers[BINARY_HEADER])
    asked = json.loads(body[:length])
    asked["inputs"][0]["data"] = None
    header = json.dumps(asked).encode()
    status, answer = post(client, header + body[length:], {BINARY_HEADER: str(len(header))})
    assert (status, answer["outputs"][1]["data"]) == (200, [3])


ABOVE = float(np.nextafter(np.float32(1), np.float32(2)))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (question(data=[0.5] * 15 + [ABOVE]), "found 0.5 to 1.0000001"),
        (question(data=[0.5] * 15 + [1 + 1e-12], datatype="FP64"), "found 0.5 to 1.000000000001"),
        (question(data=[0.5] * 15 + [-1e-9]), "found -1e-09 to 0.5"),
        (question(data=[0.5] * 15 + [1e300]), "found 0.5 to inf"),
        (question(data=[0] * 15 + [256], datatype="UINT8"), "[0, 255], found 0 to 256"),
        (question(datatype="FP16"), 'one of FP32, FP64, UINT8, got "FP16"'),
        (question(datatype="x" * 999), 'got "' + "x" * 59 + "..."),
        (question(name="input"), 'the input is named images, got "input"'),
        (question(shape=[1, 4, 4]), "[number of images, 1, 4, 4], got [1, 4, 4]"),
        (question(shape=[1.0, *SHAPE]), "a list of whole numbers, got [1.0, 1, 4, 4]"),
        (question(parameters=[]), "parameters must be an object, got []"),
        (question() | {"outputs": [{"name": "logits"}]}, 'each at most once, got "logits"'),
        (question() | {"parameters": {"binary_data_output": 1}}, "true or false, got 1"),
        (b'{"inputs": [], "inputs": []}', '"inputs" occurs 2 times in one object'),
        (b'{"inputs": [{"name": "images", "data": [1], "data": [2]}]}', '"data" occurs 2 times'),
        (b'{"inputs": [{"data": [Infinity]}]}', "Infinity is not a JSON number"),
        (b'{"inputs": [{"data": [-Infinity]}]}', "-Infinity is not a JSON number"),
        (b"{'inputs': []}", "not valid JSON: Expecting property name"),
        ('{"id": "caf\u00e9"}'.encode("latin-1"), "not valid JSON: 'utf-8' codec"),
        (question() | {"id": "x" * 257}, "at most 256 characters"),
    ],
)
def test_a_refusal_says_what_was_sent(client: Client, sent: object, message: str) -> None:
    status, answer = post(client, sent)
    assert status == 400
    assert message in answer["error"]
    assert len(answer["error"]) < 250


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(json.dumps(question()).encode())),
        ("GZIP", gzip.compress(bytes(10**7))),
        ("deflate", zlib.compress(json.dumps(question()).encode())),
        ("br", b"\x0b"),
        ("identity, gzip", gzip.compress(b"{}")),
    ],
    # gzip writes the time into its bytes, which must not name a test
    ids=["gzip", "in capitals", "deflate", "brotli", "the second of two"],
)
@pytest.mark.parametrize("path", ["infer", "classify"])
def test_compressed_bodies_are_refused_by_name(
    client: Client, coding: str, body: bytes, path: str
) -> None:
    media = "image/png" if path == "classify" else "application/json"
    headers = {"Content-Encoding": coding, "Content-Type": media}
    reply = client.request("POST", f"{PATH}/{path}", body[:4000], headers)
    assert reply.status == 415
    assert f"not supported (Content-Encoding: {coding})" in reply.json()["error"]
    assert dict(reply.headers)["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Encoding": "identity"}, 200),
        ({"Content-Encoding": ""}, 200),
        ({"Accept-Encoding": "gzip, br"}, 200),
        ({"Accept": "application/octet-stream"}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 200),  # of curl -d
        ({"Content-Type": "text/plain"}, 200),
        ({"Content-Type": "image/webp"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
    ],
)
def test_json_is_read_whatever_it_is_called_but_forms_and_other_pictures_are_not(
    client: Client, headers: dict[str, str], status: int
) -> None:
    found, answer = post(client, question(), headers)
    assert found == status
    assert ("send a picture as image/png or image/jpeg, got " in answer.get("error", "")) == (
        status == 415
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_may_come_in_any_unicode_encoding(client: Client, encoding: str) -> None:
    status, answer = post(client, json.dumps(question() | {"id": "caf\u00e9"}).encode(encoding))
    assert (status, answer["id"]) == (200, "caf\u00e9")


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v2", 200), ("/v2/health/ready", 200), (PATH, 200), (f"{PATH}/infer", 405), ("/v2/x", 404)],
)
def test_head_is_get_without_a_body(client: Client, path: str, status: int) -> None:
    reply = client.request("HEAD", path)
    assert (reply.status, reply.body) == (status, b"")


@pytest.mark.parametrize("path", ["/v2/", "/v2/health/live/", f"{PATH}/", f"{PATH}/infer/"])
def test_a_slash_at_the_end_leads_to_the_route_without(client: Client, path: str) -> None:
    method = "POST" if "infer" in path else "GET"
    body = json.dumps(question()).encode() if method == "POST" else b""
    reply = client.request(method, path, body)
    assert reply.status == 307
    target = urlsplit(dict(reply.headers)["location"]).path
    assert target == path.rstrip("/")
    assert client.request(method, target, body).status == 200


def test_bodies_may_come_in_chunks_or_after_a_word_from_the_server(url: str) -> None:
    body = json.dumps(question()).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("POST", f"{PATH}/infer", iter([body[:50], body[50:]]), encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    host, port = urlsplit(url).hostname, urlsplit(url).port
    for size, expected in ((len(body), b"HTTP/1.1 100"), (10**6, b"HTTP/1.1 413")):
        with socket.create_connection((host, port), timeout=10) as plain:
            head = f"POST {PATH}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n"
            plain.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            answer = plain.makefile("rb")
            assert answer.readline().startswith(expected)  # what is too large need not be sent
            if size == len(body):
                plain.sendall(body)
                assert answer.readline() == b"\r\n"
                assert answer.readline().startswith(b"HTTP/1.1 200")
            answer.close()
