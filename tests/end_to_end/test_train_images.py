"""FaceNet on a folder of images and on labelled text, by the command line."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.conftest import tiny
from tests.end_to_end.conftest import FAST
from tests.end_to_end.forked import Forked

TINY = ["model=resnet_small", "model.pixels.size=16", "model.backbone.config.embedding_size=8",
        "model.backbone.config.hidden_sizes=[8,16]", "model.backbone.config.depths=[1,1]", "model.head.dim=8"]  # fmt: skip


@pytest.fixture
def people(tmp_path):
    """Twelve people of five images each, one of them cut short."""
    rng = np.random.default_rng(0)
    for person in range(12):
        face = rng.integers(0, 200, (20, 20))
        for number in range(5):
            out = io.BytesIO()
            Image.fromarray((face + rng.integers(0, 56, face.shape)).astype(np.uint8)).save(out, "jpeg")
            file = tmp_path / "people" / f"P{person}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(out.getvalue())
    (tmp_path / "people" / "P1" / "3.jpg").write_bytes(out.getvalue()[:200])
    return tmp_path / "people"


def images(command, people, *more):
    own = ["objective=facenet", "data=images", f"data.path={people}", "data.held_out=0", "data.test=null",
           "sampler.per_label=2", "evaluation@test=none", *more]  # fmt: skip
    return command(
        "train", *[o for o in FAST if "max_steps" not in o], "trainer.max_steps=12", "data.batch_size=4", *TINY, *own
    )


def test_a_folder_of_images_trains_with_hard_labels(command, people, caplog):
    done = images(command, people, "trainer.max_epochs=-1", "data.batch_size=8", "data.workers=0",
                  "callback=hard_labels", "callback.hard_labels.rows=30",
                  "trainer.log_every_n_steps=1", "model.norm=group", "model.execution.chunk_rows=3",
                  "model.execution.recompute=true")  # fmt: skip
    assert done.code == 0, done.terminal
    found = done.metrics()
    assert {"train/active", "train/spread", "train/images_per_second", "train/confusable_similarity"} <= found.keys()
    assert (done.output / "model" / "preprocessor_config.json").is_file()
    assert "3.jpg: it cannot be decoded" in caplog.text
    assert found["train/unreadable"] >= 1


def test_two_processes_train_on_images(people, tmp_path):
    def start(name, *overrides):
        run = Forked(tmp_path, name, [*overrides, "output_dir=run"])
        assert run.end(120) == 0, run.said()

    images(start, people, "trainer=ddp_cpu", "model.norm=group", "data.workers=0")
    assert (tmp_path / "run" / "model").is_dir()


def test_held_out_people_are_searched(command, people):
    own = ["objective=facenet", "data=images", f"data.path={people}", "data.held_out=12", "sampler.per_label=2"]
    done = command("train", *FAST, *TINY, *own, "evaluation@test=nearest_neighbor", "test.ks=[1]", "test.neighbors=3")
    assert done.code == 0, done.terminal
    assert {"before/nearest_neighbor/images/recall@1", "test/nearest_neighbor/images/map@r"} <= done.metrics().keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=images", "data.path={people}", *tiny()], "data holds images, but model reads text"),
        (["data=text", "data.path={people}/../my.txt", *TINY], "data holds text, but model reads images"),
        (["data=images", "data.path={people}/P0", *TINY, "objective=facenet", "data.held_out=0", "data.test=null",
          "evaluation@test=none"], "have no labels"),
        (["data=images", "data.path={people}/../one", *TINY, "objective=facenet", "data.held_out=0", "data.test=null",
          "evaluation@test=none"], "the same label"),
        (["data=images", "data.path={people}", *TINY, "objective=facenet", "model.execution.recompute=true"],
         "model.norm=keep"),
        (["data=images", "data.path={people}", *TINY, "objective=facenet", "sampler=random"], "sampler=pk"),
        (["data=images", "data.path={people}", *TINY, "objective=facenet", "loss=context"],
         "ContextLoss takes positives by position"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(command, people, overrides, message):
    (people.parent / "my.txt").write_text("\n".join(f"Some text {i}." for i in range(40)))
    one = people.parent / "one" / "P0"
    one.mkdir(parents=True)
    for file in (people / "P0").iterdir():
        (one / file.name).write_bytes(file.read_bytes())
    done = command("train", *FAST, *[o.replace("{people}", str(people)) for o in overrides])
    assert done.code == 1
    assert message in done.terminal, done.terminal
    assert "Traceback" not in done.terminal
