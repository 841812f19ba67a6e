"""Which adapters can be merged, from their configs alone."""

from __future__ import annotations

from pathlib import Path

from anymla.errors import UnsupportedModelError, shown
from anymla.io.config import read_object
from anymla.io.sources.locate import ADAPTER_CONFIG

MERGE = "merge it with peft (merge_and_unload) and give the result"
KNOWN = frozenset(  # of adapter_config.json: what is read here, and what only training asks for
    """alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config
    lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save peft_type peft_version qalora_group_size r
    rank_pattern revision target_modules task_type unsloth_fixed use_dora use_rslora velora_config""".split()  # noqa: SIM905
)
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # of init_lora_weights: they leave the base alone


def check_adapter(folder: Path) -> None:
    """Refuses, from the config alone, an adapter that is more than LoRA on weights.

    Raises:
        UnsupportedModelError: names what it is.
    """
    config = read_object(folder / ADAPTER_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{folder}: an adapter of type {shown(kind)} is not merged here, only LORA: {MERGE}"
        )
    if others := sorted(name for name, value in config.items() if name not in KNOWN and value):
        raise UnsupportedModelError(f"{folder}: LoRA with {shown(others[0])} is not merged here: {MERGE}")
    if (start := config.get("init_lora_weights")) not in STARTS:
        raise UnsupportedModelError(
            f"{folder}: LoRA that began with init_lora_weights {shown(start)}, which changes the base, is not merged "
            f"here: {MERGE}"
        )
