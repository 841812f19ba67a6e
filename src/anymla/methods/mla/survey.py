"""Looks at some layers of the original for the split that loses least in all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anymla.methods.base import Survey
from anymla.methods.mla.choose import LayerFit
from anymla.methods.mla.observe import AttentionObserver
from anymla.methods.mla.split import MOST_LAYERS, RopeSplit

if TYPE_CHECKING:
    from anymla.methods.mla.settings import MLA
    from anymla.sweep.layer import Layer


class SplitSurvey(Survey):
    """The loss of the hidden states after attention that every split would make, before anything is fitted."""

    def __init__(self, settings: MLA, splits: list[RopeSplit]) -> None:
        self.settings, self.splits = settings, splits

    def layers(self, total: int) -> set[int]:
        """Some, evenly spaced."""
        looked_at = min(total, MOST_LAYERS)
        return {index * total // looked_at for index in range(looked_at)}

    def observer(self, layer: Layer) -> AttentionObserver:
        """The same as for the conversion."""
        return AttentionObserver(self.settings, layer)

    def layer(self, layer: Layer, observed: AttentionObserver) -> dict[str, Any]:
        """What each split loses."""
        measured = observed.measured()
        fit = LayerFit(self.settings, layer, measured)
        lost = [fit.share_lost(split) for split in self.splits]
        measured.close()
        return {"lost": lost}
