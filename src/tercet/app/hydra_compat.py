"""Private interfaces of Hydra and OmegaConf; tests/app/test_hydra_compat.py says which one an update has changed."""

import re
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir, version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import Overrides
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf._utils import get_yaml_loader

from tercet.errors import refuse_arguments

MAX_DEPTH = 32  # of values in values, in a configuration that is read as plain data


def typed_overrides() -> list[str]:
    """The overrides of the command as they were typed: reading them one by one would resolve a `${...}` in them."""
    return cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))


def full_key(node: Any) -> str:
    """The key of a node in its configuration, as ``model.head``; empty for the root, and for what is no configuration."""
    names: list[str] = []
    while isinstance(node, Node) and node._key() is not None:
        names.insert(0, str(node._key()))
        node = node._get_parent()
    return ".".join(names)


def source_key(config: DictConfig, key: str) -> str:
    """The key behind interpolations: ``data.module.batch_size`` holds ``${data.batch_size}``."""
    _, _, node = config._select_impl(key, throw_on_missing=False, throw_on_resolution_failure=False)
    return full_key(node) or key


class PlainLoader(get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's reader of YAML, without what makes a small file large or deep: anchors, aliases, endless nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Read a node and those inside it."""
        event = self.peek_event()
        fault = "anchors and aliases are not accepted" if event.anchor else ""
        fault = fault or (f"more than {MAX_DEPTH} levels are not accepted" if self.depth == MAX_DEPTH else "")
        if fault:
            raise yaml.composer.ComposerError(None, None, fault, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def failed_config(error: BaseException | None) -> Any:
    """The whole configuration, as plain dicts and lists, in which OmegaConf raised an error; None for other errors."""
    node = getattr(error, "parent_node", None)
    return None if node is None else OmegaConf.to_container(node._get_root(), resolve=False)


def failed_group(error: BaseException) -> str | None:
    """The override of a group, as it was typed, whose value Hydra cannot take for a choice; None for other errors."""
    return _override_in(error, Overrides.__init__)


def failed_override(error: BaseException) -> str | None:
    """The override of a key, as it was typed, that Hydra cannot apply to the configuration; None for other errors."""
    return _override_in(error, ConfigLoaderImpl._apply_overrides_to_config)


def _override_in(error: BaseException, function: Any) -> str | None:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    found = (frame.f_locals.get("override") for frame in frames if frame.f_code is function.__code__)
    return next((override.input_line for override in found if override is not None), None)


def run_main(job: Callable[[DictConfig], Any], folder: str, name: str, arguments: Sequence[str]) -> None:
    """``hydra.main``, which takes its arguments from the process alone, with the arguments given."""
    version.setbase("1.3")
    parser = get_args_parser()
    parser.error = refuse_arguments  # type: ignore[method-assign]
    options = parser.parse_args(list(arguments))
    _run_hydra(args=options, args_parser=parser, task_function=job, config_path=folder, config_name=name)


def plugin_folders() -> list[Path]:
    """Configuration folders of installed packages: the entry points ``tercet.conf``, each the dotted name of a folder."""
    folders = []
    for entry in entry_points(group="tercet.conf"):
        package, *inside = entry.value.split(".")
        if spec := find_spec(package):
            folders += [Path(root, *inside) for root in spec.submodule_search_locations or ()]
    return folders


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Overrides as Hydra's grammar reads them: keys, values and sweeps."""
    return OverridesParser.create().parse_overrides(list(arguments))


def quote(value: Any) -> str:
    """A value in the grammar of Hydra's command line, where backslashes are doubled before a quote and at the end only.

    >>> quote({"split": "train", "rows": [1, None]})
    "{split:'train',rows:[1,null]}"
    """
    if isinstance(value, str):
        return "'" + re.sub(r"\\+(?='|\Z)", lambda run: run[0] * 2, value).replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(quote, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quote(inner)}" for key, inner in value.items()) + "}"
    return "null" if value is None else str(value)


def swept_values(override: Override) -> list[str]:
    """The values of an override that sweeps, each as it is written on a command line.

    Hydra itself writes those of ``choice(…)`` so that it cannot read letters beyond ASCII again.
    """
    pairs = zip(override.sweep_iterator(), override.sweep_string_iterator(), strict=True)
    plain = re.compile(r"[\w./-]+", re.ASCII)
    return [quote(x) if isinstance(x, str) and not plain.fullmatch(x) else written for x, written in pairs]


def process_state() -> Any:
    """What a worker process needs of this one's Hydra before ``run_worker_job``; it can be pickled."""
    return Singleton.get_state()


def run_worker_job(cfg: DictConfig, state: Any, context: HydraContext, task: TaskFunction) -> JobReturn:
    """Run a job of a sweep in a worker process, as Hydra's own launchers do."""
    setup_globals()
    Singleton.set_state(state)
    HydraConfig.instance().set_config(cfg)
    return run_job(task, cfg, "hydra.sweep.dir", "hydra.sweep.subdir", hydra_context=context)


def config_folders() -> list[Path]:
    """The folders that configuration is composed from now: Tercet's, those of plugins, and that of ``--config-dir``."""
    if not GlobalHydra.instance().is_initialized():
        return []
    paths = (element.path for element in GlobalHydra.instance().config_loader().get_search_path().get_path())
    return [Path(path.removeprefix("file://")) for path in paths if not path.startswith(("pkg:", "struct"))]


def describe_composition(
    folder: str, command: str, overrides: Sequence[str], more_folders: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The configuration of a command as plain data, unresolved, and each group that it composes with its choices."""
    added = [f"hydra.searchpath={quote(list(more_folders))}"] if more_folders else []
    with initialize_config_dir(folder, version_base="1.3", job_name=command):
        cfg = compose(command, [*overrides, *added], return_hydra_config=True)
        choices = partial(GlobalHydra.instance().config_loader().get_group_options, config_name=command, overrides=added)
        groups = {name: choices(str(name).split("@")[0]) for name in cfg.hydra.runtime.choices}
        plain: Any = OmegaConf.to_container(cfg, resolve=False)
    return plain, groups
