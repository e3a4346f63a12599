"""The Hugging Face Hub: whether it can be reached, and sending it a model folder, private by default."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from tercet.errors import InputError, refuse_damaged, require
from tercet.messages import printable
from tercet.models.weights import read_weights

SENT = (".safetensors", ".onnx", ".json", ".txt", ".md", ".jinja", ".model")  # what a model folder has, and holds no code
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
_reached: set[str] = set()  # models whose files are kept here, or that were asked for over a connection
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
ANSWERS = {
    401: "the Hub does not accept the token. `hf auth login` asks for another; HF_TOKEN, where it is set, goes before it",
    403: "the token may not write there. Use one with the right to write, and a user or organization that is yours",
    404: "the Hub knows no such user, organization or repository, or the token may not see it",
    409: "the repository was changed by somebody else meanwhile, or is being made. Try again",
    413: "the Hub finds a file too large",
    429: "the Hub has had too many requests of this account. Try again later",
}


def check_reachable(name: str, parameter: str) -> None:
    """Raise ``InputError`` at once where no file of a model is kept here and there is no connection to the Hub.

    Its client would try each file six times, half a minute long. What the Hub answers does not matter here.
    """
    if name in _reached or not re.fullmatch(f"({HUB_ID.pattern})|[A-Za-z0-9][\\w.-]*", name, re.ASCII):
        return
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        endpoint = HfApi().endpoint
        try:
            get_session().head(endpoint, timeout=10)
        except OfflineModeIsEnabled:
            return
        except Exception as error:  # of its HTTP library, which differs between versions
            if type(error).__name__ not in ("ConnectError", "ConnectTimeout", "ConnectionError"):
                return
            fault = f"no such folder here, and the hub at {endpoint} cannot be reached ({error})"
            advice = "connect to the network; a proxy or mirror: HTTPS_PROXY, HF_ENDPOINT"
            raise InputError(f"`{parameter}`={name}: {fault}. Set `{parameter}` to a model's folder, or {advice}.") from error
    _reached.add(name)


def model_files(folder: Path) -> dict[str, int]:
    """The files of a model folder that are sent, with their sizes; ``InputError`` for one that might run code or leads outside.

    Hidden files are left out.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):  # unfinished files, too
            continue
        require(not path.is_symlink(), f"`folder`={folder}: {name} is a link, which is not sent. Copy the file here.")
        if path.is_dir():
            continue
        fault = "is a pickle, which may run code where it is loaded" if path.suffix in PICKLES else "is no file of a model"
        advice = "tercet.models.save_model writes weights as safetensors" if path.suffix in PICKLES else "Move it elsewhere"
        require(path.suffix in SENT, f"`folder`={folder}: {name} {fault}; it is not sent. {advice}.")
        if path.suffix == ".safetensors":
            with refuse_damaged(str(path)):
                read_weights(path)
        found[name] = path.stat().st_size
    weights = any(name.endswith((".safetensors", ".onnx")) for name in found)
    require(weights, f"`folder`={folder} holds no weights (.safetensors or .onnx).")
    return found


def push_folder(
    folder: str | Path, repo: str, *, private: bool = True, revision: str | None = None,
    replaced: Mapping[str, str] | None = None, endpoint: str | None = None,
) -> str:  # fmt: skip
    """Send a model folder in one commit to the repository ``repo`` (``user/name``) of the Hub; returns its address.

    The repository is made where it is not there, ``private`` or not, and the branch ``revision`` likewise. One that is there
    keeps its other files; a public one is refused where ``private`` is asked for. ``replaced`` has texts by file name that are
    sent in place of, or beside, those of the folder. The token is that of ``hf auth login`` or ``HF_TOKEN``.
    """
    folder, texts = Path(folder), dict(replaced or {})
    require(HUB_ID.fullmatch(repo), f"`repo`={repo}: a user or organization and a name are needed, as user/my-model.")
    operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in model_files(folder) if name not in texts]
    operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    require(get_token(), "the Hub needs a token: `hf auth login` asks for one, or set HF_TOKEN.")
    api, is_there = HfApi(endpoint=endpoint), False
    with _answers_explained(repo, api.endpoint):
        with suppress(RepositoryNotFoundError):
            public = f"`repo`={repo} is there and public: everybody would see the model. `private`=false sends it"
            is_private, is_there = api.repo_info(repo).private, True
            require(is_private or not private, f"{public}, or use another name.")
        if not is_there:
            api.create_repo(repo, private=private)
        if revision not in (None, "main"):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        done = api.create_commit(repo, operations, commit_message="Model of Tercet", revision=revision)
    return str(done.commit_url)


@contextmanager
def _answers_explained(repo: str, endpoint: str) -> Iterator[None]:
    """Raise ``InputError`` for what the Hub answers, or that it does not."""
    try:
        yield
    except InputError:
        raise
    except OfflineModeIsEnabled as error:
        raise InputError(f"`repo`={repo}: HF_HUB_OFFLINE is set, so that nothing is sent. Unset it.") from error
    except Exception as error:  # of the client, its HTTP library, and threads that upload
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        answer = next((cause for cause in chain if isinstance(cause, HfHubHTTPError)), None)
        reason = printable(" ".join(str(answer or chain[-1]).split()), lines=False)[:300]
        kept = "Nothing in the repository has changed; the same command tries again."
        if answer is None:
            broken = f"the Hub at {endpoint} could not be reached, or broke off"
            what = "the Hub does not take it" if isinstance(error, ValueError) else broken  # as a name that its client refuses
            raise InputError(f"`repo`={repo}: {what} ({type(chain[-1]).__name__}: {reason}). {kept}") from error
        status = answer.response.status_code
        other = "the Hub has a failure of its own. Try again later" if status >= 500 else "the Hub refuses it"
        known = ANSWERS.get(status, other)
        raise InputError(f"`repo`={repo}: {re.sub('[.]$', '', known)} ({status}: {reason}). {kept}") from error
