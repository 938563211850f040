"""Check the pool and index it.

For example:

    python -m jobs.index --run s3://bucket/runs/first
"""

from jobs.common import stage_command

main = stage_command("index")

if __name__ == "__main__":
    main()
