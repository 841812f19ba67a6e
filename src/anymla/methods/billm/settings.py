"""The method `billm`: linear layers whose weights are signs, a second bit, and scales per row and block of columns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from anymla.methods.base import Changed, Facts, LayerMethod, Paper, Phase, Plan, Unheard
from anymla.modeling.packed_spec import PackedSpec
from anymla.modeling.spec import ModelSpec

if TYPE_CHECKING:
    from anymla.sweep.layer import Layer


Levels = Literal["own", "centred", "symmetric"]


class BiLLM(LayerMethod):
    """Settings of weights that are binarised after training.

    In each block of columns those with the largest saliency w^2 / c_j^2 are salient, c_j^2 being what the inverse
    Hessian says of column j once those before it are fixed. Their weights are two sizes with a sign each. All other
    weights are split by magnitude into a concentrated and a sparse group, each a size with a sign.
    How many columns are salient, and where the groups part, is searched in every block. What a block loses is made up
    for by the columns behind it, as in GPTQ. The Hessians are those of inputs on calibration text, as the packed layers
    below make them.

    The paper says 1.08 bits per weight, which counts signs alone. With the second bit and the scales a weight takes
    2.5 bits in blocks of 128, with means 2.9; that is what is stored, counted and printed. Small models are destroyed
    by it, as docs/benchmarks.md shows: 4-bit weights are the sane choice.

    Embeddings, norms, biases and the output head stay as they are. So do, in an attention of anymla's own, the
    projections that make the cache or read it, as kv_a_proj_with_mqa and kv_b_proj.

    Deviations from the paper: the searches look at the weights (``search_on: saliency``: at their saliency, as the
    authors' code does), of 256 rows at most. What a block loses is compensated jointly (``compensation: columns``:
    column by column, as in the authors' code, which fixes a block at once all the same). Levels are the paper's; the
    authors' code has means (``levels: centred``), which lose more. Columns that calibration text never reaches are
    binarised as all others. The authors store dense weights; here they are packed.
    """

    name: ClassVar[str] = "billm"
    paper: ClassVar[Paper] = Paper(title="BiLLM", arxiv="2402.04291")
    phase: ClassVar[Phase] = Phase.WEIGHTS
    summary: ClassVar[str] = "weights in under 3 bits, packed: an extreme point that small models do not survive"
    saves: ClassVar[tuple[str, ...]] = ("weights",)

    block_size: int = Field(
        128, ge=8, le=4096, multiple_of=8, description="Columns that share scales: fewer lose less and take more bits."
    )
    search_on: Literal["weight", "saliency"] = Field(
        "weight",
        description="What the searches for salient columns and groups look at; saliency: as the authors' code.",
    )
    most_salient: int = Field(49, ge=0, le=4096, description="Most salient columns of a block; 0: none.")
    split: bool = Field(True, description="Two groups of other weights; false: one, which loses much more.")
    levels: Levels = Field(
        "symmetric",
        description="The two levels of a group: symmetric: ± mean size, as the paper; own: the means of what is above "
        "its mean and below, 0.375 bits more in blocks of 128; centred: mean ± mean distance, as the authors' code.",
    )
    compensation: Literal["blocks", "columns", "none"] = Field(
        "blocks",
        description="How later columns make up for a block: jointly for its columns; one by one; not at all.",
    )
    attention: bool = Field(
        True, description="Pack projections of attention too. false: where a stock attention's cache is to be coded."
    )
    keep: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Linears that stay as they are, by their path in a layer, as mlp.down_proj; * stands for anything.",
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why weights of this model cannot be packed, or not any more."""
        if any(layer.packed is not None for layer in model.layers):
            return "its weights are packed already"
        if any(layer.coded is not None and layer.coded.rounds for layer in model.layers):
            return "its cache is coded, and codes are fitted to the final weights: put billm before that step"
        if model.experts:
            return "its experts lie in one tensor together, and only single linears can be packed"
        return None

    def plan(self, model: ModelSpec, facts: Facts | None = None, choices: tuple[Any, ...] | None = None) -> Plan:
        """Every layer with packed linears; which they are, and of what sizes, is known once the layer is there."""
        packed = PackedSpec(block_size=self.block_size, means=self.levels != "symmetric", attention=self.attention)
        layers = tuple(replace(layer, packed=packed, attention_bytes=None, other_bytes=None) for layer in model.layers)
        return Plan(after=replace(model, layers=layers), choices=(packed.block_size,) * len(layers))

    def observer(self, layer: Layer) -> Unheard:
        """Nothing: inputs are those of the packed layers below, which the original's stream does not show."""
        return Unheard()

    def apply(self, layer: Layer, observed: Any) -> Changed:
        """Puts packed linears in the place of the layer's own."""
        from anymla.methods.billm.build import pack_layer

        return pack_layer(layer, self)
