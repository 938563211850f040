"""Keep the first good images of each category.

For example:

    python -m jobs.curate --run s3://bucket/runs/first --round 1
"""

from jobs.common import stage_command

main = stage_command("curate")

if __name__ == "__main__":
    main()
