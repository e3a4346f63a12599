"""The architecture of docs/architecture.md: storeys, sizes, names, and a configuration that fits the signatures."""

import ast
import inspect
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from tercet.app.components import build, check_values
from tercet.app.config_checks import set_derived
from tests.conftest import CONF, choices, composed

ROOT = CONF.parent
SOURCE = ROOT / "src" / "tercet"
FILES = sorted((ROOT / "src").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "src").as_posix())

APPLICATION = {"hydra", "omegaconf", "tercet.app", "hydra_plugins"}
TRAINING = {"pytorch_lightning", "lightning", "wandb", "tercet.training"}
COMPAT = {  # the modules that may touch private interfaces of a library
    "models/engine/transformers_compat.py",
    "training/lightning_compat.py",
    "app/hydra_compat.py",
}
PRIVATE_NAMES = {"_target_", "_partial_", "_asdict", "_replace", "_fields", "_exit"}  # public, in spite of the underscore


def storey(path: Path) -> str:
    """The storey of a module: ``library``, ``training`` or ``app``."""
    inside = path.relative_to(ROOT / "src").parts
    if inside[0] == "hydra_plugins" or inside[1] in ("app", "__main__.py"):
        return "app"
    return "training" if inside[1] == "training" else "library"


def imports(path: Path) -> set[str]:
    """The modules that a file imports at any place, each with the packages that it is in; those for type checkers aside."""
    names = set()
    for node in _without_type_checking(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)}


def _without_type_checking(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _without_type_checking(child)


@by_file
def test_imports_go_down_only(path):
    forbidden = {"app": set(), "training": APPLICATION, "library": APPLICATION | TRAINING}[storey(path)]
    assert not imports(path) & forbidden


def test_what_is_imported_lazily_counts():
    assert "transformers" in {name for path in FILES for name in imports(path)}
    assert "wandb" in imports(SOURCE / "app" / "record.py")


GROUPS = sorted(
    folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ("base", "hydra", "experiment")
)
CHOICES = {group: choices(group) for group in GROUPS}
TOP = sorted(OmegaConf.to_container(composed(), resolve=False).keys() - {"name", "seed", "command"} - set(GROUPS))
KEY = re.compile(
    rf"(?<![\w./`])(?:{'|'.join([*GROUPS, 'test', 'validation', 'stages'])})(?:\.[a-z_]\w*)+\s?="  # model.pooling=
    + "|"
    + "|".join(rf"(?<![\w./`]){group}(?:@\w+)?=(?:{'|'.join(names)})\b(?!\()" for group, names in CHOICES.items() if names)
    + "|"
    + rf"(?<![\w./`])(?:evaluation@\w+|{'|'.join(TOP)})=[\w<{{]"
)


@by_file
def test_no_string_of_the_library_names_a_configuration_key(path):
    if storey(path) == "app":
        return
    found = [f"line {line}: {match[0]}" for line, text in strings(path) if (match := KEY.search(text))]
    assert not found


def strings(path):
    """Every string literal, docstrings included, with its line; code in examples of docstrings aside."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield (
                node.lineno,
                "\n".join(line for line in node.value.splitlines() if not line.strip().startswith((">>>", "..."))),
            )


def test_keys_are_recognized():
    for text in (
        "Use data.path=x.",
        "set model.pooling=mean",
        "objective=simcse_sup",
        "sampler=pk",
        "evaluation@test=sts",
        "output_dir=x",
    ):
        assert KEY.search(text), text
    for text in ("pooling=mean", "`margin`=9", "a data set", "loss.backward()", "self.model = model", "Trainer(max_steps=1)"):
        assert not KEY.search(text), text


def test_the_source_is_small():
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert sum(lines.values()) <= 23_500
    assert len(FILES) <= 150
    assert not {path.name: count for path, count in lines.items() if count > 400}
    assert len(list((SOURCE / "data").rglob("*.py"))) <= 15
    assert len(list(SOURCE.glob("*.py"))) <= 8


@by_file
def test_functions_are_short(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            size = body[-1].end_lineno - body[0].lineno + 1 if body else 1
            assert size < 50, f"{node.name}: {size} lines"


@by_file
def test_private_interfaces_are_touched_in_the_compat_modules_only(path):
    if path.relative_to(ROOT / "src").as_posix().removeprefix("tercet/") in COMPAT:
        return
    own = {
        name
        for tree in TREES.values()
        for node in ast.walk(tree)
        for name in (
            [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            else [node.attr] if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            else [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            else []
        )
    }  # fmt: skip
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            ours = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert ours or node.attr in own | PRIVATE_NAMES, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names]
            private = [name for name in names for part in name.split(".") if part.startswith("_") and not part.startswith("__")]
            foreign = isinstance(node, ast.Import) or not (node.module or "").startswith("tercet")
            assert not (foreign and private), f"line {node.lineno}: {ast.unparse(node)}"


SAME_NAME = {  # public functions of one name in several modules, and why
    "run": "the entry of each command",
    "main": "the entries of the program",
}


def test_no_two_public_functions_have_one_name():
    found = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found[node.name].append(path.relative_to(ROOT / "src").as_posix())
    assert not {name: files for name, files in found.items() if len(files) > 1 and name not in SAME_NAME}


def targets(node, place=""):
    """Every node with a ``_target_``: its place, the target, and its keys."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield place, node["_target_"], {k for k in node if k not in ("_target_", "_partial_", "_convert_", "defaults")}
        for key, value in node.items():
            yield from targets(value, f"{place}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets(value, f"{place}.{i}")


def written():
    for path in sorted(CONF.rglob("*.yaml")):
        yield from ((path.relative_to(CONF), *rest) for rest in targets(yaml.safe_load(path.read_text())))


GIVEN_BY_CODE = {
    "tercet.data.RandomBatchSampler": {"dataset", "rows", "batch_size", "seed"},
    "tercet.data.NoDuplicatesBatchSampler": {"dataset", "rows", "batch_size", "seed"},
    "tercet.data.PKBatchSampler": {"dataset", "rows", "batch_size", "seed"},
    "tercet.data.WindowBatchSampler": {"dataset", "rows", "batch_size", "seed"},
    "pytorch_lightning.Trainer": {"logger", "callbacks"},
    "tercet.training.optimizers.adagrad": {"module"},
    "tercet.training.optimizers.adamw": {"module"},
    "tercet.training.optimizers.sgd": {"module"},
    "tercet.training.optimizers.make_scheduler": {"optimizer", "steps"},
    "pytorch_lightning.callbacks.ModelSummary": {"summarize_kwargs"},
    "pytorch_lightning.loggers.TensorBoardLogger": {"kwargs"},
}


@pytest.mark.parametrize(
    ("file", "place", "target", "keys"), list(written()), ids=lambda x: str(x) if not isinstance(x, set) else ""
)
def test_a_file_sets_only_what_its_target_takes(file, place, target, keys):
    assert keys <= set(inspect.signature(get_object(target)).parameters), f"{file}{place}"


CHOSEN = [group for group in GROUPS if group not in ("evaluation", "sweep")]
VISIBLE = [(f"{group}={choice}",) for group in CHOSEN for choice in choices(group)]
VISIBLE += [(f"evaluation@test={choice}",) for choice in choices("evaluation")]


@pytest.mark.parametrize("overrides", VISIBLE, ids=lambda x: x[0])
def test_every_parameter_is_visible_in_the_configuration(overrides):
    """``--cfg job`` shows every key that a user may set."""
    cfg = OmegaConf.to_container(composed(*overrides), resolve=False)
    for place, target, keys in targets(cfg):
        missing = set(inspect.signature(get_object(target)).parameters) - keys - GIVEN_BY_CODE.get(target, set())
        assert not missing - {"args", "kwargs"}, f"{place}: {target}"


def test_what_is_inherited_cannot_be_chosen():
    for path in (CONF / "base").iterdir():
        for group in GROUPS:
            assert path.stem not in choices(group)
    assert not {"any", "default", "files"} & set(choices("data"))


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes_and_its_values_fit_their_parameters(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert text.splitlines()[1].startswith("# python train.py"), "the second line is the command"
    cfg = composed(f"experiment={experiment}", *(["data.path=faces"] if experiment == "facenet" else []))
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    set_derived(resolved)
    check_values(resolved, cfg)


NEEDS = {"faces": ["model=resnet_small"], "raw_books": ["data.path=books"], "text": ["data.path=x"], "table": ["data.path=x"],
         "images": ["data.path=x", "model=resnet_small"]}  # fmt: skip


@pytest.mark.parametrize("data", choices("data"))
def test_every_data_sets_values_fit_their_parameters(data):
    cfg = composed(
        f"data={data}", "evaluation@test=sts", "evaluation@validation=none", "callback.before_after=null", *NEEDS.get(data, ())
    )
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    set_derived(resolved)
    check_values(resolved, cfg)


def test_a_groups_default_is_no_surprise():
    cfg = composed()
    assert (cfg.loss.temperature, cfg.loss.direction, cfg.loss.hard_negative_weight) == (0.05, "forward", 0)
    assert composed("objective.mlm.weight=0.1").objective.mlm.probability == 0.15


def test_facenets_experiment_has_the_papers_settings():
    cfg = composed("experiment=facenet", "data.path=faces")
    assert (cfg.data.batch_size, cfg.sampler.per_label) == (1800, 40)
    assert cfg.sampler.distractors > 0, "randomly sampled negative faces (section 3.2)"
    assert (cfg.loss.margin, cfg.loss.mining, cfg.model.head.dim) == (0.2, "semihard", 128)
    assert (cfg.loss.divide_by, cfg.trainer.gradient_clip_val) == ("sum", None)
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


def test_nothing_names_a_folder_of_some_machine():
    kinds = {".py", ".yaml", ".md", ".toml", ".txt"}
    folders = [ROOT / name for name in ("src", "conf", "tests", "docs")]
    for path in [*(p for f in folders for p in f.rglob("*") if p.suffix in kinds), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not any(f"/{root}/" in text for root in ("home", "root", "work")), path


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_the_pages_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 130
