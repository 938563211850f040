"""Embed the categories and measure accuracy.

For example:

    python -m jobs.embed --run s3://bucket/runs/first --round 1
"""

from jobs.common import stage_command

main = stage_command("embed")

if __name__ == "__main__":
    main()
