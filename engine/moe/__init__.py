"""Mixtures of experts: many feed-forward networks of which a token calls a few.

`router` decides who is called, `experts` calls them and is the `ffn` of a Decoder, `usage` says who likes what,
`offload` keeps most of them on disk.
"""
