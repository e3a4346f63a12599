"""The page of a run: the result first, all files included, nothing loaded from the network."""

import re
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf

from tercet.app import report

BEFORE, AFTER = {"a": 0.25}, {"a": 0.5, "b": 2.0}
METRICS = {"before/a": 0.25, "test/a": 0.5, "test/b": 2.0, "train/waiting": 0.01}


class Balanced(HTMLParser):
    """A parser that checks that each element is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def settings(**more):
    given = {"expected": {}, "optimized_metric": None, "monitor": None, "command": [], "data": {"name": "x"}}
    return OmegaConf.create({"name": "toy", "seed": 3, **given, **more})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "revision.txt").write_text("code abc\n")
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/x\n0,1.5,\n5,,0.1\n10,0.5,0.3\n")
    (tmp_path / "figure.png").write_bytes(b"\x89PNG")
    (tmp_path / "holiday.png").write_bytes(b"of the user")
    return tmp_path


def written(folder, cfg):
    shown = [path for path in (folder / "figure.png", folder / "pairs.csv") if path.is_file()]
    report.write_report(folder, cfg, METRICS, shown)
    text = (folder / "report.html").read_text()
    page = Balanced()
    page.feed(text)
    assert not page.open
    for tag, attributes in page.seen:
        assert not (attributes.get("src") or attributes.get("href") or "data:").startswith(("http", "/")), tag
    return text


def test_the_page_holds_all_and_needs_nothing(folder):
    text = written(folder, settings(command=["view=<b>", "seed=3"]))
    for part in ("a: 0.2500 → 0.5000", "+0.2500", "data:image/png;base64,", "code abc", "tercet train", "waiting"):
        assert part in re.sub(r"</?b>", "", text), part
    assert "view=<b>" not in text, "what was typed is text, not markup"
    assert text.count("<polyline") == 2
    assert "holiday" not in text, "a file that the run has not written"


def test_the_page_of_a_comparison_holds_its_tables_and_its_figure(tmp_path):
    (tmp_path / "comparison.png").write_bytes(b"\x89PNG")
    report.write_comparison_page(tmp_path, "2 runs compared", "x=<1>: ahead", "a table", tmp_path / "comparison.png")
    text = (tmp_path / "report.html").read_text()
    assert "x=&lt;1&gt;: ahead" in text and "a table" in text and "data:image/png;base64," in text


def test_curves_are_drawn_to_their_bounds():
    chart = report.make_chart("x", [(0, 1.0), (5, 3.0), (10, 2.0)])
    assert chart.points == "46.0,110.0 171.0,10.0 296.0,60.0"
    assert (chart.x_range, chart.y_range) == (("0", "10"), ("1.0000", "3.0000"))


@pytest.mark.parametrize(
    ("expected", "command", "note"),
    [
        ([[0.48, 0.01, 3, "here"]], ["experiment=toy", "seed=3"], "lie between 0.4303 and 0.5297: as expected."),
        ([[0.4, 0.01, 3, "here"]], ["num_threads=1", "callback.progress=null"], "not as expected"),
        ([[0.47, 0.01, 3, "here"]], ["seed=3"], "over 3 seeds"),  # three sd, and within what three seeds predict
        ([[0.4, None, 1, "paper"], [0.5, 0.01, 50, "others"]], ["experiment=toy"], "paper: 0.4000. others: 0.5000 ± 0.0100"),
        ([[0.4, 0.01, 3, "here"]], ["optimizer.lr=1"], None),
    ],
)
def test_the_result_is_about_the_experiment_as_it_is(expected, command, note):
    result = report.run_result(settings(expected={"test/a": expected}, command=command), METRICS, BEFORE, AFTER)
    assert result.headline.startswith("a: 0.2500 → 0.5000")
    assert (note in result.note) if note else not result.note
    assert result.unexpected == (note == "not as expected")


@pytest.mark.parametrize(("name", "worse"), [("x/recall@1", True), ("x/alignment", False)])
def test_a_run_that_got_worse_says_so_first(name, worse):
    headline = report.run_result(settings(), {f"test/{name}": 0.4}, {name: 0.5}, {name: 0.4}).headline
    assert headline.startswith("Worse than before training: ") == worse
    assert headline.endswith(f"{name}: 0.5000 → 0.4000")


@pytest.mark.parametrize(("after", "kept"), [({"a": 0.5, "b": 1.0}, True), ({"a": 0.5, "b": 2.0}, False)])
def test_a_run_that_kept_its_start_says_so_first(after, kept):
    metrics = {f"test/{name}": value for name, value in after.items()}
    headline = report.run_result(settings(monitor="val/a"), metrics, {"a": 0.5, "b": 1.0}, after).headline
    assert headline.startswith("Nothing beat the model that training started from") == kept
    assert not report.run_result(settings(), metrics, {"a": 0.5, "b": 1.0}, after).headline.startswith("Nothing")


def test_the_metric_that_was_selected_on_validation_is_shown_for_the_test():
    after = {"a": 0.5, "b": 2.0}
    result = report.run_result(settings(optimized_metric="val/b"), {**METRICS, "val/b": 1.0}, BEFORE, after)
    assert result.headline == "b: 2.0000"


@pytest.mark.parametrize(("command", "title"), [
    ([], "toy"), (["experiment=toy", "data.path=my.csv"], "toy"), (["data=text", "data.path=a/my.csv"], "my.csv"),
    (["experiment=own_texts", "data=text", "data.path=a/my.csv"], "my.csv"),
    (["data=captions"], "captions"), (["optimizer.lr=1"], "toy"),
])  # fmt: skip
def test_the_title_is_what_the_user_named(command, title):
    assert report.run_title(settings(command=command, data={"path": "a/my.csv", "name": "captions"})) == title


def test_without_curves_and_figures_the_page_is_shorter(folder):
    for name in ("metrics.csv", "figure.png"):
        (folder / name).unlink()
    text = written(folder, settings())
    assert (
        "Curves" not in text
        and "Figures" not in text
        and "Before and after" in text
        and "Settings from the command line" not in text
    )
