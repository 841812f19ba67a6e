"""What pretend_runs.py runs on a pretended GPU, and test_devices.py asks for."""

from __future__ import annotations

from typing import Any

RUN = {"calibration_tokens": 256, "calibration_length": 32}
FIXED = {"rope_dims": 4, "kv_rank": 16, "reconstruction_steps": 3, **RUN}
MLA = {"mla": FIXED | {"reconstruction_steps": 0}}
STEPS: dict[str, list[dict[str, Any]]] = {
    "mla": [MLA],
    "exact window": [{"mla": MLA["mla"] | {"exact_window": 4}}],
    "transform_coding": [{"transform_coding": {"kv_cache": 0.5, "exact_window": 4, "first_tokens": 2, **RUN}}],
    "kvquant": [{"kvquant": {"bits": 3, "first_tokens": 2, **RUN}}],
    "kvquant after mla": [MLA, {"kvquant": {"bits": 3, "first_tokens": 2, **RUN}}],
    "lorc": [{"lorc": {"kv_cache": 0.5}}],
    "mfa": [{"mfa": {"kv_cache": 0.5, **RUN}}],
    "shared_attention": [{"shared_attention": {"spans": [[1, 1]], **RUN}}],
    "kv_heads": [{"kv_heads": {"kv_heads": 1, "variant": "post", **RUN}}],
    "billm": [{"billm": {"block_size": 16, **RUN}}],
}
CODECS = {"int": 4, "fp8": 8, "plain": 16, "table": 3}
OFFLOADED = ("mla", "exact window", "kvquant")
SPREAD = ("shared_attention", "kvquant", "lorc")
