"""Encode pictures with CLIP.

For example:

    python -m jobs.encode --run s3://bucket/runs/first --round 1 --shard 0/4
"""

from jobs.common import stage_command

main = stage_command("encode")

if __name__ == "__main__":
    main()
