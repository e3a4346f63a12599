"""Several evaluators as one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tercet.contract import Encode, Evaluator
from tercet.error import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Together:
    """Runs all members and merges what they say."""

    members: Mapping[str, Evaluator]

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Raises ``InputError`` where two members use one name."""
        metrics: dict[str, float] = {}
        for name, evaluator in self.members.items():
            found = evaluator(encode)
            if twice := metrics.keys() & found.keys():
                raise InputError(f"evaluation.members.{name} measures {', '.join(sorted(twice))} once more. Rename it.")
            metrics |= found
        return metrics

    def table(self, metrics: Mapping[str, float]) -> str:
        """The tables of the members that have one, then what no table holds; of metrics as they were returned."""
        shown = [(name, show(metrics)) for name, e in self.members.items() if (show := getattr(e, "table", None))]
        suites = tuple(f"{name}/" for name, _ in shown)
        rest = [f"{name}  {value:.4f}" for name, value in metrics.items() if not name.startswith(suites)]
        return "\n\n".join([*(text for _, text in shown), *(["\n".join(rest)] if rest else [])])

    def figures(self, encode: Encode) -> "dict[str, Figure]":
        """Those of the members that draw, as ``<member>_<figure>``; empty if none does."""
        drawn = {name: draw(encode) for name, e in self.members.items() if (draw := getattr(e, "figures", None))}
        return {f"{name}_{key}": figure for name, found in drawn.items() for key, figure in found.items()}
