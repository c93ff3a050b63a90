"""Parameter trees, configs and Orbax checkpoints of DeepMind's `gemma` package."""
