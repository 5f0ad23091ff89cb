"""TLS to the broker and to MLX servers: whom this process trusts, its own certificate, and why a handshake failed.

All connections use a context of `TLS.context`, which verifies the chain and the host name of the server. The texts here
show nothing but paths, names of settings and fixed texts of OpenSSL.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True, slots=True)
class TLS:
    """How a server is authenticated, and how this process authenticates itself."""

    ca: Path | None = None
    """PEM file of the only CAs that are trusted. None: those that this system trusts."""
    cert: Path | None = None
    """PEM file of the client certificate, followed by those of intermediate CAs."""
    key: Path | None = None
    """PEM file of its private key. None: it is in `cert`."""
    checks_chain: bool = True
    checks_host: bool = True

    @property
    def authenticates(self) -> bool:
        """Whether only the server that is meant is accepted."""
        return self.checks_chain and self.checks_host

    def context(self) -> ssl.SSLContext:
        """Return a new context. It reads the files: the next connection uses a certificate that was renewed.

        Raises:
            UnusableFile: a file is missing, or does not hold what it should.
        """
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            context.check_hostname = self.authenticates
            if not self.checks_chain:
                context.verify_mode = ssl.CERT_NONE
            if self.cert:
                context.load_cert_chain(self.cert, self.key, password=_refuse_passphrase)
        except (OSError, ValueError) as error:
            raise UnusableFile(getattr(error, "reason", None) or str(error)) from None
        return context


class UnusableFile(OSError):
    """The context cannot be made. The text is OpenSSL's reason; `check_content` names the file and its setting."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the settings are called in errors."""

    url: str
    ca: str
    cert: str = ""
    """Empty if there is no setting for a client certificate."""
    key: str = ""


OF_BROKER = Names("broker_url", "broker_ca", "broker_cert", "broker_key")
OF_INSTANCE = Names("base_url", "ca")


def check_file(path: Path) -> Path:
    """Return the path without `~`. Raises `ValueError` if it is not a file that this process can read."""
    path = Path(os.path.expanduser(path))
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file" if path.exists() else f"the file {path} does not exist")
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"the file {path} cannot be read: {error.strerror}") from None
    return path


def check_content(tls: TLS, names: Names) -> None:
    """Check what the files hold; `check_file` has found them.

    Raises:
        ValueError: a file does not hold what it should, or certificate and key do not belong together.
    """
    if tls.key and not tls.cert:
        raise ValueError(f"{names.key} is set, but not {names.cert}: a client certificate needs both")
    for name, path in ((names.ca, tls.ca), (names.cert, tls.cert)):
        if path and not _holds_certificate(path):
            raise ValueError(f"{name}: {path} holds no certificate that can be used; its format must be PEM")
    try:
        tls.context()
    except UnusableFile as error:
        raise ValueError(_key_fault(tls, str(error), names)) from None


def _holds_certificate(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        return False
    return True


def _key_fault(tls: TLS, reason: str, names: Names) -> str:
    if reason == "KEY_VALUES_MISMATCH":
        return f"{names.key}: {tls.key or tls.cert} does not belong to the certificate in {tls.cert} ({names.cert})"
    if reason == _ENCRYPTED:
        return f"{names.key}: {tls.key or tls.cert} {_ENCRYPTED}"
    if not tls.key:
        return f"{names.cert}: {tls.cert} holds no private key: set {names.key} to the file that does"
    return f"{names.key}: {tls.key} holds no private key that can be used; its format must be PEM"


_ENCRYPTED = "is encrypted, and nobody can be asked for its passphrase: decrypt it with openssl pkey, and chmod 600 it"


def _refuse_passphrase() -> NoReturn:
    """OpenSSL would ask on the terminal, and a node that starts by itself would wait for ever."""
    raise ValueError(_ENCRYPTED)


_EXPIRED = ("has a certificate that has expired, or whose CA has", "renew it, or set the clock of this host right")
_NOT_YET_VALID = ("has a certificate that is not valid yet", "set the clock of this host right, or wait")
_OTHER_HOST = (
    "has a certificate for another host",
    "name the host in {url} as its certificate does, or issue another one",
)
_UNKNOWN_CA = ("has a certificate of a CA that is not trusted here", "set {ca} to the certificate of that CA")
_REJECTED = {
    **dict.fromkeys((10, 12), _EXPIRED),
    **dict.fromkeys((9, 11), _NOT_YET_VALID),
    **dict.fromkeys((62, 64), _OTHER_HOST),
    **dict.fromkeys((2, 18, 19, 20, 21), _UNKNOWN_CA),
}
"""Why this side does not accept the certificate of the server, and what to do, by OpenSSL's X509_V_ERR_ codes."""

_NO_TLS = ("does not speak TLS on that port", "correct the port or the scheme of {url}")
_REFUSED = {
    "ALERT_CERTIFICATE_REQUIRED": ("asks for a client certificate", "set {cert} and {key}"),
    "ALERT_CERTIFICATE_EXPIRED": ("refuses the client certificate: it has expired", "renew the one in {cert}"),
    "ALERT_UNKNOWN_CA": (
        "refuses the client certificate: its CA is unknown there",
        "set {cert} and {key} to one of a CA that is known there, or let it know that CA",
    ),
    "CERTIFICATE": ("refuses the client certificate", "read its log, and correct {cert} and {key}"),
    "ALERT_HANDSHAKE_FAILURE": (
        "refuses the TLS handshake: perhaps it asks for a client certificate, or for another one",
        "read its log; if it asks for one, set {cert} and {key} to one for clients of a CA that it trusts",
    ),
    "PROTOCOL": ("has no version of TLS that is safe", "turn on TLS 1.2 or 1.3 there"),
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "HTTP_REQUEST": _NO_TLS,
}
"""Why the other side refuses, and what to do, by parts of OpenSSL's reasons; the first that fits counts."""
_BROKEN = (
    "broke off the TLS connection",
    "see whether it runs, and read its log: it may ask for a client certificate ({cert}, {key}) or refuse this one",
)
_UNUSABLE = ("was not asked: the certificates of this host cannot be used", "correct {ca}, {cert} and {key}")


def explain(error: BaseException, names: Names) -> tuple[str, str] | None:
    """Return what is wrong, as in "has a certificate that has expired", and what to do. None if it is not TLS."""
    for each in chain(error):
        if isinstance(each, UnusableFile | ssl.SSLError):
            fault, advice = _explain(each)
            if "{cert}" in advice and not names.cert:
                advice = "let it ask for no client certificate: there is no setting for one"
            return fault, advice.format(**asdict(names))
    return None


def _explain(error: OSError) -> tuple[str, str]:
    match error:
        case UnusableFile():
            return _UNUSABLE
        case ssl.SSLCertVerificationError():
            other = (f"has a certificate that is not accepted: {error.verify_message}", "issue another one")
            return _REJECTED.get(error.verify_code, other)
        case ssl.SSLError(reason=str(reason)):
            return next((text for part, text in _REFUSED.items() if part in reason), _BROKEN)
    return _BROKEN


def is_lasting(error: BaseException) -> bool:
    """Tell whether TLS fails until somebody corrects something, and not because a connection broke."""
    return any(_explain(each) is not _BROKEN for each in chain(error) if isinstance(each, UnusableFile | ssl.SSLError))


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and up to nine before it: libraries raise their own errors from the original one."""
    cause: BaseException | None = error
    for _ in range(10):  # it may be a circle
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__
