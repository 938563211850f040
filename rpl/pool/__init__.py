"""Pools: vectors with a URL and a caption for each row, in every public layout.

`layouts` finds the files and pairs them, `vectors` and `metadata` read one file each, `pool` joins them and checks.
Knows nothing of queries or indexes.
"""

from rpl.pool.pool import ROWS_PER_BLOCK, Pool, PoolShard, open_pool, pool_from_json

__all__ = ["ROWS_PER_BLOCK", "Pool", "PoolShard", "open_pool", "pool_from_json"]
