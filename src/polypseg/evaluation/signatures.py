"""Signatures of evaluation receipts: ed25519, in a file beside the receipt, made on request and checked by public key.

A receipt that recomputes can still be invented as a whole. A signature says that the holder of a key stands by it, and
only to somebody who knows that key: without a public key nothing is claimed.
"""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polypseg.errors import PolypSegError, UsageError, first_line
from polypseg.evaluation.receipt import check_receipt, digest_of, read_content
from polypseg.files import read_json, write_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = 1
"""Version of the format, under the key ``signature``."""
SUFFIX = ".sig"
"""Appended to the receipt's name."""
_PURPOSE = b"polypseg evaluation receipt\n"
"""Signed before the digest, so that a signature made for something else is none of a receipt."""


def signature_path(receipt: Path) -> Path:
    """Where the signature of a receipt lies."""
    return receipt.with_name(receipt.name + SUFFIX)


def sign_receipt(receipt: Path, *, key: Path) -> Path:
    """Sign a receipt that recomputes with the ed25519 private key of a PEM file; return the signature's path.

    A signature that is there is replaced. Raises UsageError for a file without such a key and PolypSegError for a
    receipt that is not what its images give, which nobody should stand by.
    """
    private = _private_key(key)
    problems = check_receipt(receipt)
    if problems:
        raise PolypSegError(f"{receipt} is not signed: {problems[0]}: evaluate again")
    digest = digest_of(read_content(receipt))
    value = private.sign(_PURPOSE + digest.encode())
    record = {
        "signature": SIGNATURE,
        "algorithm": "ed25519",
        "digest": digest,
        "value": base64.b64encode(value).decode(),
    }
    return write_json(signature_path(receipt), record)


def check_signature(receipt: Path, *, public_key: Path) -> list[str]:
    """What is wrong with a receipt's signature by this key, one line each; [] where it is the key holder's.

    Raises UsageError for a file without an ed25519 public key, PolypSegError for a receipt that cannot be read.
    """
    public = _public_key(public_key)
    path, digest = signature_path(receipt), digest_of(read_content(receipt))
    if not path.is_file():
        return [f"signature: there is no {path.name}"]
    try:
        record: Any = read_json(path)
        value = base64.b64decode(record["value"], validate=True)
        known = (record["signature"], record["algorithm"]) == (SIGNATURE, "ed25519")
    except (PolypSegError, KeyError, TypeError, ValueError) as error:
        return [f"signature: {path.name} is damaged ({type(error).__name__})"]
    if not known:
        return [f"signature: {path.name} is of another format"]
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(value, _PURPOSE + digest.encode())
    except InvalidSignature:
        return [f"signature: not one of this receipt by the key of {public_key}"]
    return []


def _private_key(path: Path) -> "Ed25519PrivateKey":
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:  # no PEM, another format, or protected by a password
        raise _no_key(path, "private", first_line(error)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private", "it holds a key of another kind")
    return key


def _public_key(path: Path) -> "Ed25519PublicKey":
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except ValueError as error:
        raise _no_key(path, "public", first_line(error)) from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public", "it holds a key of another kind")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror}") from error


def _no_key(path: Path, kind: str, why: str) -> UsageError:
    return UsageError(
        f"{path} holds no ed25519 {kind} key ({why.rstrip('.')}): make a pair with `openssl genpkey -algorithm ed25519 "
        "-out key.pem` and `openssl pkey -in key.pem -pubout -out key.pub.pem`"
    )


def _require_cryptography() -> None:
    import importlib.util

    if importlib.util.find_spec("cryptography") is None:
        raise UsageError("signatures need the package cryptography: pip install 'polypseg[sign]'")
