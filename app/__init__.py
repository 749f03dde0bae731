"""Leanscope's pages, run service and command line. Knows Panel and the browser; knows no technique."""
