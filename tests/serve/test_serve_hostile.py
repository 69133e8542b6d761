"""Clients that try for more than their share: other draws, more memory, more time."""

import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from redefense.serve import app as app_module
from redefense.serve.audit.client import Client, tensor_request
from redefense.serve.draws import Floats, network_of
from redefense.serve.model import Model
from redefense.serve.protocol import BINARY_HEADER
from redefense.serve.settings import Settings
from serve_tools import SHAPE, make_bundle, pictures, serving

PATH = "/v2/models/toy"
Request = tuple[bytes, dict[str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(make_bundle(tmp_path_factory.mktemp("hostile") / "toy"), threads=1)


def png(image: Image.Image, **settings: Any) -> Request:
    stream = io.BytesIO()
    image.save(stream, "png", **settings)
    return stream.getvalue(), {"Content-Type": "image/png"}


def as_json(data: list[Any], datatype: str) -> Request:
    tensor = {"name": "images", "datatype": datatype, "shape": [1, *SHAPE], "data": data}
    return json.dumps({"inputs": [tensor], "id": datatype}).encode(), {}


def as_doubles(image: np.ndarray) -> Request:
    blob = image.astype("<f8").tobytes()
    size = {"binary_data_size": len(blob)}
    tensor = {"name": "images", "datatype": "FP64", "shape": [1, *SHAPE], "parameters": size}
    header = json.dumps({"inputs": [tensor]}, indent=3).encode()
    return header + blob, {BINARY_HEADER: str(len(header))}


def disguises(levels: np.ndarray) -> Iterator[Request]:
    """One image (4, 4) of 8-bit values in every form that a client may choose."""
    floats = (levels / np.float32(255)).astype(np.float32)[None, None]
    yield from (tensor_request(floats, form) for form in ("binary", "json", "uint8"))
    yield as_json(levels.ravel().tolist(), "UINT8")
    yield as_json(levels[None, None].tolist(), "UINT8")
    yield as_json([float(v) / 255 for v in levels.ravel()], "FP64")
    yield as_json([-0.0 if v == 0 else int(v) / 255 for v in levels.ravel()], "FP32")
    exact = levels.astype(np.float64) / 255
    yield as_doubles(exact)
    yield as_doubles((exact + 0.4 / 255).clip(0, 1))  # less than a rounding step
    yield as_doubles((exact - 0.4 / 255).clip(0, 1))
    grey = Image.fromarray(levels)
    note = PngInfo()
    note.add_text("comment", "another file, the same picture")
    yield png(grey)
    yield png(grey, compress_level=0, pnginfo=note)
    yield png(grey.convert("RGB"), optimize=True)
    yield png(grey.convert("LA"))
    yield png(grey.convert("RGBA"), dpi=(300, 300))
    yield png(grey.quantize(16))
    large = grey.resize((8, 8), Image.Resampling.NEAREST)
    if np.array_equal(np.asarray(large.resize((4, 4), Image.Resampling.BILINEAR)), levels):
        yield png(large)


def test_no_disguise_of_an_image_is_another_try(model: Model) -> None:
    settings = Settings(policy="per-input", grace=0.0)
    members = []
    with serving(model, settings) as url, Client(url) as client:
        for k in range(10):
            levels = np.rint(pictures(np.array([k]))[0, 0] * 255).astype(np.uint8)
            levels[3, 3] = 100 + k  # ten images for a key to choose by
            levels[3, 0] = 0
            replies = [
                client.request("POST", f"{PATH}/infer", *request) for request in disguises(levels)
            ]
            assert [reply.status for reply in replies] == [200] * len(replies)
            found = {reply.output("class_id")[0] for reply in replies}
            assert len(found) == 1, k
            members.append((found.pop() - k) % 10)
    assert set(members) == {0, 1, 2}  # and yet they are drawn


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("unix", "unix", True),
    ],
)
def test_addresses_that_one_client_may_choose_among_are_one_name(
    first: str, second: str, same: bool
) -> None:
    assert (network_of(first) == network_of(second)) is same


def test_a_client_cannot_add_a_name_of_its_own_to_that_of_the_proxy(model: Model) -> None:
    settings = Settings(policy="per-client", client_header="X-Client", grace=0.0)
    body, headers = tensor_request(pictures(np.array([1])))
    with serving(model, settings) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        for names, status in ((["a"], 200), (["a", "b"], 400), ([], 200)):
            connection.putrequest("POST", f"{PATH}/infer")
            for name in names:
                connection.putheader("X-Client", name)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                connection.putheader(key, value)
            connection.endheaders(body)
            response = connection.getresponse()
            assert (response.status, "outputs" in json.loads(response.read())) == (
                status,
                status == 200,
            )
        connection.close()


def test_pictures_are_decoded_few_at_a_time_and_within_the_deadline(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, most, lock = [0], [0], threading.Lock()
    opened = threading.Event()

    def slow(content: bytes, shape: tuple[int, int, int], max_pixels: int) -> Floats:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        opened.wait(10)
        with lock:
            busy[0] -= 1
        return pictures(np.array([1]))

    monkeypatch.setattr(app_module, "read_image", slow)
    body, headers = png(Image.new("L", (4, 4)))
    statuses: list[int] = []

    def upload() -> None:
        with Client(url) as client:
            statuses.append(client.request("POST", f"{PATH}/classify", body, headers).status)

    with serving(model, Settings(deadline=0.5, grace=0.0)) as url:
        threads = [threading.Thread(target=upload) for _ in range(12)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while len(statuses) < 12 and time.monotonic() < until:
            time.sleep(0.01)
        assert statuses == [504] * 12
        late = threading.Thread(target=upload)  # those given up are still at work
        late.start()
        late.join()
        assert (statuses[-1], most[0]) == (504, 4)
        opened.set()
        for thread in threads:
            thread.join()
        upload()
        assert (statuses[-1], most[0]) == (200, 4)


@pytest.mark.parametrize("pixels", [64, 3072, 150_528])
def test_a_body_may_hold_a_batch_of_binary_images_but_no_endless_json(pixels: int) -> None:
    batch = 64 * pixels
    limit = Settings().body_limit(pixels)
    assert limit > 8 * batch  # FP64, and a header
    assert limit <= max(8 * 2**20, 64 * 2**20, 8 * batch + 2**16)
    assert Settings(max_body=100).body_limit(pixels) == 100


@pytest.mark.parametrize(
    ("host", "research", "status"),
    [
        ("127.0.0.1:80", True, 200),
        ("localhost", True, 200),
        ("[::1]:8000", True, 200),
        ("evil.example:8000", True, 403),
        ("127.0.0.1.evil.example", True, 403),
        ("[", True, 403),
        ("evil.example", False, 200),  # behind a proxy a server has names of its own
    ],
)
def test_a_web_page_elsewhere_cannot_lead_a_browser_to_a_research_server(
    model: Model, host: str, research: bool, status: int
) -> None:
    settings = Settings(research=research, seed=1 if research else None, grace=0.0)
    with serving(model, settings) as url, Client(url) as client:
        reply = client.request("GET", "/about.json", headers={"Host": host})
    assert reply.status == status
    assert dict(reply.headers)["cache-control"] == "no-store"
