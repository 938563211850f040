"""Learn the prompt's context vectors.

For example:

    python -m jobs.learn --run s3://bucket/runs/first --round 1
"""

from jobs.common import stage_command

main = stage_command("learn")

if __name__ == "__main__":
    main()
