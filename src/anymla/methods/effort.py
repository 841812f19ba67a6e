"""How long a conversion may take, in one word: it sets tokens and steps (docs/choices.md, 'Effort')."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from anymla.methods.base import LayerMethod

Effort = Literal["quick", "default", "best"]

EFFORTS: dict[str, dict[Effort, dict[str, int]]] = {  # by method
    "transform_coding": {
        "quick": {"calibration_tokens": 4096},
        "default": {},
        "best": {"calibration_tokens": 65536},
    },
    "mla": {
        "quick": {"calibration_tokens": 8192, "reconstruction_steps": 20},
        "default": {},
        "best": {"calibration_tokens": 65536, "reconstruction_steps": 300},
    },
}


def _spent(effort: Effort) -> str:
    """What an effort sets, in words."""
    codes = "{calibration_tokens:,} tokens for codes".format(**EFFORTS["transform_coding"][effort])
    latents = "{calibration_tokens:,} tokens and {reconstruction_steps} steps".format(**EFFORTS["mla"][effort])
    return f"{effort}: {codes}, {latents} for mla"


class EffortMethod(LayerMethod):
    """A method whose tokens and steps follow from ``effort`` where they are not given."""

    effort: Effort = Field(
        "default",
        description="How long a conversion may take: sets calibration_tokens and reconstruction_steps where they are "
        f"not given. {_spent('quick')}. {_spent('best')}, which also tries other channels and splits.",
    )

    @model_validator(mode="after")
    def _by_effort(self) -> Self:
        for name, value in EFFORTS[self.name][self.effort].items():
            if name not in self.model_fields_set:
                self.__dict__[name] = value  # not as if it had been given: another effort may still change it
        return self
