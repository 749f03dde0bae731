"""Shapes of published models, as their configurations give them, for formulas that need no weights.

Each is quoted from the config.json that its makers published, `reported` being their own words on its size; the
test holds the parameter counts computed from the shape against those words.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine import cost
from engine.model import Shape


@dataclass(frozen=True)
class Published:
    """A model that others made. In a mixture of experts, `used` of `experts` feed-forwards work on a token.

    `latent` counts the values that latent attention caches a token and layer (MLA: d_c + d_rope), 0 for plain
    keys and values. `window` is how far back a token sees, 0 for all.
    """

    title: str
    source: str
    reported: str
    shape: Shape
    experts: int = 1
    used: int = 1
    latent: int = 0
    window: int = 0

    def parameters(self, *, active: bool = False) -> int:
        """All parameters, or those that one token meets: every expert counts, or the used ones, and the router.

        Raises ValueError for latent attention, whose projections a Shape does not tell.
        """
        if self.latent:
            raise ValueError(f"{self.title} has latent attention, whose parameters a Shape cannot tell")
        parts = cost.parameters(self.shape)
        copies = self.used if active else self.experts
        router = self.shape.layers * self.shape.width * self.experts if self.experts > 1 else 0
        return sum(parts.values()) + (copies - 1) * parts["ffn"] + router

    def kv_values(self, *, tokens: int = 1) -> int:
        """Values cached for `tokens` tokens of one sequence."""
        held = min(tokens, self.window) if self.window else tokens
        if self.latent:
            return held * self.shape.layers * self.latent
        return cost.kv_values(self.shape, tokens=held)


PUBLISHED = {
    "llama-2-7b": Published(
        "Llama 2 7B",
        "Touvron 2023, arXiv:2307.09288; config.json of meta-llama/Llama-2-7b-hf",
        "7B; 6.7B in Touvron 2023a, table 2",
        Shape(32000, 4096, 32, 32, 32, 128, 11008, rope_base=10000.0, tied=False, max_positions=4096),
    ),
    "llama-3-8b": Published(
        "Llama 3 8B",
        "Grattafiori 2024, arXiv:2407.21783; config.json of meta-llama/Meta-Llama-3-8B",
        "8B",
        Shape(128256, 4096, 32, 32, 8, 128, 14336, rope_base=500000.0, tied=False, max_positions=8192),
    ),
    "mistral-7b": Published(
        "Mistral 7B",
        "Jiang 2023, arXiv:2310.06825, table 1; config.json of mistralai/Mistral-7B-v0.1",
        "7B",
        Shape(32000, 4096, 32, 32, 8, 128, 14336, rope_base=10000.0, tied=False, max_positions=32768),
        window=4096,
    ),
    "mixtral-8x7b": Published(
        "Mixtral 8x7B",
        "Jiang 2024, arXiv:2401.04088, table 1; config.json of mistralai/Mixtral-8x7B-v0.1",
        "47B, 13B active",
        Shape(32000, 4096, 32, 32, 8, 128, 14336, rope_base=1000000.0, tied=False, max_positions=32768),
        experts=8,
        used=2,
    ),
    "deepseek-v2": Published(
        "DeepSeek-V2",
        "DeepSeek-AI 2024, arXiv:2405.04434, section 3.1.2; config.json of deepseek-ai/DeepSeek-V2",
        "236B, 21B active",
        Shape(102400, 5120, 60, 128, 128, 128, 1536, rope_base=10000.0, tied=False, max_positions=163840),
        experts=160,
        used=6,
        latent=512 + 64,
    ),
    "deepseek-67b": Published(
        "DeepSeek 67B",
        "DeepSeek-AI 2024, arXiv:2401.02954, table 2; config.json of deepseek-ai/deepseek-llm-67b-base",
        "67B",
        Shape(102400, 8192, 95, 64, 8, 128, 22016, rope_base=10000.0, tied=False, max_positions=4096),
    ),
    "smollm2": Published(
        "SmolLM2 135M",
        "Allal 2025, arXiv:2502.02737; the GGUF's own metadata",
        "135M",
        Shape(49152, 576, 30, 9, 3, 64, 1536, rope_base=100000.0, tied=True, max_positions=8192),
    ),
}
