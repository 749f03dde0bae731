"""How tokens meet: one file a mixer.

A mixer is a module made for one layer. `mixer(x, rope=rope, cache=cache, show=show)` takes the normed residual
[B, T, W] and returns what is added to it, [B, T, W]. It keeps what it must remember in `cache` (None: nothing
came before), and taps the last `show` rows only, since a pass that recomputes a prefix has one new row.
"""
