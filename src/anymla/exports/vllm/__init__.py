"""The format `vllm`: the family's own model with code for vLLM's transformers backend, and the check in vLLM."""
