"""Stage `report`: the page and the summary of a finished run. What they hold and how they look is in `rpl.report`."""

from __future__ import annotations

from contextlib import ExitStack

from rpl.finished import previous_run
from rpl.report.collect import collect, read_attribution
from rpl.report.page import render
from rpl.report.summary import summarise
from rpl.stage import Context


def run(ctx: Context) -> None:
    with ExitStack() as after:
        previous = None
        if ctx.config.previous is not None:
            previous = previous_run(ctx.config.previous)
            after.callback(previous.close)
        data = collect(ctx.inputs, ctx.local, ctx.config, read_attribution(ctx.config), previous)
    ctx.write("index.html", render(data).encode())
    ctx.write_json("summary.json", summarise(data))
    ctx.rows = len(data.sheets)
    ctx.facts = {"rounds": len(data.rounds), "pictures": sum(len(sheet.pictures) for sheet in data.sheets)}
