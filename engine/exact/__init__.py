"""Exact attention in other orders: `flash` in tiles on one device, `ring` over several. Nothing is approximated."""
