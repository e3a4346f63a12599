"""What faces score without a model: LFW's protocol on pixels. ``python -m benchmarks.pixels``; needs TERCET_DATA."""

import torch

from tercet.evaluation import Verification
from tercet.images import PixelFormat
from tercet.types import Item

SIZES = (16, 32, 64)


def main() -> None:
    """One line for each size."""
    evaluate = Verification("faces_lfw.parquet", "faces_lfw_pairs.parquet")
    for size in SIZES:
        pixels = PixelFormat(size, 1, [0.0], [1.0])

        def encode(items: list[Item], pixels: PixelFormat = pixels) -> torch.Tensor:
            # Less their mean: brightness is no feature of a person.
            x = torch.stack([torch.from_numpy(pixels.read(item)).flatten().float() for item in items])
            return x - x.mean(1, keepdim=True)

        found = {name.rsplit("/", 1)[1]: value for name, value in evaluate(encode).items()}
        accuracy, error = found["accuracy"], found["accuracy_sem"]
        print(f"{size} x {size}: accuracy {accuracy:.4f} ± {error:.4f} (standard error over folds), AUC {found['auc']:.4f}")


if __name__ == "__main__":
    main()
