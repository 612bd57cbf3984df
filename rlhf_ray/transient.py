"""Tell errors that may pass by waiting (a connection, a timeout, an overload) from those that any further attempt repeats.

Invariants: a status of HTTP decides wherever an error or one of its causes carries one; a certificate that is refused stays
refused; an error that was raised because of another may pass if that one may. What nothing marks as passing does not pass.
"""

from __future__ import annotations

import errno
import re
import ssl
import subprocess
from collections.abc import Iterator

PASSING_STATUSES = frozenset({408, 425, 429})
LASTING_STATUSES = frozenset({501, 505})
"""Of the server's errors those that mean: never."""
_PASSING_NUMBERS = frozenset({
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.ENETDOWN,
    errno.ENETRESET, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS,
})  # fmt: skip
_PASSING_NAMES = re.compile(
    r"Connect|Timeout|TimedOut|Disconnect|Network(?!X)|Transport|RemoteProtocol|ChunkedEncoding|IncompleteRead|BadStatusLine|"
    r"Unavailable|RateLimit|TooManyRequests|Throttl|Overload|SSLEOF|SSLZeroReturn|gaierror"
)
"""Clients of HTTP that derive their errors from nothing known say it in the names of their classes."""
_LASTING_NAMES = re.compile(r"UnsupportedProtocol|LocalProtocol|InvalidURL")
_LASTING = (ssl.SSLCertVerificationError, subprocess.TimeoutExpired)
_LONGEST_CHAIN = 20


def status_may_pass(status: int) -> bool:
    """Whether a later attempt may not get this status of HTTP."""
    return status in PASSING_STATUSES or (500 <= status < 600 and status not in LASTING_STATUSES)


def may_pass(error: BaseException) -> bool:
    """Whether a later attempt may not end in this error."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(may_pass, error.exceptions))
    chain = list(_chain(error))
    if any(isinstance(one, _LASTING) or any(map(_LASTING_NAMES.search, _names(one))) for one in chain):
        return False
    status = next((status for one in chain if (status := _status(one)) is not None), None)
    if status is not None:
        return status_may_pass(status)
    return any(_passes_alone(one) for one in chain)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised because of; ``URLError`` and its like keep that as ``reason``."""
    one: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if one is None:
            return
        yield one
        reason = getattr(one, "reason", None)
        if isinstance(reason, BaseException):
            yield reason
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _passes_alone(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_NUMBERS:
        return True
    return any(map(_PASSING_NAMES.search, _names(error)))


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error carries, as urllib, requests, httpx, aiohttp and the clients made with them keep it."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600:
                return value
    return None
