"""Stage `report`: the page and the summary of a finished run. What they hold and how they look is in `rpl.report`."""

from __future__ import annotations

from rpl.report.collect import collect, read_attribution
from rpl.report.page import render
from rpl.report.summary import summarise
from rpl.stage import Context


def run(ctx: Context) -> None:
    data = collect(ctx.inputs, ctx.local, ctx.config, read_attribution(ctx.config))
    ctx.write("index.html", render(data).encode())
    ctx.write_json("summary.json", summarise(data))
    ctx.rows = len(data.sheets)
    ctx.facts = {"rounds": len(data.rounds), "pictures": sum(len(sheet.pictures) for sheet in data.sheets)}
