"""Crop objects out of the annotated images.

For example:

    python -m jobs.crop --run s3://bucket/runs/first --shard 0/4
"""

from jobs.common import stage_command

main = stage_command("crop")

if __name__ == "__main__":
    main()
