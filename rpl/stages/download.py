"""Stage `download`: the candidates of this shard's categories, fetched. The walk is in `rpl.download`.

Where the run has a previous one, its verdicts come first: `rpl.judged`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import pyarrow.parquet as pq

from rpl import download
from rpl.fetch import Fetcher
from rpl.finished import previous_run
from rpl.judged import COLUMNS, Judged, last_verdicts, standing, take_pictures
from rpl.stage import Context
from rpl.tars import write_tar
from rpl.waves import WaveDownloader


def run(ctx: Context) -> None:
    candidates = pq.read_table(ctx.input_file("candidates", "candidates.parquet"))
    candidates = download.shard_of(candidates, ctx.shard.index, ctx.shard.count)
    settings, kept = ctx.config.download, ctx.config.rounds.kept
    target = round((kept.novel if ctx.node.round == "novel" else kept.base) * settings.margin)
    addresses = set(candidates["url"].to_pylist())
    spool = ctx.scratch / "spool"
    spool.mkdir()
    with (
        Fetcher(settings, ctx.config.runtime.resolve) as fetcher,
        ctx.progress(len(addresses), "addresses") as progress,
        WaveDownloader(fetcher, settings, ctx.config.runtime.threads, spool, progress.update) as fetched,
    ):
        judged = _judged(ctx, addresses, fetched.keep)
        judge = judged.before(fetched, progress.update)
        walked = download.walk(download.by_category(candidates), target, judge)
        progress.update(len(addresses) - len(walked.verdicts))  # those that nobody needs
        table = download.record(candidates, walked)
        write_tar(ctx.scratch / "images.tar", download.samples(table, fetched.read))
    pq.write_table(table, ctx.scratch / "downloads.parquet", compression="zstd")
    ctx.add(ctx.scratch / "downloads.parquet")
    ctx.add(ctx.scratch / "images.tar")
    ctx.rows = table.num_rows
    ctx.facts = download.facts(table)
    if ctx.config.previous is not None:
        ctx.facts |= judged.facts(table)


def _judged(ctx: Context, addresses: Collection[str], keep: Callable[[str, bytes], None]) -> Judged:
    """What the previous run's downloads, in all rounds, say of `addresses`; pictures that stand go to `keep`.

    Where it downloaded with other settings, another verdict may come of each address, so none stands.

    Raises:
        BadInput: the previous run is not there any more.
    """
    if ctx.config.previous is None:
        return Judged({}, {})
    previous = previous_run(ctx.config.previous)
    manifests = [*previous.inputs("round_downloads"), *previous.inputs("novel_downloads")]
    records = [previous.local(manifest, "downloads.parquet") for manifest in manifests]
    try:
        verdicts = last_verdicts((pq.read_table(record, columns=COLUMNS) for record in records), addresses)
        if previous.run.config.download != ctx.config.download:
            return Judged(verdicts, {})
        stands = standing(verdicts)
        missing = {verdict.key for verdict in stands.values() if verdict.key is not None}
        keys = [missing.intersection(pq.read_table(record, columns=["key"])["key"].to_pylist()) for record in records]
        for manifest, there in zip(manifests, keys, strict=True):
            if wanted := there & missing:
                missing -= take_pictures(previous.local(manifest, "images.tar"), wanted, keep)
                previous.close()  # one copied tar on the disk at a time
        return Judged(verdicts, {url: verdict for url, verdict in stands.items() if verdict.key not in missing})
    finally:
        previous.close()
