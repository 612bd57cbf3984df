"""What a vLLM engine says about its choices, besides the tokens."""
