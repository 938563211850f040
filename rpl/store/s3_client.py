"""boto3 clients for the S3 stores of this process, and what their failures mean in sentences.

Knows nothing of objects. Settings come from the usual AWS variables and files (AWS_ENDPOINT_URL, AWS_REGION,
AWS_PROFILE, keys, ...).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import boto3
from botocore import exceptions as aws
from botocore.config import Config
from botocore.parsers import ResponseParserError

from rpl.errors import BadInput, RplError, TryAgain

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# A stage has 10 s to leave after SIGTERM; botocore's own 60 s and five tries would outlast it.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10
TRIES = 3


class Clients(NamedTuple):
    """Two clients of one server: `usual` retries by itself, `once` does not."""

    usual: S3Client
    once: S3Client
    endpoint: str
    is_aws: bool


_clients: dict[tuple[str | None, ...], Clients] = {}
_lock = threading.Lock()
# A process forked while another thread holds the lock would inherit one that nobody releases.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

_SETTINGS = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE",
)  # fmt: skip


def clients(uri: str) -> Clients:
    """The clients for today's environment. Safe in threads; one pair per process, since sockets outlive no fork.

    Raises:
        BadInput: the environment's settings cannot be used.
    """
    key = (str(os.getpid()), *(os.environ.get(name) for name in _SETTINGS))
    with _lock:
        if key not in _clients:
            try:
                _clients[key] = _make()
            except (aws.BotoCoreError, ValueError) as error:
                raise _bad_settings(uri, error) from error
        return _clients[key]


def _make() -> Clients:
    # botocore knows AWS_DEFAULT_REGION alone; every other SDK reads AWS_REGION first.
    session = boto3.Session(region_name=os.environ.get("AWS_REGION") or None)
    region = session.region_name or "us-east-1"
    custom = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None

    def make(tries: int) -> S3Client:
        config: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": tries},
            "max_pool_connections": 32,
        }
        return session.client("s3", region_name=region, config=Config(**config, **_dialect(custom is not None)))

    usual = make(TRIES)
    # A profile may name an endpoint too, so look at what came out rather than at the variables.
    is_aws = usual.meta.endpoint_url.split("://", 1)[1].split("/")[0].endswith((".amazonaws.com", ".amazonaws.com.cn"))
    if not is_aws and custom is None:
        custom = usual.meta.endpoint_url
        usual = make(TRIES)
    return Clients(usual, make(1), usual.meta.endpoint_url, is_aws)


def _dialect(custom: bool) -> dict[str, Any]:
    """What other vendors' servers need: the bucket in the path, and no checksums that they do not know."""
    if not custom:
        return {}
    return {
        "s3": {"addressing_style": "path"},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }


NOT_ALLOWED = "these keys are not allowed to do that; give them read, write, list and delete on the bucket"
_KEYS = "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile"
_BAD_KEYS = {
    "InvalidAccessKeyId": f"the server does not know this key id; {_KEYS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the key id; {_KEYS}",
    "InvalidToken": "the session token is not valid; set fresh keys",
    "ExpiredToken": "the session token has expired; set fresh keys",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the server's; set the clock",
    "AccessDenied": NOT_ALLOWED,
    "403": NOT_ALLOWED,  # of a HEAD, which has no body to name a code in
    "AllAccessDisabled": "the bucket is closed; choose another",
}
_NO_KEYS = (
    aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError, aws.TokenRetrievalError,
    aws.SSOTokenLoadError, aws.UnauthorizedSSOTokenError,
)  # fmt: skip
_BROKEN_CONNECTION = (aws.HTTPClientError, aws.ConnectionError, aws.ResponseStreamingError, aws.IncompleteReadError)


@contextmanager
def explained(uri: str, endpoint: str) -> Iterator[None]:
    """Turn what boto3 raises about `uri` into BadInput or TryAgain."""
    try:
        yield
    except RplError:
        raise
    except aws.ClientError as error:
        raise client_error(error, uri, endpoint) from error
    except _NO_KEYS as error:
        raise BadInput(
            f"{uri}: no S3 keys were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        ) from error
    except aws.SSLError as error:
        raise BadInput(
            f"{uri}: the certificate of {endpoint} is not trusted; set AWS_CA_BUNDLE to the authority's file."
        ) from error
    except _BROKEN_CONNECTION as error:
        raise TryAgain(
            f"{uri}: {endpoint} does not answer ({type(error).__name__}); "
            "check AWS_ENDPOINT_URL and that the server runs, then try again."
        ) from error
    except (ResponseParserError, KeyError) as error:  # KeyError: a field is missing that every S3 server sends
        raise BadInput(f"{uri}: {endpoint} does not answer as an S3 server does; correct AWS_ENDPOINT_URL.") from error
    except aws.FlexibleChecksumError as error:
        raise TryAgain(f"{uri}: arrived with other bytes than {endpoint} has; try again.") from error
    except aws.BotoCoreError as error:
        raise _bad_settings(uri, error) from error


def _bad_settings(uri: str, error: Exception) -> BadInput:
    words = " ".join(str(error).split()).rstrip(".")
    return BadInput(f"{uri}: the S3 settings cannot be used ({words}); correct them.")


def client_error(error: aws.ClientError, uri: str, endpoint: str) -> RplError:
    """The sentence for a server's refusal."""
    code, status = error_code(error), http_status(error)
    if code in ("NoSuchKey", "NotFound", "404"):
        return BadInput(f"{uri}: does not exist; correct the path.")
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").split("/")[0]
        return BadInput(f"{uri}: there is no bucket {bucket!r} at {endpoint}; create it or correct the URI.")
    if code in _BAD_KEYS:
        return BadInput(f"{uri}: {_BAD_KEYS[code]}.")
    if is_transient(error):
        return TryAgain(f"{uri}: {endpoint} answered {code} (HTTP {status}); try again.")
    words = str(error.response.get("Error", {}).get("Message", "")).strip().rstrip(".")
    return BadInput(f"{uri}: {endpoint} refused with {code} (HTTP {status}){': ' + words if words else ''}; mend that.")


def is_transient(error: aws.ClientError) -> bool:
    """Whether the same request may be answered otherwise later."""
    slow = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests", "OperationAborted")
    return http_status(error) >= 500 or http_status(error) in (408, 409, 429) or error_code(error) in slow


def error_code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def http_status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
