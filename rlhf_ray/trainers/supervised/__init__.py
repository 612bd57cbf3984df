"""Training on examples that exist before the run: supervised fine-tuning and reward models."""
