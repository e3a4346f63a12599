"""What happens around training."""

from tercet.callback.before_after import BeforeAfter
from tercet.callback.checkpoints import Last
from tercet.callback.collapse import Collapse
from tercet.callback.embeddings import Embeddings
from tercet.callback.figures import Figures
from tercet.callback.finite import Finite
from tercet.callback.hard_labels import HardLabels
from tercet.callback.progress import Progress
from tercet.callback.prune import Prune
from tercet.callback.randomness import Randomness
from tercet.callback.stop import Stop
from tercet.callback.throughput import Throughput

__all__ = [
    "BeforeAfter",
    "Collapse",
    "Embeddings",
    "Figures",
    "Finite",
    "HardLabels",
    "Last",
    "Progress",
    "Prune",
    "Randomness",
    "Stop",
    "Throughput",
]
