"""A package with a loss, an objective and a sampler of its own: it trains, passes the laws and gets the same messages."""

import inspect
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.conftest import CONF, TEXTS, choices, composed, tiny
from tests.end_to_end.conftest import FAST
from tests.laws import distributed_runs, test_loss

PACKAGE = Path(__file__).resolve().parents[1] / "plugin_package"
PLUGIN_CONF = f"--config-dir={PACKAGE / 'tercet_paraphrase' / 'conf'}"
OWN = ["objective=labeled_paraphrase", "loss=sigmoid", "sampler=label_runs"]
QUICK = ["measure_before=false", "callback.before_after=null", "callback.embeddings=null", "evaluation@test=none"]


@pytest.fixture
def package(monkeypatch):
    """The package is importable; ``--config-dir`` names its configuration."""
    monkeypatch.syspath_prepend(str(PACKAGE))


@pytest.fixture
def installed(package, tmp_path, monkeypatch):
    """The package is installed, as far as its metadata go: the entry point adds its configuration."""
    metadata = tmp_path / "site" / "tercet_paraphrase-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tercet-paraphrase\nVersion: 0.1.0\n")
    entry = re.search(r"\[project\.entry-points\.(\"tercet\.conf\")\]\n(.+)\n", (PACKAGE / "pyproject.toml").read_text())
    (metadata / "entry_points.txt").write_text(f"[{entry[1].strip(chr(34))}]\n{entry[2].replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(metadata.parent))


@pytest.fixture
def table(tmp_path):
    rows = "".join(f'"{a}","{b}",{i % 4}\n' for i, (a, b) in enumerate(itertools.product(TEXTS[:6], TEXTS[6:])))
    (tmp_path / "pairs.csv").write_text("first,second,topic\n" + rows)
    return ["data=text", f"data.path={tmp_path}/pairs.csv", "data.columns=[first,second]", "data.label=topic"]


def test_it_trains_from_a_folder_of_its_own(package, command, table):
    result = command("train", PLUGIN_CONF, *tiny(*FAST, *table, *OWN))
    assert result.code == 0, result.terminal
    assert result.metrics()["train/loss"] > 0


def test_it_trains_where_it_is_installed_and_on_two_processes(installed, command, table):
    assert command("train", *tiny(*FAST, *QUICK, *table, *OWN, "trainer=ddp_cpu")).code == 0


MISTAKES = {
    "a loss's parameter": ([*OWN, "loss.scale=0"], ["loss.scale=0", "a positive number"]),
    "a sampler's parameter": ([*OWN, "sampler.share=2"], ["sampler.share=2", "data.batch_size is 4"]),
    "the wrong sampler": ([*OWN[:2], "sampler=random"], ["LabeledParaphrase", "several rows of a label", "sampler=label_runs"]),
    "the wrong loss": ([OWN[0], OWN[2], "loss=context"], ["positives by label", "loss=sigmoid"]),
    "too few columns": ([*OWN, "data.columns=[first]"], ["LabeledParaphrase needs 2 columns"]),
    "no labels": ([*OWN, "data.label=null"], ["LabeledParaphrase needs", "data.label=<column>", "objective=simcse_sup"]),
    "a wrong key": ([*OWN, "+loss.margin=1"], ["loss.margin=1", "it takes scale, bias", "~loss.margin"]),
    "a wrong type": ([*OWN, "sampler.share=many"], ["sampler.share=many", "a number"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_its_mistakes_are_explained_as_tercets_own_are(package, command, table, case):
    overrides, phrases = MISTAKES[case]
    result = command("train", PLUGIN_CONF, *tiny(*FAST, *QUICK, *table, *overrides))
    message = next(line for line in result.terminal.replace("\r", "\n").splitlines() if line.startswith("error: "))
    assert result.code == 1
    assert not [phrase for phrase in phrases if phrase not in message], message


LAWS = [
    law for name, law in vars(test_loss).items() if name.startswith("test_") and "variant" in inspect.signature(law).parameters
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_its_loss_keeps_the_laws(package, monkeypatch, law):
    from tercet_paraphrase import SigmoidLoss

    monkeypatch.setattr(test_loss, "loss_of", lambda name, variant: SigmoidLoss().double())
    values = {"name": ["sigmoid"], "variant": [[]], "views": [2, 3], "case": list(test_loss.DEGENERATE)}
    names = list(inspect.signature(law).parameters)
    for arguments in itertools.product(*(values[name] for name in names)):
        law(**dict(zip(names, arguments, strict=True)))


@pytest.mark.slow  # the laws are kept above; in several processes training itself is tested by tests/laws
def test_two_processes_learn_what_one_does(installed, tmp_path):
    cases = distributed_runs.configs([("labeled_paraphrase", settings) for settings in ("plain", "chunked")])
    alone = distributed_runs.everything(str(tmp_path), 1, 7, cases)
    together = distributed_runs.in_processes(2, distributed_runs.everything, str(tmp_path), 2, 7, cases)[0]
    for case in cases:
        weights, reduced, *_ = together[case]
        for name, weight in alone[case][0].items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-6, msg=lambda m, at=(case, name): f"{at}: {m}")
        assert reduced in (1, None), case


def test_an_installed_package_adds_choices_and_none_is_tercets_own(installed):
    assert composed("loss=sigmoid").loss.scale == 10
    assert "sigmoid" not in choices("loss") and (CONF / "loss").is_dir()


def test_the_readmes_objective_trains_as_printed(command, tmp_path, monkeypatch):
    """README's "Add an objective": its files and its command, with a tiny model and few steps."""
    section = (CONF.parent / "README.md").read_text(encoding="utf-8").split("## Add an objective")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    for kind, text in blocks:
        if kind in ("python", "yaml"):
            path = tmp_path / text.split("\n", 1)[0].lstrip("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    rows = "".join(f'"{a}","{b}"\n' for a in TEXTS[:6] for b in TEXTS[6:])
    (tmp_path / "faq.csv").write_text("question,answer\n" + rows)
    printed = next(text for kind, text in blocks if kind == "bash" and "--config-dir" in text)
    words = [word for word in shlex.split(printed, comments=True) if word not in ("tercet", "train", "PYTHONPATH=.")]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = command("train", *words, *tiny(*FAST))
    assert result.code == 0, result.terminal
    assert "my_objectives.Paraphrase" in (result.output / "config.yaml").read_text()
