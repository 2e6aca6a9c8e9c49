"""The shapes that benchmarks measure and compile for: small ones on a CPU, those that users run on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Tokens, model dim, hidden dim, experts, mean number of experts per token, whether experts are gated (GLU)."""

    T: int
    D: int
    H: int
    E: int
    k: float
    gated: bool = False

    def __str__(self) -> str:
        return f"T {self.T}, D {self.D}, H {self.H}, E {self.E}, k {self.k:g}" + (", GLU" if self.gated else "")

    @property
    def rows(self) -> int:
        """A = k T, the number of assignments."""
        return round(self.k * self.T)

    @property
    def matrices(self) -> int:
        """Number of D by H matrices per expert: 2, or 3 if gated."""
        return 3 if self.gated else 2

    def flops(self, backward: bool) -> int:
        """FLOPs of the experts' products in the forward, or in forward and backward."""
        return 2 * self.rows * self.D * self.H * self.matrices * (3 if backward else 1)


CPU_SHAPES = (
    Shape(2048, 768, 3072, 8, 4),
    Shape(4096, 384, 1536, 8, 1.3),
    Shape(8192, 256, 256, 32, 1.8),
    Shape(4096, 1024, 1024, 16, 2),
)

TARGETS = ("vit-s", "vit-b", "bert-l", "llm-4k")  # the GPU shapes with targets in the design
# measured in this order while time lasts
GPU_SHAPES = {
    "vit-s": Shape(25216, 384, 1536, 8, 2),
    "vit-b": Shape(25216, 768, 3072, 8, 2),
    "bert-l": Shape(32768, 1024, 4096, 16, 2),
    "llm-4k": Shape(32768, 4096, 1024, 64, 6, gated=True),
    "llm-2k": Shape(16384, 2048, 1024, 64, 6, gated=True),
    "bert-l-glue": Shape(4096, 1024, 4096, 16, 2),
    "vit-s-domainbed": Shape(18912, 384, 1536, 6, 2),
    "llava-stablelm": Shape(8192, 2048, 5632, 4, 2, gated=True),
    "llava-phi2": Shape(8192, 2560, 10240, 4, 2),
    "decode": Shape(16, 4096, 1024, 64, 6, gated=True),
}
