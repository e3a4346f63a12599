"""What happens around training."""

from tercet.callback.before_after import BeforeAfter
from tercet.callback.progress import Progress
from tercet.callback.throughput import Throughput

__all__ = ["BeforeAfter", "Progress", "Throughput"]
