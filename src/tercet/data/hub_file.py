"""One file of a data set on the Hugging Face hub: ``hf://datasets/owner/name/file``."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from datasets import config
from huggingface_hub import hf_hub_download

from tercet.error import InputError

PREFIX = "hf://datasets/"
SECONDS = 5.0


def fetch(path: str) -> Path:
    """The file's copy in the hub's cache, downloaded once.

    Raises:
        InputError: the path names no file, or the hub does not give it.
    """
    owner, name, file = (*path.removeprefix(PREFIX).split("/", 2), "", "")[:3]
    if not file:
        raise InputError(f"data.path={path}: {PREFIX}owner/name/file is needed.")
    if not config.HF_HUB_OFFLINE:
        reach(path, f"{owner}/{name}")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as error:  # the library raises many kinds
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data.path={path}: the hub did not give it ({said}). A local file will do in data.path."
        ) from error


def reach(path: str, name: str) -> None:
    """Ask for the data set once with a short time limit: the libraries retry for minutes."""
    request = urllib.request.Request(f"{config.HF_ENDPOINT}/api/datasets/{name}", method="HEAD")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered: the library says what is wrong
    except OSError as error:
        raise InputError(
            f"data.path={path}: no such file or folder here, and the hub cannot be reached ({error}). Set data.path to a "
            "local file or folder, or HF_HUB_OFFLINE=1 to use a copy that was downloaded before."
        ) from error
