"""anymla export: a folder or file for serving engines, checked against the converted model before it counts as done."""

from __future__ import annotations

import os
import time
from pathlib import Path

from anymla import __version__
from anymla.errors import RecipeError, UnsupportedModelError
from anymla.exports.converted import FLOATS, config_dtype
from anymla.exports.export_card import export_card
from anymla.exports.export_report import Export
from anymla.exports.format import Format, all_formats
from anymla.io.checkpoint import check_output, new_folder, safe_config
from anymla.io.config import read_object
from anymla.io.device import versions
from anymla.io.find import find_model
from anymla.io.work import write_json
from anymla.layouts import Target
from anymla.modeling.spec import layers_of


def _own_dtype(converted: Path, chosen: Format) -> str:
    """The dtype that the format has for that of the converted model, taken where none was asked for.

    Raises:
        UnsupportedModelError: the format is not written in it.
    """
    own = config_dtype(safe_config(converted))
    if own not in FLOATS:  # which reading the model refuses
        return own
    if (dtype := chosen.dtype_of(own)) is None:
        *known, last = chosen.dtypes
        raise UnsupportedModelError(
            f"{converted} is in {own}, which --to {chosen.name} cannot be: give --dtype {', '.join(known)} or {last}"
        )
    return dtype


def _original_numbers(converted: Path) -> float:
    layers = [layer.attention for layer in layers_of(read_object(converted / "config.json")) or () if layer.latent]
    return float(sum(spec.cached_numbers for spec in layers if spec is not None) / len(layers))


def _format(to: Target, dtype: str | None, pad: str | None, cache_type: str | None) -> Format:
    """The format ``to``, which has what is asked of it."""
    if to not in (formats := all_formats()):
        raise RecipeError(f"--to {to!s:.40} is not one of {', '.join(formats)}")
    chosen = formats[to]
    options = (
        ("--dtype", dtype, chosen.dtypes),
        ("--pad", pad, chosen.pads),
        ("--cache-type", cache_type, chosen.caches),
    )
    for option, value, known in options:
        if value is not None and value not in known:
            raise RecipeError(f"{option} {value:.40} is not one of those of --to {to}: {', '.join(known) or 'none'}")
    return chosen


def export(
    converted: str | Path,
    output: str | Path,
    to: Target = "deepseek",
    *,
    dtype: str | None = None,
    pad: str | None = None,
    cache_type: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Writes a converted model in the format of serving engines.

    Args:
        converted: a folder that ``anymla convert`` wrote, planned with the same ``target``.
        output: the folder to write.
        to: deepseek: a stock DeepseekV3ForCausalLM checkpoint; vllm: the family's own model with code that vLLM's
            transformers backend runs with its latent attention; gguf: a folder with one file for
            llama.cpp.
        dtype: of the weights. Default: the converted model's.
        pad: fill up with zeros, exactly, to sizes that kernels need: cpu (the default of vllm), cuda, full or none
            (docs/exporting.md).
        cache_type: of a quantised cache that the export will be served with: q8_0 or q4_0 of llama.cpp, fp8 of vLLM and
            SGLang. The latent is rotated so that such a cache loses least, exactly, and what it loses is measured.
        overwrite: replace ``output`` if it exists.

    Raises:
        AnymlaError: one of its kinds, each one clear line; nothing is written then.
    """
    started, output = time.monotonic(), Path(os.path.expanduser(output))
    chosen = _format(to, dtype, pad, cache_type)
    source, pad = find_model(converted), pad or chosen.default_pad
    check_output(output, source, overwrite=overwrite)
    dtype = dtype or _own_dtype(source, chosen)
    with new_folder(output) as folder:
        parity = chosen.write(source, folder, dtype=dtype, pad=pad, cache=cache_type)
        done = Export(
            output=output,
            target=to,
            pad=pad,
            cache_type=cache_type,
            parity=parity,
            original_numbers=_original_numbers(source),
            bytes=sum(file.stat().st_size for file in folder.iterdir()),
            seconds=time.monotonic() - started,
            commands=chosen.commands(folder, output, dtype=dtype, pad=pad, cache=cache_type),
            dtype=dtype,
            versions=versions() | {parity.engine: parity.engine_version},
            anymla_version=__version__,
        )
        card = chosen.commands(folder, chosen.place, dtype=dtype, pad=pad, cache=cache_type)
        write_json(folder / "export.json", done.to_dict())
        (folder / "README.md").write_text(export_card(source, chosen, done, card.values()), encoding="utf-8")
    return done
