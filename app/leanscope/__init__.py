"""Leanscope in a notebook: `run` a lesson and go on with its tensors, `show` it, `explore` what it recorded.

import leanscope

recording = leanscope.run("sinks", window=64)
recording["read.loss[strategy=window]"]
"""

from app.arrays import Arrays, Missing, Tensor, Unfit
from app.explore import explore
from app.notebook import lessons, load, run
from app.notebook import open_lesson as show

__all__ = ["Arrays", "Missing", "Tensor", "Unfit", "explore", "lessons", "load", "run", "show"]
