"""How prompts reach the base model: `plan` decides, `run` does it."""
