"""What a mixer says it multiplies is what its products multiply, in a prompt and in a decoded token."""

import pytest
import torch

from engine.caches.full import Full
from engine.generate import PARTS, multiplications
from engine.mixers import mamba, rwkv
from engine.mixers.linear import LinearAttention
from engine.mixers.mamba import Mamba
from engine.mixers.performer import performer, trigonometric_features
from engine.mixers.retention import Retention
from engine.mixers.rwkv import Rwkv
from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.titans_layers import MemoryAsContext, MemoryAsGate
from engine.mixers.windows import WindowAttention, interleaved

from .common import SHAPE, Multiplications, decoder, tokens


class Products(Multiplications):
    """Matrix products alone, those with a bias among them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "addmm":
            self.total += args[1].numel() * args[2].shape[-1]
        if func.overloadpacket.__name__ == "mul":
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


MIXERS = {
    "softmax": lambda i: SoftmaxAttention(SHAPE, i),
    "window": lambda i: WindowAttention(SHAPE, i, window=3),
    "dilated window": lambda i: WindowAttention(SHAPE, i, window=3, dilation=2, global_tokens=2),
    "linear": lambda i: LinearAttention(SHAPE, i, chunk=4),
    "performer": lambda i: performer(SHAPE, i, count=5, chunk=4),
    "trigonometric performer": lambda i: performer(SHAPE, i, count=5, features=trigonometric_features),
    "retention": lambda i: Retention(SHAPE, i, chunk=4),
    "titans, gate": lambda i: MemoryAsGate(SHAPE, i, window=3, chunk=4),
    "titans, gate, deep": lambda i: MemoryAsGate(SHAPE, i, window=2, depth=2, chunk=3, persistent=1),
    "titans, context": lambda i: MemoryAsContext(SHAPE, i, segment=4),
    "titans, context, deep": lambda i: MemoryAsContext(SHAPE, i, segment=3, depth=2, persistent=0),
}


def counted(model, ids, cache) -> int:
    with torch.no_grad(), Products() as counter:
        model(ids, cache=cache)
    return counter.total


def told(model, *, rows: int, keys: int) -> int:
    """The head counted for every row, as `model(ids)` runs it."""
    parts = dict(zip(PARTS, multiplications(model, rows=rows, keys=keys), strict=True))
    # The feed-forward network of the tests' decoder is seen in its weights.
    return sum(parts.values()) + (rows - 1) * parts["head"]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("prompt", [5, 14])
def test_a_prompt_and_then_a_token(name, prompt):
    model = decoder(MIXERS[name])
    ids, cache = tokens(prompt + 1), Full()
    assert counted(model, ids[:, :prompt], cache) == told(model, rows=prompt, keys=prompt)
    assert counted(model, ids[:, prompt:], cache) == told(model, rows=1, keys=prompt + 1)


def test_a_window_layer_costs_its_window_and_a_recurrent_one_always_the_same():
    model = decoder(interleaved(SHAPE, window=3, every=2))
    near, far = (multiplications(model, rows=1, keys=keys)[1] for keys in (10, 110))
    assert far - near == 100 * SHAPE.heads * SHAPE.head_width  # of the full layer alone
    for mixer in (LinearAttention, Retention, Rwkv, Mamba):
        model = decoder(lambda i, make=mixer: make(SHAPE, i))
        assert multiplications(model, rows=1, keys=1) == multiplications(model, rows=1, keys=1000)


@pytest.mark.parametrize("rows", [1, 9])
def test_layers_whose_state_is_no_product_of_matrices(rows):
    """Their matrix products are counted here, the rest by the formulas that their own tests count."""
    C = SHAPE.width
    for make, state, conv in (
        (Rwkv, rwkv.multiplications("recurrent" if rows == 1 else "chunked", rows, C, chunk=16), 0),
        (Mamba, mamba.multiplications("recurrent", rows, 2 * C, 16), 4 * 2 * C),
    ):
        model = decoder(lambda i, make=make: make(SHAPE, i))
        own = counted(model, tokens(rows), Full())
        beside = SHAPE.layers * (state + rows * conv)
        inside = SHAPE.layers * recurrence(make, rows)
        assert told(model, rows=rows, keys=rows) - beside == own - inside


def recurrence(make, rows: int) -> int:
    """What the recurrences themselves put into matrix products: it is in their formulas already."""
    if make is Rwkv:
        layer = Rwkv(SHAPE, 0)
        k, v = torch.rand(1, rows, SHAPE.width), torch.rand(1, rows, SHAPE.width)
        decay, bonus = layer.log_decay.exp(), layer.bonus
        with torch.no_grad(), Products() as counter:
            if rows == 1:
                rwkv.recurrent(k, v, decay=decay, bonus=bonus)
            else:
                rwkv.chunked(k, v, decay=decay, bonus=bonus, chunk=16)
        return counter.total
    E, N = 2 * SHAPE.width, 16
    u, delta, A = torch.rand(1, rows, E), torch.rand(1, rows, E), -torch.rand(E, N)
    B, C = torch.rand(1, rows, N), torch.rand(1, rows, N)
    with torch.no_grad(), Products() as counter:
        mamba.recurrent(u, delta, A, B, C)
    return counter.total
