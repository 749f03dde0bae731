"""Which shape is best for this machine: one network that holds many, and a search among them.

`supernet` cuts smaller decoders out of one set of weights and says how to train all of them at once; `evolution` looks
for the best one under a budget that was measured here.
"""
