"""The scoring service: reward models behind HTTP, in the protocols that other frameworks speak."""
