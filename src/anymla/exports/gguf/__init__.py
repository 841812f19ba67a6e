"""The format `gguf`: one file of llama.cpp's arch deepseek2, and the check in llama.cpp."""
