"""The forward pass of a model over packs: many sequences laid end to end in one row of tokens, without padding."""
