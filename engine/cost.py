"""Every FLOP, byte and energy formula: plain functions, so that a page can fill them in with its run's numbers.

Units: a FLOP is one multiplication or one addition, so a multiply-add is 2 FLOPs; bytes are bytes; energies
are joules. `value_bytes` is the bytes of one stored value, and may be a fraction (0.5 for four bits).
Attention counts the whole query-by-key rectangle, as `torch.utils.flop_counter` does and as code that masks
instead of skipping executes. Norms, softmax, RoPE and other pointwise work are left out of FLOPs.

The formulas of a shape take a `Shape` of engine/model.py; published shapes are in engine/published.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.model import Shape

# Horowitz, "Computing's Energy Problem", ISSCC 2014, figure 1.1.9: 45 nm at 0.9 V, picojoules an operation.
# A DRAM read is of 64 bits, and a range.
PICOJOULES = {
    ("add", "int8"): 0.03,
    ("add", "int32"): 0.1,
    ("add", "float16"): 0.4,
    ("add", "float32"): 0.9,
    ("multiply", "int8"): 0.2,
    ("multiply", "int32"): 3.1,
    ("multiply", "float16"): 1.1,
    ("multiply", "float32"): 3.7,
    ("read", "8 KB cache"): 10.0,
    ("read", "32 KB cache"): 20.0,
    ("read", "1 MB cache"): 100.0,
}
DRAM_READ_PICOJOULES = (1300.0, 2600.0)
DRAM_READ_BYTES = 8


# --- one attention layer, counted in multiplications -------------------------------------------------------


def attention_multiplications(N: int, D: int, H: int) -> int:
    """Multiplications of the matmuls of one attention layer: 3NDH + N²H + N²H + NHD (`post`).

    N tokens of D values, H the width of all heads together: q, k and v; scores; weighted values; output.
    """
    return 3 * N * D * H + N * N * H + N * N * H + N * H * D


def step_multiplications(N: int, D: int, H: int) -> int:
    """The same layer for one new token, N the tokens attended to, itself among them: 3DH + NH + NH + HD."""
    return 3 * D * H + N * H + N * H + H * D


def generation_multiplications(N: int, M: int, D: int, H: int, *, cached: bool) -> int:
    """Multiplications of one attention layer over a whole generation of M tokens after a prompt of N.

    The prompt gives the first new token. Each later one costs its own row when keys and values are `cached`,
    and the whole text again when they are not: O(N²) against O(N³) (`post`).
    """
    if N < 1 or M < 1:
        raise ValueError(f"a generation needs a prompt and a new token, not N={N} and M={M}")
    one = step_multiplications if cached else attention_multiplications
    return attention_multiplications(N, D, H) + sum(one(n, D, H) for n in range(N + 1, N + M))


def growth_exponent(sizes: Sequence[float], counts: Sequence[float]) -> float:
    """The p of counts ≈ c · sizesᵖ: the slope of the least-squares line through the logarithms."""
    if len(sizes) != len(counts) or len(set(sizes)) < 2:
        raise ValueError(f"a slope needs two different sizes and as many counts, not {len(sizes)} and {len(counts)}")
    x = [math.log(size) for size in sizes]
    y = [math.log(count) for count in counts]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


# --- the key-value cache ------------------------------------------------------------------------------------


def kv_values(shape: Shape, *, tokens: int = 1, batch: int = 1) -> int:
    """Values in a key-value cache: batch · tokens · kv heads · layers · head width · 2 (`lecture`)."""
    return batch * tokens * shape.kv_heads * shape.layers * shape.head_width * 2


def kv_bytes(shape: Shape, *, tokens: int = 1, batch: int = 1, value_bytes: float = 2) -> float:
    """Bytes of a key-value cache; by default of one token at 16 bits."""
    return kv_values(shape, tokens=tokens, batch=batch) * value_bytes


def tokens_that_fit(memory: float, bytes_per_token: float) -> int:
    """How many tokens' keys and values `memory` bytes hold."""
    return int(memory // bytes_per_token)


# --- parameters and the work of a forward pass --------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One operation of a forward pass over all its layers: FLOPs done and bytes read or written."""

    name: str
    flops: int
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte, the horizontal axis of a roofline."""
        return self.flops / self.bytes


def parameters(shape: Shape) -> dict[str, int]:
    """Parameters by where they sit. Tied embeddings count once; `head` is 0 then."""
    qkv = shape.width * shape.head_width * (shape.heads + 2 * shape.kv_heads)
    out = shape.heads * shape.head_width * shape.width
    return {
        "embedding": shape.vocab * shape.width,
        "attention": shape.layers * (qkv + out),
        "ffn": shape.layers * ffn_matrices(shape) * shape.width * shape.ffn_width,
        "norms": (2 * shape.layers + 1) * shape.width,
        "head": 0 if shape.tied else shape.vocab * shape.width,
    }


def parameter_count(shape: Shape) -> int:
    return sum(parameters(shape).values())


def ffn_matrices(shape: Shape) -> int:
    """A gated feed-forward (SwiGLU) has three matrices, a plain one (GELU) two."""
    return 3 if shape.activation == "swiglu" else 2


def forward_work(
    shape: Shape,
    *,
    queries: int,
    keys: int,
    batch: int = 1,
    logits: int | None = None,
    weight_bytes: float = 4,
    cache_bytes: float = 4,
) -> list[Work]:
    """The operations of one forward pass of `queries` new tokens a sequence that see `keys`, themselves included.

    `logits` tells for how many tokens the head runs (all by default). Bytes are each weight once, the cached
    keys and values read, the new ones written, and the embedding rows of the new tokens: activations are
    left out, for they stay in the caches.
    """
    if not 0 < queries <= keys:
        raise ValueError(f"queries must be between 1 and the {keys} keys, not {queries}")
    tokens = batch * queries
    heads_width = shape.heads * shape.head_width
    qkv = shape.layers * shape.width * (heads_width + 2 * shape.kv_heads * shape.head_width)
    out = shape.layers * heads_width * shape.width
    ffn = parameters(shape)["ffn"]
    head = shape.vocab * shape.width
    norms = parameters(shape)["norms"]
    met = batch * queries * keys * heads_width * shape.layers  # multiplications of q·k, and of weights · v
    cached = kv_bytes(shape, tokens=keys, batch=batch, value_bytes=cache_bytes)  # the older read, the new written
    return [
        Work("embedding", 0, tokens * shape.width * weight_bytes),
        Work("qkv", 2 * tokens * qkv, qkv * weight_bytes),
        Work("attention", 2 * met + 2 * met, cached),
        Work("out", 2 * tokens * out, out * weight_bytes),
        Work("ffn", 2 * tokens * ffn, ffn * weight_bytes),
        Work("norms", 0, norms * weight_bytes),
        Work("head", 2 * batch * (queries if logits is None else logits) * head, head * weight_bytes),
    ]


def prefill_flops(shape: Shape, *, tokens: int, batch: int = 1, logits: int | None = None) -> int:
    """FLOPs of reading a prompt of `tokens` at once."""
    return sum(w.flops for w in forward_work(shape, queries=tokens, keys=tokens, batch=batch, logits=logits))


def decode_flops(shape: Shape, *, context: int, batch: int = 1) -> int:
    """FLOPs of one decode step whose token sees `context` tokens, itself included."""
    return sum(w.flops for w in forward_work(shape, queries=1, keys=context, batch=batch))


def decode_bytes(
    shape: Shape, *, context: int, batch: int = 1, weight_bytes: float = 4, cache_bytes: float = 4
) -> float:
    """Bytes that one decode step moves: every weight once, and the cache of every sequence."""
    work = forward_work(shape, queries=1, keys=context, batch=batch, weight_bytes=weight_bytes, cache_bytes=cache_bytes)
    return sum(w.bytes for w in work)


# --- the roofline -------------------------------------------------------------------------------------------


def ridge_point(flops_per_second: float, bytes_per_second: float) -> float:
    """The intensity, FLOPs a byte, from which on computing and no longer memory is the limit (Williams 2009)."""
    return flops_per_second / bytes_per_second


def attainable_flops(intensity: float, *, flops_per_second: float, bytes_per_second: float) -> float:
    """The roof over work of that intensity: min(peak, intensity · bandwidth), FLOPs a second (Williams 2009)."""
    return min(flops_per_second, intensity * bytes_per_second)


def decode_bound(bytes_per_second: float, *, step_bytes: float, batch: int = 1) -> float:
    """Tokens a second that no decode can exceed: each step must read its weights and cache once."""
    return batch * bytes_per_second / step_bytes


@dataclass(frozen=True)
class Energy:
    """Joules of a run by Horowitz's table; DRAM as its low and its high figure."""

    arithmetic: float
    memory_low: float
    memory_high: float


def energy(flops: float, nbytes: float, *, kind: str = "float32") -> Energy:
    """Joules of `flops` (half multiplications, half additions of `kind`) and of `nbytes` read from DRAM.

    The figures are of a 45 nm chip of 2014: to be read as a proportion, not as what this machine draws.
    """
    low, high = DRAM_READ_PICOJOULES
    reads = nbytes / DRAM_READ_BYTES
    pair = PICOJOULES["multiply", kind] + PICOJOULES["add", kind]
    return Energy(flops / 2 * pair * 1e-12, reads * low * 1e-12, reads * high * 1e-12)


# --- reading a long text (StreamingLLM, arXiv:2309.17453, figure 1) -----------------------------------------


@dataclass(frozen=True)
class Streaming:
    """What reading T tokens one by one costs: `scores`, the q·k products of one head of one layer, and
    `tokens`, how many tokens pass through the layers."""

    scores: int
    tokens: int


def streaming(policy: str, T: int, *, L: int = 0) -> Streaming:
    """Exact counts for a text of T tokens and a cache of L entries (sinks among them, the new token too).

    "dense" O(T²): every token sees all before it. "window" and "sinks" O(TL): it sees the L kept.
    "recompute" O(TL²): the last L tokens are read anew for every token.
    """
    if T < 0 or (policy != "dense" and L < 1):
        raise ValueError(f"a text of T={T} tokens and a cache of L={L} entries cannot be: T from 0, L from 1")
    triangle = T * (T + 1) // 2
    full = min(T, L)  # the tokens read before the cache is full
    if policy == "dense":
        return Streaming(triangle, T)
    if policy in ("window", "sinks"):
        return Streaming(full * (full + 1) // 2 + (T - full) * L, T)
    if policy == "recompute":
        growing = full * (full + 1) * (full + 2) // 6  # the sum of the first `full` triangles
        return Streaming(growing + (T - full) * (L * (L + 1) // 2), full * (full + 1) // 2 + (T - full) * L)
    raise ValueError(f"policy must be dense, window, recompute or sinks, not {policy!r}")


# --- exact attention in tiles (FlashAttention, arXiv:2205.14135, section 3.2) --------------------------------


def naive_accesses(N: int, d: int) -> int:
    """Values that one head of standard attention moves between HBM and SRAM, Θ(Nd + N²).

    Reads Q and K, writes S; reads S, writes P; reads P and V, writes O. A causal mask saves none of it.
    """
    return 4 * N * d + 4 * N * N


def flash_accesses(N: int, d: int, *, Br: int, Bc: int, causal: bool = False, order: str = "keys") -> int:
    """Values that one head of attention in tiles of Br queries by Bc keys moves between HBM and SRAM.

    Order "keys" (FlashAttention): K and V are read once, and every visit of a block of queries reads Q and writes
    O, m and l, which all visits but the first read too. With Bc = M/4d it is Θ(N²d²/M). Order "queries"
    (FlashAttention-2): Q is read and O and the log-sum-exp written once, and every visit reads K and V.
    """
    if min(N, d, Br, Bc) < 1 or order not in ("keys", "queries"):
        raise ValueError(f'N, d, Br and Bc must be above 0 and order "keys" or "queries", not {N, d, Br, Bc, order}')
    if order == "queries":
        ends = (min(N, start + Br) for start in range(0, N, Br))
        visited = sum(min(N, -(-end // Bc) * Bc) if causal else N for end in ends)  # keys, over the blocks of queries
        return 2 * N * d + N + 2 * d * visited
    visited = sum(N - start // Br * Br if causal else N for start in range(0, N, Bc))  # queries, over blocks of keys
    return 2 * N * d + visited * (2 * d + 2) + (visited - N) * (d + 2)


def naive_peak(N: int, d: int) -> int:
    """Values that one head of standard attention holds in HBM at most: Q, K, V, S and P; or Q, K, V, P and O."""
    return 3 * N * d + max(2 * N * N, N * N + N * d)


def flash_peak(N: int, d: int, *, order: str = "keys") -> int:
    """The same in tiles: Q, K, V, O and a row's statistics (m and l, or the log-sum-exp alone): O(Nd), no N²."""
    return 4 * N * d + (2 * N if order == "keys" else N)


# --- sharing the cache between layers (CLA, arXiv:2405.12981; YOCO, arXiv:2405.05254) -------------------------


def cla_values(shape: Shape, *, factor: int, tokens: int = 1) -> int:
    """Values cached when each `factor` neighbouring layers share keys and values: a `factor`-th of `kv_values`."""
    if factor < 1 or shape.layers % factor:
        raise ValueError(f"factor must divide layers={shape.layers}, and {factor} does not")
    return kv_values(shape, tokens=tokens) // factor


def yoco_values(shape: Shape, *, window: int, tokens: int) -> int:
    """Values cached after `tokens` tokens: one global layer of them, and what the windows of the first half still need.

    A window counts the token that looks, so after it `window` - 1 tokens are kept in each of these layers.
    """
    if window < 1 or tokens < 0 or shape.layers % 2:
        raise ValueError(f"window={window} must be from 1, tokens={tokens} from 0 and layers={shape.layers} even")
    return 2 * shape.kv_heads * shape.head_width * (tokens + shape.layers // 2 * min(tokens, window - 1))


# --- latent attention (DeepSeek-V2, arXiv:2405.04434) ---------------------------------------------------------


def latent_values(layers: int, *, rank: int, rope_width: int, tokens: int = 1) -> int:
    """Values cached by latent attention, whatever the number of heads: layers · (d_c + d_rope), one vector a token."""
    return tokens * layers * (rank + rope_width)


def gqa_groups_of_latent(*, rank: int, rope_width: int, head_width: int) -> float:
    """How many key/value heads of GQA take as much cache: (d_c + d_rope) / 2 d_h. 2.25 in DeepSeek-V2."""
    return (rank + rope_width) / (2 * head_width)


def cache_saved(values: float, against: float, *, bits: float = 16, against_bits: float = 16) -> float:
    """The share of a cache that is gone: 1 - values · bits / (against · against_bits).

    DeepSeek-V2's 93.3% is against DeepSeek 67B (GQA, 16 bits), and comes out with the 6 bits a value that its section
    on inference reports; by values alone it is 82.2%.
    """
    if not (against > 0 and against_bits > 0 and values >= 0 and bits >= 0):
        raise ValueError(f"against must be a cache of more than nothing, not {against} values of {against_bits} bits")
    return 1 - values * bits / (against * against_bits)


# --- speculative decoding (Leviathan et al., arXiv:2211.17192) ----------------------------------------------


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens that one check gives on average: (1 - α^(γ+1)) / (1 - α), equation 1.

    `alpha` is the chance that a guess is accepted, taken to be the same and independent for all `gamma` of them.
    """
    if not 0.0 <= alpha <= 1.0 or gamma < 0:
        raise ValueError(f"alpha must lie between 0 and 1 and gamma be at least 0, not {alpha} and {gamma}")
    return float(sum(alpha**i for i in range(gamma + 1)))  # the same sum, and at α = 1 no division by nothing


def speculation_speedup(alpha: float, gamma: int, *, cost: float) -> float:
    """How many times faster than the plain loop: the tokens of a check over its time, γ·c + 1 (theorem 3.8).

    `cost` is c, the time of one drafted token over the time of one check.
    """
    if cost < 0.0:
        raise ValueError(f"cost must be 0 or above, not {cost}")
    return expected_tokens(alpha, gamma) / (gamma * cost + 1.0)


def check_intensity(
    shape: Shape, *, drafted: int, context: int, weight_bytes: float = 4, cache_bytes: float = 4
) -> float:
    """FLOPs a byte of a pass that checks `drafted` guesses after `context` tokens: weights are read once for all."""
    rows = 1 + drafted
    work = forward_work(shape, queries=rows, keys=context + drafted, weight_bytes=weight_bytes, cache_bytes=cache_bytes)
    return sum(w.flops for w in work) / sum(w.bytes for w in work)


# --- mixtures of experts (Switch, arXiv:2101.03961; Mixtral, arXiv:2401.04088; DeepSeekMoE, arXiv:2401.06066) --


@dataclass(frozen=True)
class Mixture:
    """How the feed-forward part of a shape is split: of `experts` networks of the shape's ffn_width, `used` work on a
    token, and `shared` more on every token. The first `dense_layers` have one plain network of `dense_width` instead.
    """

    experts: int
    used: int
    shared: int = 0
    dense_layers: int = 0
    dense_width: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.used <= self.experts:
            raise ValueError(f"used must be from 1 to the {self.experts} experts, not {self.used}")
        if self.shared < 0 or self.dense_layers < 0 or (self.dense_layers > 0) != (self.dense_width > 0):
            raise ValueError(
                "shared and dense_layers must be 0 or more, and dense_width go with dense_layers, "
                f"not {self.shared}, {self.dense_layers} and {self.dense_width}"
            )


def moe_parameters(shape: Shape, mixture: Mixture, *, active: bool = False) -> dict[str, int]:
    """Parameters by where they sit: all of them, or (`active`) those that one token meets."""
    layers = shape.layers - mixture.dense_layers
    if layers < 1:
        raise ValueError(f"dense_layers must be below the {shape.layers} layers, not {mixture.dense_layers}")
    row = ffn_matrices(shape) * shape.width  # parameters for one unit of a feed-forward's width
    copies = (mixture.used if active else mixture.experts) + mixture.shared
    return parameters(shape) | {
        "ffn": row * (layers * copies * shape.ffn_width + mixture.dense_layers * mixture.dense_width),
        "router": layers * shape.width * mixture.experts,
    }


def moe_token_flops(shape: Shape, mixture: Mixture, *, context: int = 1, dense: bool = False) -> int:
    """FLOPs of one token that sees `context` tokens. `dense`: were every expert to work on it, without a router."""
    parts = moe_parameters(shape, mixture, active=not dense)
    plain = decode_flops(shape, context=context) - 2 * parameters(shape)["ffn"]
    return plain + 2 * (parts["ffn"] + (0 if dense else parts["router"]))


def expected_experts(mixture: Mixture, *, tokens: int) -> float:
    """How many different experts a batch of `tokens` calls in a layer when calls are even: E (1 - (1 - k/E)^tokens).

    What must be read from memory grows with the batch until all experts are.
    """
    if tokens < 0:
        raise ValueError(f"tokens must be 0 or more, not {tokens}")
    return mixture.experts * (1 - (1 - mixture.used / mixture.experts) ** tokens)


# --- what tuning trains (PEFT), in parameters ---------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """The sizes of a BERT-like encoder: biases everywhere, two LayerNorms a layer and one on the embeddings."""

    vocab: int
    positions: int
    types: int
    width: int
    layers: int
    ffn_width: int


# config.json of google-bert/bert-large-uncased, FacebookAI/roberta-base and FacebookAI/roberta-large.
ENCODERS = {
    "bert-large": Encoder(30522, 512, 2, 1024, 24, 4096),
    "roberta-base": Encoder(50265, 514, 1, 768, 12, 3072),
    "roberta-large": Encoder(50265, 514, 1, 1024, 24, 4096),
}


def encoder_parameters(e: Encoder) -> dict[str, int]:
    """Parameters by where they sit: embeddings with their LayerNorm, layers, and the pooler over the first token."""
    layer = 4 * (e.width**2 + e.width) + 2 * e.width * e.ffn_width + e.ffn_width + e.width + 4 * e.width
    return {
        "embedding": (e.vocab + e.positions + e.types) * e.width + 2 * e.width,
        "layers": e.layers * layer,
        "pooler": e.width**2 + e.width,
    }


def bitfit_parameters(e: Encoder) -> int:
    """Every bias: q, k, v, out, two of the feed-forward and two norms a layer; the embeddings' norm, the pooler.

    Of BERT-large 272,384, which over all its 335.1M parameters is 0.08% (BitFit, arXiv:2106.10199, table 1).
    """
    return e.layers * (4 * e.width + e.ffn_width + e.width + 2 * e.width) + 2 * e.width


def adapter_parameters(width: int, *, layers: int, bottleneck: int, norms: bool = True) -> int:
    """Two adapters of 2mW + m + W a layer (Houlsby, arXiv:1902.00751), and with `norms` two LayerNorms of 2W.

    Of BERT-large with m = 64 and norms 6.4M: 2.1% of the parameters of its layers, embeddings not counted. The 3.6% of
    the same table is a mean over tasks that took m = 8, 64 or 256 each: each equally often gives 3.6%, which is our
    assumption.
    """
    if min(width, layers, bottleneck) < 1:
        raise ValueError(f"width, layers and bottleneck must be above 0, not {width}, {layers}, {bottleneck}")
    one = 2 * bottleneck * width + bottleneck + width
    return layers * (2 * one + (4 * width if norms else 0))


def lora_parameters(out: int, width: int, *, rank: int, matrices: int) -> int:
    """A [rank, width] and B [out, rank] beside each of `matrices` (LoRA, arXiv:2106.09685).

    With rank 8 beside W_q and W_v of each layer RoBERTa-base gets 294,912 (0.3M), RoBERTa-large 786,432 (0.8M).
    """
    if min(out, width, rank, matrices) < 1 or rank > min(out, width):
        raise ValueError(f"rank must be from 1 to {min(out, width)} and sizes above 0, not rank={rank}, {matrices=}")
    return matrices * rank * (out + width)
