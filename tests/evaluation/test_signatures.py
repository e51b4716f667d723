"""Signatures of receipts: of just this receipt, by just this key, and nothing without a key."""

import shutil
from pathlib import Path

import pytest

from polypseg import zoo
from polypseg.cli.evaluate import check_receipts, sign_receipts
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import read_content, save_receipt
from polypseg.evaluation.signatures import check_signature, sign_receipt, signature_path
from receipt_factory import DrawnDataset, write_receipt

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key in the files that openssl would write."""
    key, kinds = ed25519.Ed25519PrivateKey.generate(), serialization
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(
        key.private_bytes(kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(kinds.Encoding.PEM, kinds.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_receipt(
        tmp_path_factory.mktemp("made"),
        zoo.get("RN-NA-NA"),
        seed=0,
        dataset=DrawnDataset("kvasir_seg", 4),
        split="reference",
        part="test",
        skill=1.0,
        conventions=("paper",),
    )


@pytest.fixture
def receipt(made, tmp_path) -> Path:
    return Path(shutil.copy(made, tmp_path))


def test_signature_holds_for_this_receipt_and_this_key_only(receipt, tmp_path):
    (private, public), (_, stranger) = write_keys(tmp_path, "ours"), write_keys(tmp_path, "theirs")
    assert check_signature(receipt, public_key=public) == [
        "signature: there is no kvasir_seg.reference.test.receipt.json.sig"
    ]
    assert sign_receipt(receipt, key=private) == signature_path(receipt)
    assert check_signature(receipt, public_key=public) == []
    assert "not one of this receipt by the key" in check_signature(receipt, public_key=stranger)[0]
    save_receipt(receipt, read_content(receipt) | {"name": "another"})  # under a digest that fits
    assert "not one of this receipt by the key" in check_signature(receipt, public_key=public)[0]


def test_layout_of_the_file_does_not_matter_to_the_signature(receipt, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    sign_receipt(receipt, key=private)
    receipt.write_text(receipt.read_text().replace("\n", "\n\n"))
    assert check_signature(receipt, public_key=public) == []


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"signature": 1, "algorithm": "ed25519", "value": "?"}'])
def test_damaged_signature_is_named(receipt, tmp_path, damage):
    private, public = write_keys(tmp_path, "ours")
    sign_receipt(receipt, key=private).write_text(damage)
    (line,) = check_signature(receipt, public_key=public)
    assert "receipt.json.sig is damaged" in line


def test_what_does_not_recompute_is_not_signed(receipt, tmp_path):
    content = read_content(receipt)
    content["scores"]["paper"]["dice"]["mean"] += 0.1
    save_receipt(receipt, content)
    with pytest.raises(PolypSegError, match=r"is not signed: scores\.paper\.dice\.mean"):
        sign_receipt(receipt, key=write_keys(tmp_path, "ours")[0])
    assert not signature_path(receipt).exists()


def test_wrong_keys_are_refused_with_the_commands_that_make_one(receipt, tmp_path):
    private, public = write_keys(tmp_path, "ours")
    (tmp_path / "text.pem").write_text("no key")
    for call in (
        lambda: sign_receipt(receipt, key=public),
        lambda: sign_receipt(receipt, key=tmp_path / "text.pem"),
        lambda: check_signature(receipt, public_key=private),
    ):
        with pytest.raises(UsageError, match=r"holds no ed25519 (private|public) key .*openssl genpkey"):
            call()
    with pytest.raises(UsageError, match="cannot read the key"):
        sign_receipt(receipt, key=tmp_path / "none.pem")


def test_commands_sign_and_check_and_claim_nothing_without_a_key(receipt, tmp_path, capsys):
    private, public = write_keys(tmp_path, "ours")
    sign_receipts([tmp_path], key=private)
    check_receipts([tmp_path])
    assert "signed by" not in capsys.readouterr().out
    check_receipts([tmp_path], public_key=public)
    assert f"as computed again, signed by the key of {public}" in capsys.readouterr().out
    signature_path(receipt).unlink()
    with pytest.raises(PolypSegError, match=r"their signer stands by, first .*there is no"):
        check_receipts([tmp_path], public_key=public)
    with pytest.raises(UsageError, match="holds no ed25519 public key"):
        check_receipts([tmp_path], public_key=private)
