"""``(N, H) -> (N, D)``: what stands on the pooled vector."""

from torch import Tensor, nn

from tercet.error import InputError

KINDS = ("none", "linear", "mlp", "two_linear", "two_mlp")


class Head(nn.Module):
    """``none``, ``linear`` (H to D) or ``mlp`` (H to D, then tanh: SimCSE's).

    ``two_linear`` and ``two_mlp`` are two of them on one trunk, side by side: Quick-Thoughts' f and g, of D each.

    With ``train_only`` it is skipped outside training (SimCSE's ``mlp_only_train``: unsupervised models are better
    without, arXiv:2104.08821 Table 6). ``dim`` null means D = H.
    """

    def __init__(self, kind: str, dim: int | None, train_only: bool) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"model.head.kind={kind}: choose one of {', '.join(KINDS)}.")
        if kind == "none" and (dim is not None or train_only):
            raise InputError(
                f"model.head.kind=none has neither dim ({dim}) nor train_only ({train_only}). "
                "Use model.head.kind=linear or mlp, or model.head.dim=null model.head.train_only=false."
            )
        if dim is not None and dim < 1:
            raise InputError(f"model.head.dim={dim}: a whole number above 0, or null for the backbone's width.")
        self.kind = kind
        self.dim = dim
        self.train_only = train_only
        self.layer: nn.Module = nn.Identity()

    def build(self, hidden: int, std: float) -> None:
        """Make the layer once H is known; its weights are drawn as the backbone's are, from N(0, std)."""
        if self.kind == "none":
            return
        linear = nn.Linear(hidden, self.width(hidden))
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
        self.layer = nn.Sequential(linear, nn.Tanh()) if self.tanh else nn.Sequential(linear)

    @property
    def sides(self) -> int:
        """How many vectors stand side by side in a row now."""
        return 2 if self.kind.startswith("two_") and self.active() else 1

    @property
    def tanh(self) -> bool:
        """Whether tanh follows the linear layer."""
        return self.kind.endswith("mlp")

    def width(self, hidden: int) -> int:
        """What the layer makes of H columns."""
        return (self.dim or hidden) * (2 if self.kind.startswith("two_") else 1)

    def active(self) -> bool:
        """Whether the layer is applied now."""
        return self.kind != "none" and (self.training or not self.train_only)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, H) -> (N, D)``; ``(N, H)`` where the head is not active."""
        out: Tensor = self.layer(x) if self.active() else x
        return out
