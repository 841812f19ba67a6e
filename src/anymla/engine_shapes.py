"""What engines' kernels take of a cached latent: sizes, and number formats of the cache. Loads no torch.

r is the rank of the latent, R are the dims of the rope key. Sizes are those of the engines' sources: vLLM 0.32's
kernels for CPUs and GPUs, FlashMLA; llama.cpp. No kernel for GPUs was run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Sizes = tuple[int, int]  # r, R


@dataclass(frozen=True, kw_only=True)
class EngineShapes:
    """What the engines of a layout take; anymla.layouts names one for each, and plan, convert and export read it.

    Args:
        rope: the largest R; None: any.
        rank: the largest r that all kernels take; None: any.
        compiled: the sizes that fast kernels are compiled for, the best first. Others run in kernels of any size, which
            compute with the next power of two of r.
        pads: up to which sizes each ``--pad`` fills with zeros; None: as it is.
        cache_types: quantised caches, and how many numbers have one scale: r and R are whole multiples of it.
    """

    rope: int | None = None
    rank: int | None = None
    compiled: tuple[Sizes, ...] = ()
    pads: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    cache_types: Mapping[str, int] = field(default_factory=dict)

    def block(self, cache_type: str | None) -> int:
        """Of how many numbers r and R are multiples; 1 for a cache of floats."""
        return 1 if cache_type is None else self.cache_types[cache_type]

    def nearest(self, rank: int, rope: int, cache_type: str | None) -> Sizes:
        """The allowed sizes nearest to these; R stays 0 where there is no rope key."""
        block = self.block(cache_type)
        most = rope if self.rope is None else min(rope, self.rope)
        return _multiple(rank, block), _multiple(most, block) if rope else 0

    def refusal(self, rank: int, rope: int, cache_type: str | None) -> str | None:
        """Why these sizes cannot be had, and which can; None where they can."""
        if (nearest := self.nearest(rank, rope, cache_type)) == (rank, rope):
            return None
        why = [f"at most {self.rope} rope dims"] * (self.rope is not None and rope > self.rope)
        if (block := self.block(cache_type)) > 1:
            why.append(f"rank and rope dims in whole blocks of {block} for a cache of {cache_type}")
        return f"takes {' and '.join(why)}: nearest to rank {rank} and rope dims {rope} is --kv-rank {nearest[0]}" + (
            f" --rope-dims {nearest[1]}" if rope else ""
        )

    def preferred(self, rank: int) -> bool:
        """Whether kernels of any size use such a rank whole: a power of two, where the engines have such kernels."""
        return bool(self.compiled) and rank == 1 << rank.bit_length() - 1

    def note(self, rank: int, rope: int, room: Sizes) -> str | None:
        """What a split means for the kernels that will read it; None where nothing is to be said.

        ``room``: the original's cached numbers of a layer, and the most rope dims that it can have.
        """
        if self.rank is not None and rank > self.rank:
            return (
                f"A rank above {self.rank} (here {rank}) fits neither vLLM's kernel for CPUs nor FlashMLA: export with "
                "--pad cuda or none, or keep a smaller cache."
            )
        within = [sizes for sizes in self.compiled if sum(sizes) < room[0] and sizes[1] <= room[1]]
        if not within or (rank, rope) in self.compiled:
            return None
        best = min(within, key=lambda sizes: abs(sum(sizes) - rank - rope))
        share = -(-sum(best) * 10000 // room[0]) / 10000
        return (
            f"vLLM's fast kernels for GPUs are compiled for r {best[0]} + R {best[1]}, which is --kv-cache {share:g} "
            f"--kv-rank {best[0]} --rope-dims {best[1]}. Other sizes, as r {rank} + R {rope}, run in its Triton kernel."
        )


def _multiple(number: int, block: int) -> int:
    """The multiple of ``block``, above 0, that is nearest to ``number``."""
    return max(block, (number + block // 2 - (block > 1)) // block * block)


GPU = EngineShapes(
    rope=64,
    rank=512,
    compiled=((256, 64), (512, 64)),
    pads={"cpu": (512, 64), "cuda": (None, 64), "full": (512, 64)},
    cache_types={"fp8": 1},
)
LLAMA_CPP = EngineShapes(cache_types={"q8_0": 32, "q4_0": 32})
CACHE_TYPES = tuple(dict.fromkeys((*GPU.cache_types, *LLAMA_CPP.cache_types)))
