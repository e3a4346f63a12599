"""The card of a model, ``README.md``: front matter as the Hugging Face Hub reads it, and what the record of its run says.

Nothing is invented: license, language and titles are there where they have been given.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tercet.app.components import walk
from tercet.app.record import stage_metrics
from tercet.app.report import format_number, render
from tercet.app.run_files import Metrics
from tercet.errors import require
from tercet.messages import markdown_text, printable
from tercet.models.encoder import Encoder
from tercet.models.hub import HUB_ID
from tercet.models.pretrained import read_json, read_module_list
from tercet.paths import locate

CARD = "README.md"
PLACE = "path/to/this/folder"  # in the examples, until the model has a hub id
TASKS = {"sts": "semantic-similarity", "retrieval": "information-retrieval"}  # names of the Hub; others are our own
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
EXAMPLES = {"text": '["A man plays.", "Someone is playing."]', "images": '["one.png", "another.png"]'}
# Settings that a card shows, with their names there.
SHOWN = {
    "model.backbone.name": "backbone", "data.name": "data", "data.columns": "columns", "objective._target_": "objective",
    "loss._target_": "loss",
    "loss.temperature": "temperature", "loss.margin": "margin", "data.batch_size": "batch size",
    "optimizer.lr": "learning rate",
    "trainer.precision": "precision", "trainer.strategy": "strategy", "trainer.devices": "devices",
    "trainer.accelerator": "accelerator", "seed": "seed", "init_from": "started from",
}  # fmt: skip
SPEED = ("sentences_per_second", "images_per_second", "memory_gb")


def make_card(encoder: Encoder, folder: Path, settings: Mapping[str, Any], metrics: Metrics, facts: Mapping[str, Any]) -> str:
    """The text of the card of ``encoder``, which has been saved in ``folder``.

    ``settings`` are those of its run, ``facts`` what the run has recorded beside them (``revision``, ``versions``, ``data``,
    ``steps``); all may be empty. Raises ``InputError`` for a card's setting that the Hub would not take.
    """
    given = {name: value for name, value in (settings.get("card") or {}).items() if value}
    check_given(given)
    title = str(given.get("title") or settings.get("name") or "A model of Tercet")
    data = _metadata(encoder, folder, settings, metrics, given, title)
    return f"---\n{data.to_yaml()}\n---\n\n{_body(encoder, folder, settings, metrics, facts, title)}"


def _metadata(
    encoder: Encoder, folder: Path, settings: Mapping[str, Any], metrics: Metrics, given: Mapping[str, Any], title: str
) -> ModelCardData:
    reads_texts, opens = bool(encoder.text_parts()) or not _reads_images(encoder), opens_in_sentence_transformers(folder)
    pipeline = "sentence-similarity" if opens else "feature-extraction" if reads_texts else "image-feature-extraction"
    library = "sentence-transformers" if opens else "tercet"
    tests = {name: x for name, x in stage_metrics(metrics, "test").items() if math.isfinite(x)}
    results = [_result(name, value) for name, value in tests.items()]
    values: dict[str, Any] = {
        "language": _names(given.get("language")), "license": given.get("license"), "library_name": library,
        "base_model": given.get("base_model") or _base_models(settings) or None, "datasets": _names(given.get("datasets")),
        "metrics": sorted({result.metric_type for result in results}) or None, "pipeline_tag": pipeline,
        "tags": list(dict.fromkeys([library, pipeline, "tercet"])), "model_name": title, "eval_results": results or None,
    }  # fmt: skip
    return ModelCardData(**{key: value for key, value in values.items() if value})


def check_given(given: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for settings of ``card`` that the Hub would not take."""
    unknown = [name for name in _names(given.get("language")) or () if not LANGUAGE.fullmatch(name)]
    require(not unknown, f"card.language={', '.join(unknown)}: codes of two or three letters are needed (ISO 639), as en.")
    license_id = given.get("license")
    known = not license_id or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_id)
    require(known, f"card.license={license_id}: an id of the Hub is needed in small letters, as apache-2.0, or other.")
    for key in ("base_model", "datasets"):
        foreign = [name for name in _names(given.get(key)) or () if not HUB_ID.fullmatch(name)]
        require(not foreign, f"card.{key}={', '.join(foreign)}: a hub id is needed, <user>/<name>.")


def _names(value: Any) -> list[str] | None:
    return [value] if isinstance(value, str) else [str(name) for name in value] if value else None


def _base_models(settings: Mapping[str, Any]) -> list[str]:
    """The hub ids of the pretrained models that training started from."""
    found = [value for key, value in walk(settings.get("model") or {}) if key.endswith("backbone.name")]
    found = [settings["init_from"]] if settings.get("init_from") else found
    names = [str(name) for name in found if name and HUB_ID.fullmatch(str(name)) and not locate(str(name)).exists()]
    return list(dict.fromkeys(names))


def _result(name: str, value: float) -> EvalResult:
    """``sts/stsb/spearman`` as the Hub names it: task, data set and metric."""
    suite, *middle = name.split("/")
    metric = middle.pop() if middle else suite
    data = "/".join(middle) or suite
    task = TASKS.get(suite, suite.replace("_", "-"))
    return EvalResult(
        task_type=task, task_name=task.replace("-", " ").capitalize(), dataset_type=re.sub(r"[^\w.-]+", "-", data),
        dataset_name=data, metric_type=metric, metric_name=name, metric_value=value,
    )  # fmt: skip


def opens_in_sentence_transformers(folder: Path) -> bool:
    """Whether ``modules.json`` names modules that sentence-transformers has."""
    modules = read_module_list(str(folder))
    return bool(modules) and all(module["type"].startswith("sentence_transformers.") for module in modules or ())


def _reads_images(encoder: Encoder) -> bool:
    return any(getattr(part, "tokenizer", None) is None for part in encoder.parts() or (encoder,))


def _body(
    encoder: Encoder, folder: Path, settings: Mapping[str, Any], metrics: Metrics, facts: Mapping[str, Any], title: str
) -> str:
    before, after = (stage_metrics(metrics, stage) for stage in ("before", "test"))
    images = not encoder.text_parts() and _reads_images(encoder)
    start = (_base_models(settings) or [""])[0]
    pairs = (str(override).partition("=") for override in settings.get("command") or ())
    typed = [key + equals + _last_part(value) for key, equals, value in pairs]
    values = {
        "title": markdown_text(title), "kind": "An image encoder" if images else "A text encoder", "dim": encoder.dim,
        "num_outputs": encoder.num_outputs, "start": start and f"[{start}](https://huggingface.co/{start})", "place": PLACE,
        "example": EXAMPLES["images" if images else "text"], "opens": opens_in_sentence_transformers(folder),
        "properties": [(name, markdown_text(str(value))) for name, value in _properties(encoder, folder)],
        "results": [(markdown_text(n), format_number(before.get(n)), format_number(x)) for n, x in after.items()],
        "has_before": bool(before.keys() & after.keys()),
        "seed_note": "One training run: runs with other seeds differ." if settings else "",
        "training": [(name, markdown_text(str(value))) for name, value in _training(settings, metrics, facts)],
        "command": printable(shlex.join(["tercet", "train", *typed]), lines=False),  # without folders of the machine
        "limits": list(_limits(encoder, settings, after)),
    }  # fmt: skip
    return render("model_card.md.j2", values, autoescape=False)


def _properties(encoder: Encoder, folder: Path) -> Iterator[tuple[str, Any]]:
    """How inputs become vectors."""
    for part in encoder.parts() or (encoder,):
        for name in ("pooling", "normalize", "max_length"):
            if getattr(part, name, None) is not None:
                yield name.replace("_", " "), getattr(part, name)
        prompts = getattr(part, "prompts", None)
        if prompts:
            for name, text in prompts.texts.items():
                yield f"prompt {name}{' (default)' if name == prompts.default else ''}", repr(text)
    yield "similarity", encoder.similarity_fn_name
    config = read_json(str(folder), "config.json") or {}
    for key, name in (("model_type", "architecture"), ("num_hidden_layers", "layers"), ("dtype", "weights")):
        if config.get(key):
            yield name, config[key]


def _training(settings: Mapping[str, Any], metrics: Metrics, facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings, data, speed and versions of the run; of a path of this machine its last part alone."""
    plain = dict(walk(settings))
    for key, name in SHOWN.items():
        value = plain.get(key)
        if value not in (None, [], ""):
            yield name, str(value).rpartition(".")[2] if key.endswith("_target_") else _last_part(str(value))
    if facts.get("steps"):
        yield "steps", facts["steps"]
    if facts.get("data"):
        yield "fingerprint of the data", facts["data"]["fingerprint"]
    for name in SPEED:
        if f"train/{name}" in metrics:
            yield name.replace("_", " "), format_number(metrics[f"train/{name}"])
    yield from (facts.get("versions") or {}).items()
    if facts.get("revision"):
        yield "code", facts["revision"]


def _last_part(text: str) -> str:
    """The text with the last part alone of each absolute path, whose folders say something of a machine."""
    return re.sub(r"(^|[\[,'\"= ])[/~][^,\]'\"]*/(?=[^/])", r"\1", text)


def _limits(encoder: Encoder, settings: Mapping[str, Any], tests: Metrics) -> Iterator[str]:
    for part in encoder.text_parts():
        yield f"A text is cut after {part.max_length} tokens."
    yield "What is measured above says nothing about other kinds of data." if tests else "It has not been measured."
    if not (settings.get("card") or {}).get("language"):
        yield "Its languages have not been stated: those of its training data and of the model that it started from."
    if not (settings.get("card") or {}).get("license"):
        yield "Its license has not been stated: ask its author before you use it, and mind those of its data and base model."
    yield "Whether it treats groups of people differently has not been measured."
