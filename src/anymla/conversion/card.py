"""The model card of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}


def model_card(report: Mapping[str, Any], source: str, auto: str) -> str:
    """README.md of the output folder: what it is, how it was made, what was measured.

    ``report`` is conversion.json; ``auto`` names the Auto class that loads the model.
    """
    before, after, recipe = report["before"], report["after"], report["recipe"]
    base = f"base_model: {source}\n" if source.count("/") == 1 and not source.startswith((".", "/", "~")) else ""
    kept = after["cache_bytes_per_token"] / before["cache_bytes_per_token"]
    rows = "\n".join(
        f"| {name} | {scores['perplexity']:.4g} | {scores['kl']:.4g} | {scores['top1_agreement']:.1%} "
        f"| {scores['cache_bytes_per_token']:g} |"
        for name, scores in (("original", before), ("converted", after))
    )
    return f"""---
library_name: transformers
pipeline_tag: {TASKS[auto]}
tags: [anymla, multi-head-latent-attention, kv-cache]
{base}---

# {source} with multi-head latent attention, {kept:.2%} of the KV cache

Converted by anymla {report["anymla_version"]} with
`--kv-cache {recipe["kv_cache"]:g} --rope {recipe["rope"]} --factorization {recipe["factorization"]}`.
All settings are in `recipe.yaml`, every layer's sizes in `plan.yaml`. The original's licence and limits apply.

On {after["tokens"]:,} held-out tokens of calibration text:

| | perplexity | KL to the original | top-1 agreement | cache bytes per token |
|---|---:|---:|---:|---:|
{rows}

Calibration text: {recipe["calibration"] or "the stories bundled with anymla"}. The cache is measured from its tensors.

```python
import anymla  # or: trust_remote_code=True below
from transformers import {auto}

model = {auto}.from_pretrained("THIS_FOLDER")
```
"""
