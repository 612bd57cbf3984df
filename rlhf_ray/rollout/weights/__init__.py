"""What travels to the engines in the place of all weights, how long an update may take, and how vLLM takes an adapter."""
