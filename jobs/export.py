"""Write the hand-over files.

For example:

    python -m jobs.export --run s3://bucket/runs/first
"""

from jobs.common import stage_command

main = stage_command("export")

if __name__ == "__main__":
    main()
