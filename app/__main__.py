"""`python -m app` is `leanscope`."""

import sys

from app.cli import main

sys.exit(main())
