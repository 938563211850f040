"""The stage contract: what is asked, whether it is done, and how its outputs become visible at once.

    digest of (stage version, config slice, inputs' contents, outside files) ─► a manifest of that name?  yes: return
    else: run the stage's function, upload its files under attempts/ATTEMPT/, then one conditional put of the manifest

Promise: a reader sees either no manifest or one whose files are all there, complete, and never change. Killed
anywhere, nothing is visible, and shards that were committed before are found and not run again. Of two attempts at
once, the first to put its manifest wins; the other deletes its files and returns as if the work had been done.

Knows nothing of what a stage computes: `rpl.stages` holds those functions. Digests follow `rpl.rounds`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rpl
from rpl.adoption import adopt
from rpl.config import RunConfig, parse_config
from rpl.errors import BadInput, TryAgain
from rpl.manifests import (
    File,
    Manifest,
    Outcome,
    Shard,
    Work,
    base_accuracy,
    checkpoints_path,
    commit,
    digest_of,
    manifest_path,
)
from rpl.memory import peak_memory_bytes
from rpl.outside import fingerprint, outside_files, sha256_file
from rpl.progress import Progress, Reporter
from rpl.rounds import STAGES, Node, edges, goes_on, shard_key, sources
from rpl.store import Store, open_store

CONFIG = "config.yaml"
"""The settings of a run, frozen at its start; where it lies, there is a run."""


def run_exists(uri: str) -> bool:
    """Whether a run was begun at `uri`."""
    return open_store(uri).stat(CONFIG) is not None


class Run:
    """A run in a store: its frozen configuration and what has been committed."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.store: Store = open_store(uri)
        if self.store.stat(CONFIG) is None:
            raise BadInput(f"{uri}: holds no run ({CONFIG} is missing); start one with `rpl run --config FILE`.")
        self.config: RunConfig = parse_config(self.store.read(CONFIG).decode(), f"{uri}/{CONFIG}")
        self._found: dict[str, Manifest] = {}
        # Digests reach back to the first stage, over several paths; each is taken once. A run's inputs from outside
        # are looked at once per Run: open a new one to notice that they changed.
        self._work: dict[tuple[Node, Shard], Work] = {}
        self._cache = _FileCache(self.store)

    def shard_count(self, node: Node) -> int:
        key = shard_key(node)
        return 1 if key is None else int(getattr(self.config.shards, key))

    def shards(self, node: Node) -> list[Shard]:
        count = self.shard_count(node)
        return [Shard(index, count) for index in range(count)]

    def manifest(self, node: Node, shard: Shard) -> Manifest | None:
        """The committed manifest that answers today's inputs and settings; None if it, or an input's, is not there."""
        try:
            work = self._expected(node, shard)
        except _NotReady:
            return None
        return self._lookup(node, shard, work.digest)

    def manifests(self, node: Node) -> list[Manifest] | None:
        """All shards' manifests in order, or None while one is missing."""
        found = [self.manifest(node, shard) for shard in self.shards(node)]
        return None if None in found else [manifest for manifest in found if manifest is not None]

    def embedded_rounds(self) -> Iterator[Manifest]:
        """The manifest of `embed`, with its accuracies, of each round from 1 on, up to the first that has none."""
        for number in itertools.count(1):
            embedded = self.manifests(Node("embed", number))
            if embedded is None:
                return
            yield embedded[0]

    def last_round(self) -> int | None:
        """The number of rounds this run takes, once known: None while a round is still to be run."""
        accuracies: list[float | None] = []
        rounds = self.config.rounds
        for number, embedded in enumerate(self.embedded_rounds(), start=1):
            if self.manifests(Node("curate", number)) is None:
                return None
            accuracies.append(base_accuracy(embedded))
            if not goes_on(accuracies, rounds.max_rounds, rounds.min_gain):
                return number
        return None

    def expected(self, node: Node, shard: Shard) -> Work:
        """The work that `node`'s `shard` is today.

        Raises:
            BadInput: an input is not there yet; the sentence names the command that makes it.
        """
        try:
            return self._expected(node, shard)
        except _NotReady as error:
            option = f" --round {error.node.round}" if error.node.round is not None else ""
            raise BadInput(
                f"{self.uri}: {node.path} reads {error.node.path}, which is not finished; "
                f"run `python -m jobs.{error.node.stage} --run {self.uri}{option}` first."
            ) from None

    def _inputs(self, node: Node, shard: Shard) -> dict[str, list[Manifest]]:
        found: dict[str, list[Manifest]] = {}
        wanted = edges(node)
        last = 0
        if any(edge.at in ("rounds", "novel") for edge in wanted):
            known = self.last_round()
            if known is None:
                raise _NotReady(self._first_open_round_node())
            last = known
        for edge in wanted:
            found[edge.name] = []
            for source in sources(node, edge, last):
                for part in [shard] if edge.by_shard else self.shards(source):
                    manifest = self.manifest(source, part)
                    if manifest is None:
                        raise _NotReady(source)
                    found[edge.name].append(manifest)
        return found

    def _first_open_round_node(self) -> Node:
        number = 1
        while True:
            for stage in ("embed", "curate"):
                if self.manifests(Node(stage, number)) is None:
                    return Node(stage, number)
            number += 1

    def _expected(self, node: Node, shard: Shard) -> Work:
        key = (node, shard)
        if key in self._work:
            return self._work[key]
        inputs = self._inputs(node, shard)
        stage = STAGES[node.stage]
        outside = {uri: fingerprint(uri) for uri in outside_files(node, self.config)}
        digest = digest_of(
            {
                "node": node.path,
                "shard": str(shard),
                "version": stage.version,
                "settings": self.config.settings(stage.sections),
                "inputs": {name: [m.contents for m in manifests] for name, manifests in inputs.items()},
                "outside": outside,
            }
        )
        self._work[key] = Work(digest, inputs, outside)
        return self._work[key]

    def _lookup(self, node: Node, shard: Shard, digest: str) -> Manifest | None:
        path = manifest_path(node, shard, digest)
        if path not in self._found:
            if self.store.stat(path) is None:
                return None
            self._found[path] = Manifest.from_json(self.store.read(path), f"{self.uri}/{path}")
        return self._found[path]

    def local(self, file: File) -> Path:
        """A local, verified, read-only copy of a committed file (the file itself in a `file://` run)."""
        return self._cache.get(file)

    def close(self) -> None:
        self._cache.close()


class Context:
    """What a stage's function is handed: settings, inputs as local files, a place for outputs, progress."""

    def __init__(
        self, run: Run, node: Node, shard: Shard, *, work: Work, attempt: str, scratch: Path, reporter: Reporter,
        commits: bool,
    ) -> None:  # fmt: skip
        self.run = run
        self.config = run.config
        self.node = node
        self.shard = shard
        self.inputs: Mapping[str, list[Manifest]] = work.inputs
        self.scratch = scratch
        self.files: dict[str, File] = {}
        self.rows = 0
        self.facts: dict[str, Any] = {}
        self._attempt = attempt
        self._reporter = reporter
        self._commits = commits
        self._checkpoints = checkpoints_path(node, shard, work.digest)

    def input_file(self, edge: str, name: str) -> Path:
        """Local copy of file `name` of the one manifest under `edge`."""
        (manifest,) = self.inputs[edge]
        return self.run.local(manifest.files[name])

    def input_files(self, edge: str, name: str) -> list[Path]:
        """Local copies of file `name` of every manifest under `edge` that has it, in shard and round order."""
        return [self.run.local(m.files[name]) for m in self.inputs[edge] if name in m.files]

    def local(self, manifest: Manifest, name: str) -> Path:
        return self.run.local(manifest.files[name])

    def add(self, path: Path, name: str | None = None) -> None:
        """Upload a finished local file of `scratch` as output `name` (its own name by default)."""
        name = name or path.name
        target = f"{self.node.path}/attempts/{self._attempt}/{name}"
        size, sha256 = path.stat().st_size, sha256_file(path)
        if self._commits:
            self.run.store.upload(target, path)
        self.files[name] = File(target, size, sha256)

    def write(self, name: str, data: bytes) -> None:
        """Upload `data` as output `name`."""
        target = f"{self.node.path}/attempts/{self._attempt}/{name}"
        if self._commits:
            self.run.store.write(target, data)
        self.files[name] = File(target, len(data), hashlib.sha256(data).hexdigest())

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False).encode())

    def checkpoints(self) -> dict[str, bytes]:
        """What earlier, unfinished attempts at the same work saved, by name; empty where none was."""
        prefix = f"{self._checkpoints}/"
        store = self.run.store
        found = {}
        for info in store.list(prefix):
            try:
                found[info.path.removeprefix(prefix)] = store.read(info.path)
            except BadInput:
                if store.stat(info.path) is not None:
                    raise  # else another attempt has just committed, and cleared them away
        return found

    def save_checkpoint(self, name: str, data: bytes) -> None:
        """Keep `data` for the next attempt, should this one not finish; no output, and gone once there is one."""
        if self._commits:
            self.run.store.write(f"{self._checkpoints}/{name}", data)

    def progress(self, total: int | None, unit: str) -> Progress:
        """A progress line for `total` items; use it as `with ctx.progress(...) as p: p.update(n)`."""
        return self._reporter.stage(str(self.node), total, unit)


def run_shard(run: Run, node: Node, shard: Shard, reporter: Reporter, *, commits: bool = True) -> Outcome:
    """Do one shard of a stage, or find that it is done, here or in the previous run.

    `commits`: false for a process that only helps another one with the same work, and writes nothing.

    Raises:
        BadInput: an input is missing or wrong; nothing was written.
        TryAgain: the store or this machine failed in a way that may pass.
    """
    work = run.expected(node, shard)
    if run.manifest(node, shard) is not None:
        return "already done"
    adopted = adopt(run.config.previous, run.store, node, shard, work, commits=commits)
    if adopted is not None:
        return adopted
    function = importlib.import_module(f"rpl.stages.{node.stage}").run
    attempt = secrets.token_hex(8)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rpl-") as scratch:
        context = Context(
            run, node, shard, work=work, attempt=attempt, scratch=Path(scratch), reporter=reporter, commits=commits
        )
        try:
            function(context)
        except Exception as error:
            run.store.delete([file.path for file in context.files.values()])
            full = _full_disk(error)
            if full is None:
                raise
            raise full from error
    if not commits:
        return "done by another"
    manifest = Manifest(
        stage=node.stage, round=node.round, shard=str(shard), digest=work.digest, attempt=attempt,
        files=context.files, rows=context.rows, facts=context.facts,
        inputs={name: [m.contents for m in manifests] for name, manifests in work.inputs.items()}, outside=work.outside,
        wall_s=round(time.monotonic() - started, 3), peak_memory_bytes=peak_memory_bytes(), versions=_versions(),
    )  # fmt: skip
    return "done" if commit(run.store, node, shard, manifest) else "done by another"


_MANIFEST = re.compile(r"/\d+-of-\d+\.[0-9a-f]{16}\.json$")


def collect_garbage(run: Run, older_than_s: float) -> list[str]:
    """Delete files of attempts that no manifest names and whose newest file is older than `older_than_s`; their paths.

    An attempt still under way has a recent file, or none yet; choose an age beyond the longest stage.
    """
    named: set[str] = set()
    attempts: dict[str, list[tuple[str, float]]] = {}
    for info in run.store.list():
        if "attempts" in info.path.split("/"):
            attempts.setdefault(_attempt_folder(info.path), []).append((info.path, info.modified))
        elif _MANIFEST.search(info.path):
            manifest = Manifest.from_json(run.store.read(info.path), f"{run.uri}/{info.path}")
            named.update(_attempt_folder(f.path) for f in manifest.files.values())
    limit = time.time() - older_than_s
    doomed = [
        path
        for folder, files in attempts.items()
        if folder not in named and max(modified for _, modified in files) < limit
        for path, _ in files
    ]
    run.store.delete(doomed)
    return [*doomed, *run.store.discard_unfinished(older_than_s)]


class _NotReady(Exception):
    """An input's node has no manifest yet."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.path)
        self.node = node


class _FileCache:
    """Local copies of committed files for the life of a process, by content."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder: Path | None = None

    def get(self, file: File) -> Path:
        path = self._store.local(file.path)
        if path is not None:
            if not path.is_file() or path.stat().st_size != file.size:
                raise BadInput(
                    f"{path}: is not the file that was committed; delete the manifest that names it to make it again."
                )
            return path
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="rpl-inputs-"))
        target = self._folder / file.sha256 / Path(file.path).name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            self._store.download(file.path, partial)
            if sha256_file(partial) != file.sha256:
                partial.unlink()
                raise TryAgain(f"{file.path}: arrived with other bytes than were committed; try again.")
            partial.rename(target)
        return target

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _attempt_folder(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[: parts.index("attempts") + 2])


def _versions() -> dict[str, str]:
    names: Iterable[str] = ("torch", "open_clip_torch", "faiss-cpu", "faiss-gpu", "numpy", "img2dataset", "pillow")
    found = {"rpl": rpl.__version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not every image holds every library
    return found


def _full_disk(error: Exception) -> TryAgain | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or os.environ.get("TMPDIR", tempfile.gettempdir())
        return TryAgain(f"{where}: the disk is full; free space or set TMPDIR to a larger disk, then run it again.")
    return None
