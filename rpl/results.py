"""A plain copy of a run's results, for people and programs that know nothing of runs.

    DIR/summary.json   DIR/report/index.html   DIR/export/…   DIR/export/images/KEY.jpg

Written beside DIR and renamed when complete: a reader sees the old copy or the new one. Knows the names of the files
that `export` and `report` commit, and nothing of what is in them.
"""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from rpl.errors import BadInput, RplError, TryAgain
from rpl.finished import finished
from rpl.manifests import Manifest
from rpl.report.summary import summary_table
from rpl.stage import Run
from rpl.tars import read_tar

__all__ = ["fetch_results", "summary_table"]

ENTRIES = {"summary.json", "report", "export"}
"""What a copy holds at its top; a folder with anything else in it is somebody's, and is not replaced."""


def fetch_results(run: Run, directory: Path) -> dict[str, Any]:
    """Copy the results of `run` to `directory`, replacing an earlier copy; the content of summary.json.

    Those of its newest report, whatever became of the files outside and of this program since.

    Raises:
        BadInput: the run is not finished, or `directory` cannot be written or holds something else than such a copy.
        TryAgain: the disk is full. An earlier copy is still there, as after any failure.
    """
    found = finished(run)
    if found is None:
        raise BadInput(f"{run.uri}: is not finished, so it has no report; go on with `rpl run`, then fetch again.")
    exported, reported = found.inputs("export")[0], found.report
    directory = directory.resolve()
    _refuse_foreign(directory)
    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _copy(run, exported, reported, partial)
        _swap(partial, directory)
    except OSError as error:
        raise _in_a_sentence(error, directory) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_bytes())
    return summary


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise BadInput(f"{directory}: is a file; name a new folder for the results.")
    foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in ENTRIES)
    if foreign:
        raise BadInput(f"{directory}: holds {foreign[0]}, which is no result of a run; name a new or empty folder.")


def _in_a_sentence(error: OSError, directory: Path) -> RplError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TryAgain(f"{directory}: the disk is full; free space, then fetch again.")
    return BadInput(f"{directory}: cannot be written ({error.strerror}); name another place.")


def _copy(run: Run, exported: Manifest, reported: Manifest, target: Path) -> None:
    images = target / "export" / "images"
    images.mkdir(parents=True)
    (target / "report").mkdir()
    shutil.copyfile(run.local(reported.files["summary.json"]), target / "summary.json")
    shutil.copyfile(run.local(reported.files["index.html"]), target / "report" / "index.html")
    for name, file in exported.files.items():
        if name != "images.tar":  # its pictures are copied one by one, as the JSON names them
            shutil.copyfile(run.local(file), target / "export" / name)
    for key, files in read_tar(run.local(exported.files["images.tar"])):
        (images / f"{key}.jpg").write_bytes(files["jpg"])


def _swap(new: Path, directory: Path) -> None:
    """Put `new` in the place of `directory`. Two renames; killed between them, the old copy stays under `.old`."""
    old = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
