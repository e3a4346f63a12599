"""The house stands as docs/architecture.md says: configuration equals signatures, imports go one way, files are short."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from tercet.app.components import build, check_values
from tests.conftest import CONF, choices, composed

ROOT = CONF.parent
SOURCE = ROOT / "src" / "tercet"
FILES = sorted(SOURCE.rglob("*.py"))
LEAVES = {
    "chance",
    "contract",
    "distributed",
    "error",
    "image",
    "negatives",
    "notice",
    "paths",
    "ring",
    "run_id",
    "search",
}
NEEDS = {  # what cannot stand alone
    "facenet": ["data.path=faces"],
    "faces": ["model=resnet_small"],
    "raw_books": ["data.path=books"],
}
NO_CHOICE = {"any", "default", "files"}  # what others are made of
ROOMS = {"model", "data", "loss", "view", "evaluation"}
MAY_IMPORT = {
    **{room: LEAVES | {room} for room in ROOMS},
    "objective": LEAVES | {"model", "view", "objective"},
    "callback": LEAVES | {"model", "data", "objective", "callback"},
}


def targets(node, place=""):
    """Every node with a ``_target_``: its place, the target, and its keys."""
    if isinstance(node, dict):
        if "_target_" in node:
            placed = {
                name.split("@")[1].split(".")[0]
                for d in node.get("defaults", [])
                for name in ([d] if isinstance(d, str) else d)
                if "@" in name
            }
            plain = {k for k in node if k not in ("_target_", "_partial_", "_convert_", "defaults")}
            yield place, node["_target_"], plain | placed, node
        for key, value in node.items():
            yield from targets(value, f"{place}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets(value, f"{place}.{i}")


def written():
    for path in sorted(CONF.rglob("*.yaml")):
        yield from ((path.relative_to(CONF), *rest) for rest in targets(yaml.safe_load(path.read_text())))


GIVEN_BY_CODE = {
    "tercet.data.RandomBatchSampler": {"rows", "batch_size", "seed"},
    "tercet.data.PKBatchSampler": {"rows", "batch_size", "seed"},
    "tercet.data.WindowBatchSampler": {"rows", "batch_size", "seed"},
    "pytorch_lightning.Trainer": {"logger", "callbacks"},
    "tercet.training.optimizers.adagrad": {"module"},
    "tercet.training.optimizers.adamw": {"module"},
    "tercet.training.optimizers.sgd": {"module"},
    "tercet.training.optimizers.make_scheduler": {"optimizer", "steps"},
    "pytorch_lightning.callbacks.ModelSummary": {"summarize_kwargs"},
    "pytorch_lightning.loggers.TensorBoardLogger": {"kwargs"},
}


@pytest.mark.parametrize(
    ("file", "place", "target", "keys", "node"),
    list(written()),
    ids=lambda x: str(sorted(x) if isinstance(x, set) else x)[:60],
)
def test_a_target_is_given_every_parameter_and_only_those(file, place, target, keys, node):
    called = get_object(target)
    parameters = set(inspect.signature(called).parameters) - {"self"} - GIVEN_BY_CODE.get(target, set())
    assert keys == parameters, f"{file}{place}"


@pytest.mark.parametrize("group", ["model", "data", "loss", "view", "objective", "evaluation", "optimizer", "schedule"])
def test_a_groups_targets_are_in_the_room_of_its_name(group):
    for file, place, target, _, _ in written():
        if file.parts[0] == group and place == "":
            assert target.startswith(f"tercet.{group}."), f"{file}: {target}"


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes_and_says_how_to_run_it(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert text.splitlines()[1].startswith("# python train.py"), "the second line is the command"
    cfg = composed(f"experiment={experiment}")
    assert cfg.data.module._target_ == "tercet.training.DataModule"
    assert get_object(cfg.objective._target_)


@pytest.mark.parametrize("group", ["model", "data", "view", "trainer", "logger", "schedule"])
def test_every_choice_composes(group):
    for choice in choices(group):
        if choice not in NO_CHOICE:
            composed(f"{group}={choice}")


def test_a_groups_default_is_no_surprise():
    cfg = composed()
    assert cfg.loss.temperature == 0.05
    assert cfg.loss.direction == "forward"
    assert cfg.loss.hard_negative_weight == 0
    assert composed("objective.mlm.weight=0.1").objective.mlm.probability == 0.15


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiments_values_fit_their_parameters(experiment):
    cfg = composed(f"experiment={experiment}", *NEEDS.get(experiment, ()))
    check_values(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), cfg)


@pytest.mark.parametrize("data", [c for c in choices("data") if c not in (*NO_CHOICE, "text", "images")])
def test_every_data_sets_values_fit_their_parameters(data):
    cfg = composed(f"data={data}", "evaluation@test=sts", "callback.before_after=null", *NEEDS.get(data, ()))
    check_values(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), cfg)


def test_facenets_experiment_has_the_papers_settings():
    cfg = composed("experiment=facenet", "data.path=faces")
    assert (cfg.data.batch_size, cfg.sampler.per_label) == (1800, 40)
    assert (cfg.loss.margin, cfg.loss.mining, cfg.model.head.dim) == (0.2, "semihard", 128)
    assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("tercet.training.optimizers.adagrad", 0.05)
    assert cfg.model.execution.recompute and cfg.model.norm == "group"
    encoder = build(cfg.model)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        encoder.embed(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(7.5e6, rel=0.05)  # NN2 in table 3
    assert counted.get_total_flops() / 2 == pytest.approx(1.6e9, rel=0.05)


PAPER = {  # SimCSE, table A.1: batch, learning rate, epochs
    "simcse_unsup_bert_base": (64, 3e-5, 1), "simcse_unsup_bert_large": (64, 1e-5, 1),
    "simcse_unsup_roberta_base": (512, 1e-5, 1), "simcse_unsup_roberta_large": (512, 3e-5, 1),
    "simcse_sup_bert_base": (512, 5e-5, 3), "simcse_sup_bert_large": (512, 1e-5, 3),
    "simcse_sup_roberta_base": (512, 5e-5, 3), "simcse_sup_roberta_large": (512, 1e-5, 3),
}  # fmt: skip


@pytest.mark.parametrize("experiment", PAPER)
def test_the_papers_experiments_have_its_settings(experiment):
    cfg = composed(f"experiment={experiment}")
    assert (cfg.data.batch_size, cfg.optimizer.lr, cfg.trainer.max_epochs) == PAPER[experiment]
    assert cfg.data.max_length == 32
    assert cfg.model.pooling == "cls"
    assert cfg.model.head.kind == "mlp"
    assert cfg.model.head.train_only == ("unsup" in experiment)
    assert (cfg.optimizer.weight_decay, cfg.scheduler.shape, cfg.scheduler.warmup) == (0.0, "linear", 0.0)
    assert cfg.trainer.gradient_clip_val == 1.0
    size, family = experiment.rsplit("_", 1)[1], experiment.split("_")[2]
    assert family in cfg.model.backbone.name.lower() and size in cfg.model.backbone.name


def imports(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "tercet":
            yield from (f"tercet.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_go_one_way(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("tercet.")}
    allowed = MAY_IMPORT.get(room, LEAVES if room in LEAVES else None)
    if allowed is not None:
        assert ours <= allowed, f"{room} imports {sorted(ours - allowed)}"
    roots = {name.split(".")[0] for name in imports(path)}
    if room in LEAVES | {"model", "loss", "view", "evaluation", "optimizer", "schedule"}:
        assert "pytorch_lightning" not in roots
    if room in LEAVES | set(MAY_IMPORT) | {"optimizer", "schedule", "console", "record", "logger"}:
        assert "hydra" not in roots


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            size = body[-1].end_lineno - node.lineno + 1 if body else 1
            assert size <= 60, f"{node.name}: {size} lines"


def test_the_readme_is_one_screen_and_a_half():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert "make train" in "\n".join(text.splitlines()[:20])


def test_nothing_names_a_folder_of_some_machine():
    kinds = {".py", ".yaml", ".md", ".toml", ".txt"}
    folders = [ROOT / name for name in ("src", "conf", "tests", "docs")]
    for path in [
        *(p for f in folders for p in f.rglob("*") if p.suffix in kinds),
        *ROOT.glob("*.md"),
        ROOT / "Makefile",
    ]:
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not any(f"/{root}/" in text for root in ("home", "root", "work")), path


def test_the_example_of_the_readme_names_real_files():
    for line in (ROOT / "README.md").read_text().splitlines():
        for word in line.split():
            if word.startswith("](") or "](docs/" in word:
                target = word.split("](")[1].split(")")[0]
                assert Path(ROOT / target).exists(), target
