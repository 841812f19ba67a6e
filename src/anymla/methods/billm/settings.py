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

    In each block of columns, those with the largest saliency w^2 / c_j^2 are salient. c_j^2 comes from the inverse
    Hessian of column j, with the columns before it fixed. Their weights are two sizes with a sign each. All other
    weights are split by magnitude into a concentrated and a sparse group. Each group is a size with a sign. A search in
    every block finds the number of salient columns and the limit between the groups. Later columns make up for the loss
    of a block, as in GPTQ. The Hessians are those of inputs on calibration text, from the packed layers below.

    The paper says 1.08 bits per weight, which counts signs alone. With the second bit and the scales, a weight takes
    2.5 bits in blocks of 128, or 2.9 with means. These are stored, counted and printed. The method destroys
    small models, as docs/benchmarks.md shows. 4-bit weights are the sane choice.

    Embeddings, norms, biases and the output head stay unchanged. In an attention of anymla's own, so do the projections
    that make the cache or read it, such as kv_a_proj_with_mqa and kv_b_proj.

    Deviations from the paper: the searches use the weights, of 256 rows at most. With ``search_on: saliency`` they use
    the saliency, as the authors' code does. Levels are the paper's. The authors' code has means (``levels: centred``),
    which lose more. The loss of a block is compensated jointly. With ``compensation: columns`` it is compensated column
    by column, as in the authors' code, which still fixes a block at once. Columns that calibration text never reaches
    are binarised like all others. The authors store dense weights. Here they are packed.
    """

    name: ClassVar[str] = "billm"
    paper: ClassVar[Paper] = Paper(title="BiLLM", arxiv="2402.04291")
    phase: ClassVar[Phase] = Phase.WEIGHTS
    summary: ClassVar[str] = "weights in under 3 bits, packed: an extreme point that small models do not survive"
    saves: ClassVar[tuple[str, ...]] = ("weights",)

    block_size: int = Field(
        128, ge=8, le=4096, multiple_of=8, description="Columns that share scales. Fewer lose less and take more bits."
    )
    search_on: Literal["weight", "saliency"] = Field(
        "weight", description="What the searches for salient columns and groups use. saliency: as the authors' code."
    )
    most_salient: int = Field(49, ge=0, le=4096, description="Most salient columns of a block. 0: none.")
    split: bool = Field(True, description="Two groups of other weights. false: one, which loses much more.")
    levels: Levels = Field(
        "symmetric",
        description="The two levels of a group. symmetric: ± mean size, as in the paper. own: the means of the weights "
        "above its mean and below, 0.375 bits more in blocks of 128. centred: mean ± mean distance, as the authors' "
        "code.",
    )
    compensation: Literal["blocks", "columns", "none"] = Field(
        "blocks",
        description="How later columns make up for a block: jointly for its columns, one by one, or not at all.",
    )
    attention: bool = Field(
        True, description="Pack projections of attention too. Give false if a stock attention's cache is to be coded."
    )
    keep: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Linears that stay unchanged, by their path in a layer, such as mlp.down_proj. * matches anything.",
    )

    def refuses(self, model: ModelSpec) -> str | None:
        """Why weights of this model cannot be packed, or not any more."""
        if any(layer.holds_packed for layer in model.layers):
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
