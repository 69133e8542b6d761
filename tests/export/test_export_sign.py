"""Signed bundles: only the manifest that was signed, by the key that signed it, is taken."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from cli_tools import command
from export_tools import ABOUT, plain, trained
from redefense.errors import ConfigError, DataError
from redefense.export import export, runner
from redefense.export.signing import SignatureError, sign_with, trust_in
from redefense.export.verify import verify
from redefense.serve.model import Model

# made by `openssl genpkey -algorithm ed25519` and `openssl pkeyutl -sign -rawin`
OPENSSL_PUBLIC = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAgdksVPIZWwhopAe6+AZIuA3w1KP4nNxbUCdu8edX3TA=
-----END PUBLIC KEY-----
"""
OPENSSL_SIGNATURE = (
    "9R6PcnN1kqAd60MM8DQBSQF4MNc8Eg+mRwar+yyRqlOWIKnUUnwn10mEryB8PNSGIWBGF/rPopO6bkoFv0/9Cg=="
)
OPENSSL_MANIFEST = b"a manifest\n"


def write_private(path: Path, content: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


def private_bytes(key: Ed25519PrivateKey, lock: KeySerializationEncryption | None = None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock or NoEncryption())


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new key pair: the private and the public file."""
    key = Ed25519PrivateKey.generate()
    public = folder / f"{name}-public.pem"
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return write_private(folder / f"{name}-private.pem", private_bytes(key)), public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "own")


@pytest.fixture(scope="module")
def signed(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("s") / "signed"
    return export(plain(2), out, ABOUT, sign=sign_with(keys[0]))


@pytest.fixture(scope="module")
def other(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another bundle of the same signer."""
    out = tmp_path_factory.mktemp("s") / "other"
    return export(plain(3), out, ABOUT, sign=sign_with(keys[0]))


def test_a_signed_bundle_holds_with_the_signers_key_and_without_any(
    signed: Path, keys: tuple[Path, Path]
) -> None:
    checks = verify(signed, signer=keys[1])
    assert all(check.passed for check in checks), checks
    assert checks[0].id == "signature"
    assert all(check.passed for check in verify(signed))
    assert "manifest.sig" not in json.loads((signed / "manifest.json").read_text())["files"]


def test_an_unsigned_bundle_holds_unless_a_signer_is_named(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    unsigned = export(plain(2), tmp_path / "signed", ABOUT)
    assert (unsigned / "manifest.json").read_bytes() == (signed / "manifest.json").read_bytes()
    assert all(check.passed for check in verify(unsigned))
    (check,) = verify(unsigned, signer=keys[1])
    assert (check.id, check.passed) == ("signature", False)
    assert "not signed" in check.detail


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda bad, _: flip(bad / "manifest.json", 0),
        lambda bad, _: flip(bad / "manifest.json", -40),
        lambda bad, _: flip(bad / "manifest.json", -1),
        lambda bad, _: flip(bad / "manifest.sig", 5),
        lambda bad, _: (bad / "manifest.sig").write_bytes(b""),
        lambda bad, _: (bad / "manifest.sig").write_bytes(bytes(64)),
        lambda bad, _: link(bad / "manifest.sig"),
        lambda bad, other: shutil.copy(other / "manifest.sig", bad),
        lambda bad, _: (bad / "manifest.json").write_text(
            json.dumps(json.loads((bad / "manifest.json").read_text()))
        ),
    ],
    ids=["brace", "hash", "newline", "flipped", "empty", "zeros", "link", "others", "rewritten"],
)
def test_a_changed_manifest_or_signature_is_refused_and_not_served(
    change: Callable[[Path, Path], object],
    signed: Path,
    other: Path,
    keys: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(signed, bad)
    change(bad, other)
    (check,) = verify(bad, signer=keys[1])
    assert (check.id, check.passed) == ("signature", False)
    assert len(check.detail.splitlines()) == 1
    with pytest.raises(DataError, match=r"manifest\.sig"):
        Model(bad, trust=trust_in(keys[1]))


def test_a_bundle_signed_by_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, foreign = write_keys(tmp_path, "foreign")
    (check,) = verify(signed, signer=foreign)
    assert "foreign-public.pem" in check.detail


def test_a_file_changed_under_a_sound_signature_does_not_hold(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(signed, bad)
    flip(bad / "members/1.onnx", -1)
    failed = {check.id for check in verify(bad, signer=keys[1]) if not check.passed}
    assert "records" in failed
    with pytest.raises(DataError, match=r"members/1\.onnx"):
        Model(bad, trust=trust_in(keys[1]))


def test_what_openssl_signs_is_taken_and_nothing_else(tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_text(OPENSSL_PUBLIC)
    (tmp_path / runner.SIGNATURE).write_bytes(base64.b64decode(OPENSSL_SIGNATURE))
    trust = trust_in(public)
    trust(tmp_path, OPENSSL_MANIFEST)
    with pytest.raises(SignatureError):
        trust(tmp_path, OPENSSL_MANIFEST + b"\n")


def elliptic() -> bytes:
    return generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )


def locked() -> bytes:
    return private_bytes(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"word"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (elliptic(), "another kind of key"),
        (locked(), "passphrase"),
        (OPENSSL_PUBLIC.encode(), "no private key"),
        (b"", "no private key"),
    ],
    ids=["elliptic", "locked", "public", "empty"],
)
def test_only_a_plain_ed25519_key_signs(content: bytes, says: str, tmp_path: Path) -> None:
    path = write_private(tmp_path / "key.pem", content)
    with pytest.raises(ConfigError, match=says) as caught:
        sign_with(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_private_key_that_others_may_read_signs_nothing(keys: tuple[Path, Path]) -> None:
    path = keys[0].with_name("open.pem")
    path.write_bytes(keys[0].read_bytes())
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        sign_with(path)
    # that would be the wrong advice for a public key, which everybody may read
    path.write_bytes(keys[1].read_bytes())
    with pytest.raises(ConfigError, match="holds no private key"):
        sign_with(path)


def test_only_an_ed25519_public_key_is_a_signer(keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no public key"):
        trust_in(keys[0])
    curve = generate_private_key(SECP256R1()).public_key()
    path = tmp_path / "curve.pem"
    path.write_bytes(curve.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match="another kind of key"):
        trust_in(path)
    for wanted in (sign_with, trust_in):
        with pytest.raises(DataError, match="No such file"):
            wanted(tmp_path / "missing.pem")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("r") / "run")


def test_the_commands_sign_verify_and_refuse_with_their_exit_codes(
    run: Path, keys: tuple[Path, Path], signed: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    private, public = keys
    monkeypatch.chdir(tmp_path)
    assert command("export", run, "--out", "b", "--sign", public).code == 2
    assert not Path("b").exists()
    assert command("export", run, "--out", "b", "--sign", private, "--quiet").code == 0
    holds = command("verify", "b", "--signer", public)
    assert holds.code == 0
    assert "signed by the key" in holds.out
    flip(Path("b/manifest.json"), -40)
    fails = command("verify", "b", "--signer", public, "--quiet")
    assert fails.code == 1
    assert "does not hold: signature" in fails.err
    serve = ("serve", "b", "--signer", public, "--port", 0, "--quiet")
    for words in (serve, ("serve", "b", "--signer", public, "--audit")):
        refused = command(*words)
        assert refused.code == 3
        assert "not the signature of this manifest" in refused.err
        assert len(refused.err.splitlines()) == 1
    assert command("verify", signed, "--signer", private).code == 2
    assert command("verify", signed, "--signer", "none.pem").code == 3
