import io

import numpy as np
import pytest
from PIL import Image

from tercet.evaluation import Verification, figures
from tercet.evaluation.verification import FacePairs, Roc
from tests.evaluation.test_verification import picture

SAME = np.array([True, False] * 30)
NAMES = ("Ann_Lee", "Bo", "Cy_de_la_Mer", "Di")


def distances(kind):
    rng = np.random.default_rng(0)
    if kind == "collapsed":
        return np.full(60, 2.0)
    return rng.random(60) * 2 + (1.99 * ~SAME if kind == "parted" else 0)


def saved(figure, path):
    """Written, read, and its pixels: a figure that cannot be drawn fails here."""
    figure.savefig(path, dpi=40)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.std() > 5
    return pixels


def said(figure):
    axes = figure.axes[0]
    return " ".join(text.get_text() for text in [*axes.texts, axes.title, *axes.get_legend().texts])


@pytest.mark.parametrize(("kind", "marked"), [("parted", "VAL 100.0 %"), ("mixed", "VAL"), ("collapsed", "VAL 0.0 %")])
def test_the_curve(tmp_path, kind, marked):
    figure = figures.plot_roc(Roc.from_distances(distances(kind), SAME), 1e-3)
    saved(figure, tmp_path / "roc.png")
    assert marked in said(figure)
    assert "30 same and 30 different" in said(figure)
    assert figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize("kind", ["parted", "mixed", "collapsed"])
def test_the_histogram_holds_all_pairs(tmp_path, kind):
    figure = figures.plot_distances(distances(kind), SAME, 1.25)
    saved(figure, tmp_path / "distances.png")
    assert "threshold 1.250" in said(figure)
    assert {"same person", "different people"} <= {text.get_text() for text in figure.axes[0].get_legend().texts}


def pairs():
    rows = [(1 + i // 6, True, (NAMES[i % 4], 1), (NAMES[i % 4], 2)) for i in range(12)]
    rows += [(1 + i // 6, False, (NAMES[i % 4], 1), (NAMES[(i + 1) % 4], 1)) for i in range(12)]
    return FacePairs.from_rows(rows)


def test_the_worst_errors_come_first(tmp_path):
    protocol = pairs()
    images = [picture(name, number) for name, number in protocol.faces]
    excess = np.zeros(24)
    excess[[3, 5, 14]] = 0.1, 0.7, 0.3
    figure = figures.plot_errors(protocol, images, np.linspace(0, 3.99, 24), excess)
    saved(figure, tmp_path / "errors.png")
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert titles == ["Cy de la Mer\nDi\n2.43", "Bo\n0.87", "Di\n0.52"]  # one false accept, two false rejects
    heads = [part.get_suptitle() for part in figure.subfigs]
    assert heads == ["Taken for one person: 1 of 12", "Taken for two people: 2 of 12"]


def test_no_errors_are_an_empty_sheet(tmp_path):
    protocol = pairs()
    figure = figures.plot_errors(protocol, [], np.zeros(24), np.zeros(24))
    saved(figure, tmp_path / "errors.png")
    assert not any(axis.images for axis in figure.axes)


def test_pictures_of_any_shape(tmp_path):
    out = io.BytesIO()
    Image.new("RGBA", (9, 40), (200, 30, 30, 128)).save(out, "png")
    protocol = pairs()
    images = [out.getvalue()] * len(protocol.faces)
    saved(figures.plot_errors(protocol, images, np.ones(24), np.ones(24)), tmp_path / "errors.png")


def test_the_shared_faces(shared, tmp_path):
    """Real pictures, all three figures."""
    import torch

    from tercet.images import PixelFormat

    pixels = PixelFormat(size=16, channels=1, mean=(0.5,), std=(0.25,))
    evaluator = Verification(str(shared / "faces_lfw.parquet"), str(shared / "faces_lfw_pairs.parquet"), [7, 8])
    drawn = evaluator.figures(
        lambda items: torch.stack([torch.from_numpy(pixels.read(item)).flatten().float() - 128 for item in items])
    )
    assert list(drawn) == ["roc", "distances", "errors"]
    for name, figure in drawn.items():
        saved(figure, tmp_path / f"{name}.png")
    assert sum(bool(axis.images) for axis in drawn["errors"].axes) == 10
