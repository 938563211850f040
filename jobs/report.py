"""Write the report.

For example:

    python -m jobs.report --run s3://bucket/runs/first
"""

from jobs.common import stage_command

main = stage_command("report")

if __name__ == "__main__":
    main()
