"""RPL: training images sourced by learned prompts (PromptDet, Feng et al., ECCV 2022), as resumable batch stages."""

__version__ = "0.1.0"
