"""The server's routes: conformance with the Open Inference Protocol v2, pictures, refusals."""

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from redefense.errors import ConfigError, DataError
from redefense.export import runner
from redefense.export.runner import sessions
from redefense.networks import as_logits
from redefense.serve.audit.client import Client, tensor_request
from redefense.serve.model import Model
from redefense.serve.protocol import BINARY_HEADER
from redefense.serve.settings import Settings, check_address
from serve_tools import CLASSES, SHAPE, make_bundle, pictures, serving

PATH = "/v2/models/toy"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(make_bundle(tmp_path_factory.mktemp("serve") / "toy"), threads=1)


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[Client]:
    with (
        serving(model, Settings(max_batch=8, max_body=4096, grace=0.0)) as url,
        Client(url) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def shown(model: Model) -> Iterator[Client]:
    """A research server: answers name the member."""
    with serving(model, Settings(research=True, seed=3, grace=0.0)) as url, Client(url) as opened:
        yield opened


def request(**changes: object) -> dict[str, Any]:
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, *SHAPE], "data": [0.5] * 16}
    return {"inputs": [tensor | changes]}


def post(client: Client, value: object, path: str = "/infer") -> tuple[int, Any]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    reply = client.request("POST", PATH + path, body)
    return reply.status, reply.json()


@pytest.mark.parametrize(
    ("method", "path", "status", "keys"),
    [
        ("GET", "/v2", 200, {"name", "version", "extensions"}),
        ("GET", "/v2/health/live", 200, {"live"}),
        ("GET", "/v2/health/ready", 200, {"ready"}),
        ("GET", PATH, 200, {"name", "versions", "platform", "inputs", "outputs"}),
        ("GET", f"{PATH}/versions/1", 200, {"name", "versions", "platform", "inputs", "outputs"}),
        ("GET", f"{PATH}/ready", 200, {"name", "ready"}),
        ("GET", f"{PATH}/versions/1/ready", 200, {"name", "ready"}),
        ("GET", "/v2/models/other", 404, {"error"}),
        ("GET", "/v2/models/other/ready", 404, {"error"}),
        ("GET", f"{PATH}/versions/2", 404, {"error"}),
        ("GET", f"{PATH}/infer", 405, {"error"}),
        ("POST", "/v2/health/live", 405, {"error"}),
        ("GET", "/v2/nothing", 404, {"error"}),
        ("POST", "/research/members", 404, {"error"}),
        ("POST", "/v2/models/other/infer", 404, {"error"}),
    ],
)
def test_routes_answer_as_the_protocol_says(
    client: Client, method: str, path: str, status: int, keys: set[str]
) -> None:
    reply = client.request(method, path)
    assert (reply.status, set(reply.json())) == (status, keys)
    assert dict(reply.headers)["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/infer", "/versions/1/infer"])
@pytest.mark.parametrize("nested", [False, True])
def test_json_tensors_are_answered_in_order(client: Client, path: str, nested: bool) -> None:
    images = pictures(np.arange(8))
    data = images.tolist() if nested else images.ravel().tolist()
    question = request(shape=[8, *SHAPE], data=data) | {"id": "mine"}
    status, answer = post(client, question, path)
    assert status == 200
    assert answer["id"] == "mine"
    assert (answer["model_name"], answer["model_version"]) == ("toy", "1")
    outputs = {entry["name"]: entry for entry in answer["outputs"]}
    assert set(outputs) == {"label", "class_id", "confidence"}
    classes = np.array(outputs["class_id"]["data"])
    assert np.isin((classes - np.arange(8)) % CLASSES, (0, 1, 2)).all()
    assert outputs["label"]["data"] == [f"class {k}" for k in classes]
    assert outputs["class_id"]["shape"] == [8]
    assert set(outputs["confidence"]["data"]) <= {"low", "medium", "high"}


def test_binary_tensors_hold_what_json_holds(client: Client) -> None:
    body, headers = tensor_request(pictures(np.arange(3)), "binary")
    length = int(headers[BINARY_HEADER])
    question = json.loads(body[:length]) | {"parameters": {"binary_data_output": True}}
    header = json.dumps(question).encode()
    reply = client.request(
        "POST", f"{PATH}/infer", header + body[length:], {BINARY_HEADER: str(len(header))}
    )
    own = dict(reply.headers)
    end = int(own["inference-header-content-length"])
    outputs = {entry["name"]: entry for entry in json.loads(reply.body[:end])["outputs"]}
    blobs, found = reply.body[end:], {}
    for name, entry in outputs.items():
        size = entry["parameters"]["binary_data_size"]
        found[name], blobs = blobs[:size], blobs[size:]
    classes = np.frombuffer(found["class_id"], "<i8")
    texts = [f"class {k}".encode() for k in classes]
    assert found["label"] == b"".join(len(t).to_bytes(4, "little") + t for t in texts)
    assert np.isin((classes - np.arange(3)) % CLASSES, (0, 1, 2)).all()
    assert blobs == b""


def test_outputs_are_those_asked_for(client: Client) -> None:
    status, answer = post(client, request() | {"outputs": [{"name": "class_id"}]})
    assert status == 200
    assert [entry["name"] for entry in answer["outputs"]] == ["class_id"]


@pytest.mark.parametrize(
    ("question", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 4000, 400),
        ({}, 400),
        ({"inputs": []}, 400),
        ({"inputs": [1]}, 400),
        ({"inputs": [request()["inputs"][0]] * 2}, 400),
        (request(name="other"), 400),
        (request(datatype="BYTES"), 400),
        (request(datatype=["FP32"]), 400),
        (request(shape=[1, 1, 4]), 400),
        (request(shape=[0, *SHAPE], data=[]), 400),
        (request(shape=[-1, *SHAPE]), 400),
        (request(shape=[True, *SHAPE]), 400),
        (request(shape=[1.0, *SHAPE]), 400),
        (request(shape=[9, *SHAPE], data=[0.5] * 144), 413),
        (request(data=[0.5] * 15), 400),
        (request(data=["0.5"] * 16), 400),
        (request(data=[True] * 16), 400),
        (request(data=[[0.5] * 8, [0.5] * 7]), 400),
        (request(data=[[0.5] * 4] * 4), 400),
        (request(data=[[[[0.5]] * 4] * 4]), 400),
        (request(data=[1e400] * 16), 400),
        (request(data=[10**100] * 16), 400),
        (request(data=[-0.1] * 16), 400),
        (request(data=[1.5] * 16), 400),
        (request(data=None), 400),
        (b'{"inputs": [{"name": "images", "data": [NaN]}]}', 400),
        (request(datatype="UINT8", data=[0.5] * 16), 400),
        (request(datatype="UINT8", data=[256] * 16), 400),
        (request(parameters=3), 400),
        (request(parameters={"binary_data_size": 16}), 400),
        (request() | {"id": 7}, 400),
        (request() | {"outputs": [{"name": "member"}]}, 400),
        (request() | {"outputs": [{"name": "scores"}]}, 400),
        (request() | {"outputs": "label"}, 400),
        (request() | {"parameters": {"binary_data_output": 1}}, 400),
        (b" " * 5000, 413),
    ],
)
def test_what_is_wrong_with_a_request_is_said_with_its_status(
    client: Client, question: object, status: int
) -> None:
    found, answer = post(client, question)
    assert found == status
    assert set(answer) == {"error"}


@pytest.mark.parametrize("length", ["", "x", "-1", "9999999", "1" * 50, "3"])
def test_a_wrong_header_length_is_refused(client: Client, length: str) -> None:
    body, headers = tensor_request(pictures(np.arange(1)))
    reply = client.request("POST", f"{PATH}/infer", body, headers | {BINARY_HEADER: length})
    assert reply.status == 400


def encoded(image: np.ndarray[Any, Any], kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("path", ["/classify", "/infer"])
@pytest.mark.parametrize(("kind", "size"), [("png", 4), ("png", 40), ("jpeg", 40)])
def test_pictures_are_decoded_and_resized(client: Client, path: str, kind: str, size: int) -> None:
    small = (pictures(np.array([2]))[0, 0] * 255).astype(np.uint8)
    picture = np.kron(small, np.ones((size // 4, size // 4), dtype=np.uint8))
    body = encoded(picture, kind)
    reply = client.request("POST", PATH + path, body, {"Content-Type": f"image/{kind}"})
    assert reply.status == 200
    answer = reply.json()
    found = answer["class_id"] if path == "/classify" else reply.output("class_id")[0]
    assert found in (2, 3, 4)


@pytest.mark.parametrize(
    ("content", "media_type", "status"),
    [
        (b"", "image/png", 400),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "image/png", 400),
        (encoded(np.zeros((8, 8), np.uint8), "png")[:-30], "image/png", 400),
        (encoded(np.zeros((8, 8), np.uint8), "bmp"), "image/png", 400),
        (encoded(np.zeros((8, 8), np.uint16), "png"), "image/png", 400),
        (encoded(np.zeros((4100, 4100), np.uint8), "jpeg"), "image/jpeg", 413),
        (encoded(np.zeros((8, 8), np.uint8), "png"), "image/webp", 415),
        (b"{}", "application/json", 415),
    ],
)
def test_what_is_no_picture_is_refused(
    model: Model, content: bytes, media_type: str, status: int
) -> None:
    with serving(model, Settings(grace=0.0)) as url, Client(url) as client:
        reply = client.request("POST", f"{PATH}/classify", content, {"Content-Type": media_type})
        assert reply.status == status


def test_no_mutation_of_a_body_is_answered_with_5xx(client: Client) -> None:
    rng = random.Random(0)
    picture = encoded(np.zeros((6, 6), np.uint8), "png")
    seeds = [
        (json.dumps(request()).encode(), {}),
        (*tensor_request(pictures(np.arange(2))),),
        (picture, {"Content-Type": "image/png"}),
        (encoded(np.zeros((6, 6), np.uint8), "jpeg"), {"Content-Type": "image/jpeg"}),
    ]
    statuses = set()
    for i in range(400):
        body, headers = seeds[i % len(seeds)]
        mutant = bytearray(body)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(mutant))
            mutant[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        statuses.add(client.request("POST", f"{PATH}/infer", bytes(mutant), headers).status)
    assert statuses <= {200, 400, 413, 415}


def test_request_i_gets_answer_i_under_mixed_concurrency(model: Model) -> None:
    with serving(
        model, Settings(research=True, seed=1, max_queue=2000, deadline=20.0, grace=0.0)
    ) as url:

        def visit(worker: int) -> bool:
            rng = np.random.default_rng(worker)
            right = True
            with Client(url) as client:
                for turn in range(25):
                    k = rng.integers(CLASSES, size=rng.integers(1, 9))
                    forms: Any = ("json", "binary", "uint8")
                    reply = client.infer(pictures(k), forms[turn % 3])
                    member = np.array(reply.output("member"))
                    right &= reply.output("class_id") == ((k + member) % CLASSES).tolist()
            return right

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(visit, range(16)))


def test_a_research_server_shows_every_member(shown: Client) -> None:
    picture = encoded((pictures(np.array([2]))[0, 0] * 255).astype(np.uint8), "png")
    reply = shown.request("POST", "/research/members", picture, {"Content-Type": "image/png"})
    assert [row["class_id"] for row in reply.json()["members"]] == [2, 3, 4]
    answer = shown.request(
        "POST", f"{PATH}/classify", picture, {"Content-Type": "image/png"}
    ).json()
    assert answer["class_id"] == 2 + answer["member"]


def test_scores_are_probabilities_and_opt_in(model: Model) -> None:
    with serving(model, Settings(scores=True, grace=0.0)) as url, Client(url) as client:
        reply = client.infer(pictures(np.arange(2)))
        scores = np.array(reply.output("scores")).reshape(2, CLASSES)
        assert scores.sum(1) == pytest.approx(1, abs=1e-5)
        assert scores.argmax(1).tolist() == reply.output("class_id")


@pytest.mark.parametrize("mode", ["sampled", "averaged", "member"])
def test_an_answer_that_is_no_number_names_no_class(
    model: Model, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = sessions.logits_of

    def dark(session: Any, images: Any) -> Any:
        return np.where(images.max((1, 2, 3))[:, None] < 0.1, np.nan, answer(session, images))

    monkeypatch.setattr(sessions, "logits_of", dark)
    with serving(model, Settings(mode=mode, scores=True, grace=0.0)) as url, Client(url) as client:
        bright, black = pictures(np.array([3])), np.zeros((1, *SHAPE), np.float32)
        assert post(client, request(data=bright.ravel().tolist()))[0] == 200
        status, said = post(client, request(data=black.ravel().tolist()))
        assert (status, list(said)) == (500, ["error"])
        assert "not finite" in said["error"]
        assert post(client, request(data=bright.ravel().tolist()))[0] == 200


class Replies:
    """In place of an onnxruntime session: gives the same logits to all."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def run(self, names: object, given: object) -> list[Any]:
        return [self.logits]


def test_masked_classes_are_finite_in_bundles_as_they_are_to_attacks(model: Model) -> None:
    rng = np.random.default_rng(0)
    logits = (10 ** rng.uniform(-1, 6, (64, 5)) * rng.choice([-1, 1], (64, 5))).astype(np.float32)
    logits[rng.random((64, 5)) < 0.3] = -np.inf
    logits[0], logits[1, 0], logits[2] = -np.inf, np.nan, [np.inf, -np.inf, 0, 1, 2]
    images = np.zeros((64, *SHAPE), np.float32)
    found = runner.logits_of(Replies(logits), images)
    wanted = as_logits(torch.from_numpy(logits.copy()), torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(found, wanted)
    # and what differs elsewhere is seen beside them
    other = np.where(found > runner.MASKED, found * 1.001, found)
    assert runner.deviation(other[3:], found[3:])[0] > 5e-4


@pytest.mark.parametrize(("mode", "expected"), [("member", 0), ("averaged", None)])
def test_modes_that_draw_nothing_answer_alike(
    model: Model, mode: Any, expected: int | None
) -> None:
    with serving(model, Settings(mode=mode, grace=0.0)) as url, Client(url) as client:
        answers = {tuple(client.infer(pictures(np.arange(5))).output("class_id")) for _ in range(9)}
    assert len(answers) == 1
    if expected is not None:
        assert answers == {tuple(range(5))}


def test_the_page_asks_nobody_else(client: Client) -> None:
    reply = client.request("GET", "/")
    policy = dict(reply.headers)["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    pages = b"".join(client.request("GET", path).body for path in ("/", "/page.css", "/page.js"))
    assert b"://" not in pages.replace(b"http://www.w3.org/2000/svg", b"")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::"])
def test_a_research_server_is_refused_where_others_reach_it(host: str) -> None:
    settings = Settings(research=True, seed=1)
    with pytest.raises(ConfigError, match="loopback"):
        check_address(settings, host)
    for own in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_address(settings, own)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 1}, {"research": True}, {"max_batch": 0},
        {"max_delay": -1.0}, {"deadline": 0.0}, {"max_queue": 3}, {"epoch": float("nan")},
        {"mode": "averaged", "policy": "per-input"}, {"mode": "member", "grouped": True},
        {"client_header": "X-Client"}, {"grouped": True, "max_batch": 1},
        {"research": True, "seed": 1, "policy": "per-client"},
    ],
)  # fmt: skip
def test_settings_that_contradict_themselves_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(**wrong)


def test_a_batch_is_so_many_runs_whoever_is_drawn_unless_grouped(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    inner = sessions.logits_of

    def counted(session: Any, images: Any) -> Any:
        runs.append(len(images))
        return inner(session, images)

    monkeypatch.setattr(sessions, "logits_of", counted)
    images = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
    by_draw, answers = [], []
    for drawn in (np.array([2, 0, 2, 0, 2]), np.array([1, 1, 1, 1, 1])):
        for grouped in (False, True):
            runs.clear()
            answers.append(model.classify(images, drawn, grouped=grouped))
            by_draw.append(sorted(runs))
    assert by_draw == [[1] * 5, [2, 3], [1] * 5, [5]]
    for alone, together in zip(answers[::2], answers[1::2], strict=True):
        np.testing.assert_allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize(("key", "wrong"), [("policy", "sticky"), ("mode", "everyone")])
def test_an_unknown_policy_is_not_taken_for_fresh(key: str, wrong: str) -> None:
    # in a process of its own: here beartype would refuse it before the settings do
    program = f"from redefense.serve.settings import Settings; Settings({key}={wrong!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(f"ConfigError: .*{key}.*{wrong}", done.stderr)


def test_a_damaged_bundle_is_refused_by_name(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "toy")
    content = bytearray((bundle / "members/1.onnx").read_bytes())
    content[-3] ^= 1
    (bundle / "members/1.onnx").write_bytes(content)
    with pytest.raises(DataError, match=r"members/1\.onnx"):
        Model(bundle)
    with pytest.raises(DataError, match=f"^{tmp_path} is no bundle: it lacks"):
        Model(tmp_path)


def test_the_server_never_imports_torch(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "toy")
    program = (
        "import sys; from pathlib import Path\n"
        "import redefense.cli, redefense.serve.audit.run\n"
        "from redefense.serve.model import Model\n"
        f"Model(Path({str(bundle)!r}), threads=1).warm_up((1, 2))\n"
        "assert not {name for name in sys.modules if name.split('.')[0] == 'torch'}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
