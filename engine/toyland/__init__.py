"""Toyland: a made-up world whose every sentence a person can read and whose true probabilities are known.

`stories` is the grammar, `entropy` what makes it exact, `tokenizer` its 256 words, `corpus` the texts that models
are trained on, `questions` what they are asked, `habits` what they can be taught later.
"""

from engine.toyland.corpus import Batch, batch
from engine.toyland.questions import story
from engine.toyland.stories import Grammar
from engine.toyland.tokenizer import Tokenizer

__all__ = ["Batch", "Grammar", "Tokenizer", "batch", "story"]
