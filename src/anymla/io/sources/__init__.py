"""Sources that are not plain folders of safetensors: GGUF files, quantised checkpoints, adapters.

Each is read tensor by tensor into an ordinary folder, which is removed in the end (plain.py). What comes after knows
plain folders alone.
"""
