"""Download the candidates safely.

For example:

    python -m jobs.download --run s3://bucket/runs/first --round 1 --shard 0/4
"""

from jobs.common import stage_command

main = stage_command("download")

if __name__ == "__main__":
    main()
