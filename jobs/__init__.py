"""Entrypoints: one file per stage for containers, `jobs.cli` for people. Flags say which run, `config.yaml` how."""
