"""The format `vllm`: the family's own model, with code that vLLM's transformers backend serves; and the check in vLLM."""
