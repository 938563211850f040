"""Work that the previous run did alike: its committed files are copied, not made again.

A digest covers all that a shard's outputs depend on, so a manifest under the very same digest answers the very same
work, whichever run it stands in. The copies belong to the new run alone: the previous one may be deleted afterwards.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace

from rpl.errors import BadInput
from rpl.manifests import File, Manifest, Outcome, Shard, Work, commit, manifest_path
from rpl.rounds import Node
from rpl.store import Store, open_store


def adopt(
    previous_uri: str | None, store: Store, node: Node, shard: Shard, work: Work, *, commits: bool = True
) -> Outcome | None:
    """Commit to `store` copies of what the run at `previous_uri` holds for `work`; None where it holds nothing, or no
    longer does.

    `commits`: false for a process that only helps another one, and has nothing to do where that one adopts.

    Raises:
        TryAgain: a store failed in a way that may pass.
    """
    if previous_uri is None:
        return None
    started = time.monotonic()
    attempt = secrets.token_hex(8)
    try:
        previous = open_store(previous_uri)
        found = _manifest(previous, node, shard, work)
        if found is None:
            return None
        if not commits:
            return "adopted"
        files = _copied(previous, found, store, f"{node.path}/attempts/{attempt}")
    except BadInput:
        return None  # it vanished, or was spoilt: the work can be done all the same
    # What the work took and what it was done with stays as it was; the time is this run's.
    wall_s = round(time.monotonic() - started, 3)
    adopted = replace(found, attempt=attempt, files=files, wall_s=wall_s, adopted_from=previous_uri)
    return "adopted" if commit(store, node, shard, adopted) else "done by another"


def _manifest(previous: Store, node: Node, shard: Shard, work: Work) -> Manifest | None:
    path = manifest_path(node, shard, work.digest)
    if previous.stat(path) is None:
        return None
    found = Manifest.from_json(previous.read(path), f"{previous.uri}/{path}")
    return found if found.digest == work.digest else None  # names hold the first digits alone


def _copied(previous: Store, found: Manifest, store: Store, folder: str) -> dict[str, File]:
    """The manifest's files under `folder` of `store`, or, where one cannot be had, none and the refusal."""
    files: dict[str, File] = {}
    try:
        for name, file in found.files.items():
            files[name] = replace(file, path=f"{folder}/{name}")
            store.copy_from(previous, file.path, files[name].path)
            info = store.stat(files[name].path)
            if info is None or info.size != file.size:
                raise BadInput(f"{previous.uri}/{file.path}: is not the file that was committed; run its stage again.")
    except Exception:
        store.delete([file.path for file in files.values()])
        raise
    return files
