"""Side by side with other libraries; each module is a command, ``python -m benchmarks.<module>``."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as our command line does, and before torch: for everybody
