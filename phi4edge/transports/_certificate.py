"""A certificate that this machine signs for itself, for an hour's measurement over https.

A browser gives a page threads only where the page is safe from others: on localhost, or over https. The certificate is
made anew each time and its key lies in a folder of its own until the end, readable by its owner alone.
"""

from __future__ import annotations

__all__ = ["certify"]

import datetime
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

from phi4edge.core.errors import MissingToolError

_DAYS = 2


def certify(folder: Path, names: Sequence[str]) -> tuple[ssl.SSLContext, str]:
    """A server's TLS context for the addresses ``names``, and the certificate's SHA-256 as browsers show it.

    Raises:
        MissingToolError: the package ``cryptography`` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise MissingToolError(
            "--tls needs the package cryptography, which makes the certificate", "pip install 'phi4edge[browser]'"
        ) from error

    def subject(each: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(each))
        except ValueError:
            return x509.DNSName(each)

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "phi4edge measurement")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # a phone's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName(map(subject, names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(path)
    return context, certificate.fingerprint(hashes.SHA256()).hex(":").upper()
