"""Find the nearest pool images.

For example:

    python -m jobs.retrieve --run s3://bucket/runs/first --round 1
"""

from jobs.common import stage_command

main = stage_command("retrieve")

if __name__ == "__main__":
    main()
