"""A server with its own certificate: it comes up fenced, and takes a push from a sender that knows the certificate."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import time
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8BlockConfig, FP8Sender
from shared import errors
from shared.launch import sglang_fp8_args
from tests.server_fixtures import CHANGES


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fp8sync test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return certificate_file, key_file


def wait_until_up(server: LocalServer) -> None:
    deadline = time.monotonic() + 120.0
    while "fired up and ready" not in server.log.read_text():
        assert server.process.poll() is None and time.monotonic() < deadline, server.log_end()
        time.sleep(0.2)


@pytest.mark.server
def test_a_push_over_https(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    fp8 = sglang_fp8_args(str(write_config(tmp_path / "no_weights", **CHANGES)), FP8BlockConfig())
    tls = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    model = make_model(3, **CHANGES)
    with LocalServer([*fp8, *CPU_ARGS, *tls], tmp_path / "tls.log") as server:
        wait_until_up(server)
        url = server.url.replace("http://", "https://")
        with FP8Sender([url]) as stranger, pytest.raises(errors.ServerUnreachableError, match=r"(?i)certificate"):
            stranger.push(model)
        with FP8Sender([url], ca_file=str(certificate)) as sender:
            assert sender.push(model).version == 1
        context = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.post(f"{url}/generate", json={"input_ids": [1, 2, 3]}, verify=context, timeout=60.0)
        assert answer.status_code == 200 and answer.json()["meta_info"]["weight_version"] == "1"
