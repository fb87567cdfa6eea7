"""The network's own shapes: UniFormer-S and B at 16 x 224 x 224 have the same, but for depth."""

from typing import NamedTuple

__all__ = ["PASSES", "STAGES", "TINY", "Stage", "stages"]

# Over the activation, the fewest of a block's forward: bench_blocks.py lists them.
PASSES = {"L": 11, "G": 26}


class Stage(NamedTuple):
    """Channels, frames, rows and columns of a stage's activations; heads of its attention."""

    number: int
    C: int
    T: int
    H: int
    W: int
    heads: int

    def __str__(self) -> str:
        return f"C={self.C} {self.T}x{self.H}x{self.W}"

    @property
    def tokens(self) -> int:
        return self.T * self.H * self.W

    @property
    def kind(self) -> str:
        """L of the local stages, G of the global ones."""
        return "L" if self.number <= 2 else "G"


STAGES = (
    Stage(1, 64, 8, 56, 56, 1),
    Stage(2, 128, 8, 28, 28, 2),
    Stage(3, 320, 8, 14, 14, 5),
    Stage(4, 512, 8, 7, 7, 8),
)
# For rehearsals: every step on a machine of any kind, in seconds.
TINY = (
    Stage(1, 32, 2, 7, 7, 1),
    Stage(2, 32, 2, 4, 4, 1),
    Stage(3, 64, 2, 4, 4, 2),
    Stage(4, 64, 1, 2, 2, 2),
)


def stages(tiny: bool) -> tuple[Stage, ...]:
    return TINY if tiny else STAGES
