"""Learn the prompt's context vectors.

For example:

    python -m jobs.learn --run s3://bucket/runs/first --round 1

With four GPUs, each doing its share of every pass (`--` keeps torchrun from taking --run for an option of its own):

    torchrun --standalone --nproc-per-node 4 -m -- jobs.learn --run s3://bucket/runs/first --round 1
"""

from jobs.common import stage_command

main = stage_command("learn")

if __name__ == "__main__":
    main()
