"""python -m minivllm [--json | --regret]: what this installation is, what works here, and what does not."""

import sys

from .doctor import main

sys.exit(main())
