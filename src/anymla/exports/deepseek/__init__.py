"""The format `deepseek`: a stock dense DeepseekV3ForCausalLM checkpoint."""
