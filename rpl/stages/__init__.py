"""The functions that stages run: each reads its inputs through a Context, calls the domain, writes its outputs."""
