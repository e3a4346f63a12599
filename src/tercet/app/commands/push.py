"""The command ``push``: a model and its card to the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import DictConfig, OmegaConf

from tercet.app import run_files, run_folder
from tercet.app.model_card import CARD, PLACE, check_given, make_card
from tercet.errors import InputError, refuse_damaged, require
from tercet.messages import markdown_text, print_status
from tercet.models.folder import load_with_note
from tercet.models.hub import model_files, push_folder
from tercet.paths import locate


def run(cfg: DictConfig, output: Path) -> None:
    """Show the files, and send them unless ``cfg.dry_run``."""
    name = str(cfg.model.path)
    path = locate(name)
    folder = path / "model" if run_files.is_run(path) else path
    unfinished = f"model={name} is a run that has not finished, and has no model/." if folder != path else ""
    advice = "A finished run, a model folder or an exported model is needed; tercet.models.save_model writes a folder."
    require(folder.is_dir(), f"{unfinished or f'model={name}: there is no such folder.'} {advice}")
    try:
        sizes = model_files(folder)
        card = _card(cfg, path, folder).replace(PLACE, cfg.repo)
        sizes[CARD] = len(card.encode())
        width = max(map(len, sizes))
        for file, size in sorted(sizes.items()):
            print_status(f"{file:{width}}  {size:>13,} bytes")
        total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
        where = f"{cfg.repo} ({'private' if cfg.private else 'public'}{f', branch {cfg.revision}' if cfg.revision else ''})"
        if cfg.dry_run:
            print_status(f"{total} for {where}. Nothing was sent.")
            return
        address = push_folder(folder, cfg.repo, private=cfg.private, revision=cfg.revision, replaced={CARD: card})
    except InputError as error:
        run_folder.check_no_runs_inside("model", path)
        raise InputError(error.rename({"folder": "model", "path_or_id": "model"})) from error
    print_status(f"{total} sent to {where}: {address}")


def _card(cfg: DictConfig, path: Path, folder: Path) -> str:
    """The card of the folder with what ``cfg.card`` gives; a new one where there is none. The model has been opened."""
    encoder, _ = load_with_note(str(folder))  # what cannot be opened here is not sent
    given: Any = {key: value for key, value in OmegaConf.to_container(cfg.card, resolve=True).items() if value}  # type: ignore[union-attr]
    check_given(given)
    if not (folder / CARD).is_file():
        settings = run_files.read_settings(path) if folder != path else {}
        metrics = run_files.read_metrics(path) if (path / run_files.RESULTS).is_file() else {}
        return make_card(encoder, folder, {**settings, "card": {**(settings.get("card") or {}), **given}}, metrics, {})
    with refuse_damaged(str(folder / CARD), "is no card of a model"):
        card = ModelCard.load(folder / CARD)
        values = card.data.to_dict() | {key: value for key, value in given.items() if key != "title"}
        card.data = ModelCardData(**values)
        if "title" in given:
            card.text = re.sub("^# .*$", lambda _: f"# {markdown_text(given['title'])}", card.text, count=1, flags=re.MULTILINE)
    return str(card)
