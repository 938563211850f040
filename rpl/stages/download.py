"""Stage `download`: the candidates of this shard's categories, fetched. The walk is in `rpl.download`."""

from __future__ import annotations

import pyarrow.parquet as pq

from rpl import download
from rpl.fetch import Fetcher
from rpl.stage import Context
from rpl.tars import write_tar
from rpl.waves import WaveDownloader


def run(ctx: Context) -> None:
    candidates = pq.read_table(ctx.input_file("candidates", "candidates.parquet"))
    candidates = download.shard_of(candidates, ctx.shard.index, ctx.shard.count)
    settings, kept = ctx.config.download, ctx.config.rounds.kept
    target = round((kept.novel if ctx.node.round == "novel" else kept.base) * settings.margin)
    addresses = len(set(candidates["url"].to_pylist()))
    spool = ctx.scratch / "spool"
    spool.mkdir()
    with (
        Fetcher(settings, ctx.config.runtime.resolve) as fetcher,
        ctx.progress(addresses, "addresses") as progress,
        WaveDownloader(fetcher, settings, ctx.config.runtime.threads, spool, progress.update) as judge,
    ):
        walked = download.walk(download.by_category(candidates), target, judge)
        progress.update(addresses - len(walked.verdicts))  # those that nobody needs
        table = download.record(candidates, walked)
        write_tar(ctx.scratch / "images.tar", download.samples(table, judge.read))
    pq.write_table(table, ctx.scratch / "downloads.parquet", compression="zstd")
    ctx.add(ctx.scratch / "downloads.parquet")
    ctx.add(ctx.scratch / "images.tar")
    ctx.rows = table.num_rows
    ctx.facts = download.facts(table)
