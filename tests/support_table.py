"""Makes docs/families.md: ``python -m tests.support_table`` runs every family, prints the count and the refusals."""

from __future__ import annotations

import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from anymla.architectures.families import FAMILIES, REFUSED, TEXT_ONLY_INSIDE
from anymla.architectures.vision import VISION
from tests.family_check import TOLERANCE, Row, check_family
from tests.family_models import VARIANTS

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
KINDS = """\
| what a family does | for example |
|---|---|
| MHA, GQA, MQA; fused or separate projections, biases | Llama, Mistral, Qwen2, Phi-3, GPT-2, GPT-NeoX, Falcon, StarCoder2 |
| norms on queries, keys, values (per head, over the width, after rope) | Qwen3, OLMo 2, Cohere, Gemma 3, Hunyuan, Llama 4 |
| partial, interleaved, scaled rope, or none in some layers | GLM-4, Phi, GPT-J, SmolLM3, Cohere 2, EXAONE 4 |
| ALiBi, learned positions | BLOOM, MPT, Falcon-RW, OPT, GPT-2 |
| soft-caps, sinks, clipped QKV, gates, query temperature | Gemma 2, gpt-oss, OLMo, DBRX, Qwen3-Next, Llama 4, Ministral 3 |
| mixtures of experts | Mixtral, Qwen3-MoE, gpt-oss, OLMoE, GLM-4.5, DBRX |
| hybrids: softmax attention is converted, the other layers are kept | Jamba, Bamba, Qwen3-Next, Granite 4, Falcon-H1, LFM2, Nemotron-H |
| [vision-language models](vision.md), M-RoPE included | LLaVA, Qwen2.5-VL, Qwen3-VL, Gemma 3, Idefics 3, InternVL, PaliGemma |"""  # noqa: E501


def aliases() -> dict[str, str]:
    """Model types whose config calls itself by another one's name."""
    names = {name: CONFIG_MAPPING[name].model_type for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return {name: real for name, real in names.items() if name != real and (real in FAMILIES or real in REFUSED)}


def silent() -> set[str]:
    """Model types of transformers' own list that are neither converted, nor refused, nor another name for one."""
    return {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*FAMILIES} - {*VISION} - {*REFUSED} - {*aliases()}


def line(row: Row) -> str:
    """A row of the table without what is measured, which differs a little from machine to machine."""
    return f"| {row.name} | {row.features} | {row.layers} |"


@cache
def documented() -> tuple[str, ...]:
    """The lines of the table in docs/, without the measured columns."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return tuple("|".join(each.split("|")[:4]) + "|" for each in lines if each.startswith("|"))


def page(rows: list[Row], failed: dict[str, str]) -> str:
    """The whole of docs/families.md."""
    errors = {row.name: " | ".join(f"{row.errors[dtype]:.0e}" for dtype in TOLERANCE) for row in rows}
    families = "\n".join(f"{line(row)} {errors[row.name]} |" for row in rows)
    refusals = "\n".join(f"| {name} | {reason} |" for name, reason in sorted(REFUSED.items()))
    others = ", ".join(f"{name} ({real})" for name, real in sorted(aliases().items()))
    return f"""# Families

Made by `make families` with transformers {transformers.__version__}: do not edit.

A tiny random model of each family, with that family's features switched on, is converted at full budget. The errors
are the largest differences between its logits and the original's, over a whole prompt, cached decoding and a
left-padded batch. At half the budget each one runs, saves, reloads, and caches exactly the planned numbers. For
float64, the float32 casts inside transformers' models are lifted (tests/precision.py), so only the algebra remains.

{KINDS}

Rope is of type default, linear, dynamic, yarn, llama3 or longrope. Dtypes are float32, bfloat16, float16 and float64.

{len({*FAMILIES} - TEXT_ONLY_INSIDE - {*failed})} families are converted exactly, {len(REFUSED)} are refused by name.
Layers without softmax attention (state space, linear attention, convolutions) are kept as they are.

| family | attention | layers converted | float64 error | float32 error |
|---|---|---|---:|---:|
{families}

Other names: {others}.

The text model of {len(VISION)} vision-language models is converted inside the whole one ([vision.md](vision.md),
tests/test_vision.py):

```
{textwrap.fill(", ".join(sorted(VISION)), 110)}
```

## Refused

| family | why |
|---|---|
{refusals}
"""


def main() -> int:
    """Runs all, writes the page, prints the summary; 1 where a family failed or was passed over."""
    torch.set_num_threads(1)
    rows, failed = [], {}
    cases = [(name, name, {}) for name in FAMILIES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES] + VARIANTS
    for name, model_type, changes in sorted(cases):
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = check_family(name, model_type, changes, Path(folder))
                if any(row.errors[dtype] >= tolerance for dtype, tolerance in TOLERANCE.items()):
                    raise AssertionError(f"errors {row.errors}")
                rows.append(row)
            except Exception as error:  # the run goes on and names all that failed
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        print(f"{name}: {failed.get(name, 'exact')}", flush=True)
    TABLE.write_text(page(rows, failed), encoding="utf-8")
    left = sorted(silent())
    print(f"\n{len(rows)} exact, {len(REFUSED)} refused, {len(failed)} failed, {len(left)} passed over {left}")
    for name, reason in sorted(REFUSED.items()):
        print(f"  {name}: {reason}")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
