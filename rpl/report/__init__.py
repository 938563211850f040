"""The report of a run: one HTML page that a person reads, `summary.json` for programs, a table for the terminal.

`model` says what a report holds, `collect` gathers it from manifests and files, `page` and `charts` draw it,
`summary` boils it down. Drawing and boiling down are pure functions of the model.
"""
