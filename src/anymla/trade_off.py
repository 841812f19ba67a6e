"""What a cache of codes will lose: plans on what calibration text says of the model, at many budgets of bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anymla.architectures.model_spec import read_model_spec, source_config
from anymla.errors import OutputError
from anymla.io.checkpoint import check_weights, safe_config
from anymla.io.device import machine_memory
from anymla.io.find import with_revision
from anymla.io.sources.locate import locate
from anymla.io.sources.plain import plain_source
from anymla.methods.cache_coding import TransformCoding
from anymla.methods.cache_coding.curve import BUDGETS, curve, decode_costs
from anymla.methods.cache_coding.explain import explain_codes


def plan_curve(
    model: str | Path,
    method: TransformCoding | None = None,
    *,
    revision: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Predicts what the cache of a model loses at many budgets, for three costs of decoding; writes no model.

    It reads calibration text as a conversion with the same settings does. So its plans are those that conversions would
    make. A budget costs no further pass.

    Args:
        model: as :func:`anymla.convert` takes it; it is only read.
        method: settings of the step transform_coding. Its budget and its cost of decoding are among those shown.
        revision: a branch, tag or commit of a model on the hub.
        progress: called with (done, of all, what): after each pass of calibration through a layer, then each plan.

    Returns:
        What :func:`anymla.methods.cache_coding.explain.explain_codes` gives of ``method``; with "curve", a list of
        :class:`~anymla.methods.cache_coding.curve.Point`; "seconds".

    Raises:
        AnymlaError: one of its kinds, each one clear line.
    """
    method, started = method or TransformCoding.of({}, "settings"), time.monotonic()
    name = with_revision(model, revision)
    source = locate(name, adapter=method.adapter)
    explain_codes(name, method, read_model_spec(source_config(source)))  # refuses before weights are read
    with TemporaryDirectory(prefix="anymla-plan-") as folder, plain_source(source) as plain:
        check_weights(plain.folder)
        spec = read_model_spec(safe_config(plain.folder).to_dict())
        from anymla.methods.cache_coding.energies import EnergySurvey  # loads torch
        from anymla.sweep.run import surveyed

        survey = EnergySurvey(method, method.window(spec), decode_costs(method))
        place, memory = Path(folder) / "survey", machine_memory() // 4
        coding = method if method.kv_cache < 1 else method.model_copy(update={"kv_cache": BUDGETS[0]})  # 1 asks nothing
        try:
            facts = surveyed(coding, survey, plain.folder, spec, place, memory=memory, told=progress)
        except OSError as error:
            raise OutputError(f"temporary files could not be written to {folder}: {error}") from error
    told = None if progress is None else lambda done, total: progress(done, total, "plan")
    points = curve(method, spec, facts, told)
    return {
        **explain_codes(name, method, spec, facts),
        "curve": [asdict(point) for point in points],
        "seconds": time.monotonic() - started,
    }
