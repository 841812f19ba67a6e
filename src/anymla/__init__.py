"""anymla: turns any trained Transformer into one with multi-head latent attention, so that its KV cache shrinks."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from anymla.comparison import ModelComparison, compare
    from anymla.evaluation.benchmarks import Benchmarks, Evaluation
    from anymla.evaluation.evaluate import evaluate
    from anymla.evaluation.measures import Comparison, Measure
    from anymla.evaluation.scores import Scores
    from anymla.exports.export import export
    from anymla.exports.export_report import Export
    from anymla.fresh import fresh_config
    from anymla.hub import Push, push
    from anymla.methods.mla.plan import MLAPlan
    from anymla.methods.mla.settings import MLA
    from anymla.methods.tune import Tune
    from anymla.outcomes import CodedConversion, Conversion, Inspection
    from anymla.pipeline import convert, explain_plan, inspect, plan
    from anymla.recipe import Recipe
    from anymla.run_outcome import RunReport
    from anymla.runner import run
    from anymla.trade_off import plan_curve
    from anymla.training.outcome import Recovery
    from anymla.training.tune import tune

__version__ = "0.1.0"

__all__ = [
    "MLA",
    "Benchmarks",
    "CodedConversion",
    "Comparison",
    "Conversion",
    "Evaluation",
    "Export",
    "Inspection",
    "MLAPlan",
    "Measure",
    "ModelComparison",
    "Push",
    "Recipe",
    "Recovery",
    "RunReport",
    "Scores",
    "Tune",
    "compare",
    "convert",
    "evaluate",
    "explain_plan",
    "export",
    "fresh_config",
    "inspect",
    "plan",
    "plan_curve",
    "push",
    "run",
    "tune",
]

_MODELING = Path(__file__).parent / "modeling"
_HOMES = {
    "Benchmarks": "anymla.evaluation.benchmarks",
    "CodedConversion": "anymla.outcomes",
    "Comparison": "anymla.evaluation.measures",
    "Conversion": "anymla.outcomes",
    "Evaluation": "anymla.evaluation.benchmarks",
    "Export": "anymla.exports.export_report",
    "Inspection": "anymla.outcomes",
    "Measure": "anymla.evaluation.measures",
    "ModelComparison": "anymla.comparison",
    "compare": "anymla.comparison",
    "MLAPlan": "anymla.methods.mla.plan",
    "Push": "anymla.hub",
    "MLA": "anymla.methods.mla.settings",
    "Recovery": "anymla.training.outcome",
    "Scores": "anymla.evaluation.scores",
    "Recipe": "anymla.recipe",
    "RunReport": "anymla.run_outcome",
    "run": "anymla.runner",
    "evaluate": "anymla.evaluation.evaluate",
    "export": "anymla.exports.export",
    "fresh_config": "anymla.fresh",
    "plan_curve": "anymla.trade_off",
    "push": "anymla.hub",
    "Tune": "anymla.methods.tune",
    "tune": "anymla.training.tune",
}


def __getattr__(name: str) -> Any:
    """Loads the public names when they are first used: `import anymla` stays free of torch."""
    if name not in __all__:
        raise AttributeError(f"module 'anymla' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "anymla.pipeline")), name)


def _register_with_transformers(loaded: ModuleType) -> None:
    """Makes transformers' Auto classes know the converted families, once no other modelling file is half loaded."""
    ours = [module for name, module in sys.modules.items() if name.startswith("anymla.modeling.")]
    if not any(module is not loaded and getattr(module.__spec__, "_initializing", False) for module in ours):
        import_module("anymla.register").register()


# When transformers is loaded, before or after anymla; a modelling file that loads it first waits for its own end. Those
# named spec need no more than the standard library.
for _name in (
    "transformers",
    *(f"anymla.modeling.{file.stem}" for file in _MODELING.glob("*.py") if not file.stem.endswith("spec")),
):
    wrapt.register_post_import_hook(_register_with_transformers, _name)
