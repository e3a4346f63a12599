"""The command ``completion``: scripts for bash, zsh and fish that ask this module what can stand at the cursor.

Hydra composes the configuration of the line, which takes most of a second, only where the keys and choices of such a line are
not kept from before; otherwise nothing but this file is imported.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from tercet import __version__
from tercet.app import config_folder
from tercet.errors import refuse_arguments
from tercet.paths import cache_folder, write_text

BASH = r"""# eval "$(tercet completion bash)", or keep it as ~/.local/share/bash-completion/completions/tercet
_tercet() {
    local line=${COMP_LINE:0:COMP_POINT} whole=1 shown candidate
    local word=${line##* }
    local before=${word%"$2"} # bash takes data=text for two words, of which the second is completed
    COMPREPLY=()
    while IFS= read -r candidate; do
        [[ $candidate == *[=./,@:] ]] && whole=
        shown=${candidate#"$before"}
        [[ $shown == *[!a-zA-Z0-9_=./,@:+~-]* ]] && printf -v shown %q "$shown"
        COMPREPLY+=("$shown")
    done < <("$1" completion query "$line" 2>/dev/null)
    [[ -n $whole ]] || compopt -o nospace
}
complete -F _tercet tercet
"""
ZSH = r"""#compdef tercet
# eval "$(tercet completion zsh)" after compinit, or keep it as _tercet in a folder of $fpath
_tercet() {
    local -a found
    found=("${(@f)$("${words[1]}" completion query "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    compadd -S '' -- ${(M)found:#*[=./,@:]}
    compadd -- ${found:#*[=./,@:]}
}
if [[ $funcstack[1] == _tercet ]]; then _tercet "$@"; else compdef _tercet tercet; fi
"""
FISH = r"""# tercet completion fish | source, or keep it as ~/.config/fish/completions/tercet.fish
function __tercet_complete
    set -l words (commandline -opc)
    $words[1] completion query (commandline -cp | string collect) 2>/dev/null
end
complete -c tercet -f -a '(__tercet_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
DOCTOR = ["--help", "--json", "--online"]
KEPT = 200  # lines of which keys and choices are remembered
OPTIONS = ["--cfg", "--config-dir", "--help"]


def main(arguments: Sequence[str]) -> None:
    """Print the script for a shell; ``query LINE`` prints the candidates for the last word of a line, one a line."""
    if arguments[:1] == ["query"]:
        print("\n".join(candidates(" ".join(arguments[1:]))))
        return
    parser = argparse.ArgumentParser(prog="tercet completion", description="The script that completes commands in a shell.")
    parser.error = refuse_arguments  # type: ignore[method-assign]
    parser.add_argument("shell", choices=list(SCRIPTS), help='in ~/.bashrc: eval "$(tercet completion bash)"')
    print(SCRIPTS[parser.parse_args(list(arguments)).shell], end="")


def candidates(line: str) -> list[str]:
    """What the last word of a line can become: commands, keys, choices of a group, files.

    >>> candidates("tercet completion z")
    ['zsh']
    """
    words = _split(line)
    current = words.pop()
    while words and re.match(r"\w+=", words[0]):  # variables of the environment before the program
        del words[0]
    if len(words) < 2:
        return _matching(_remembered("commands", _commands, ()), current)
    command, given = words[1], words[2:]
    if command == "completion":
        return _matching(SCRIPTS, current)
    if given and given[-1] in ("--cfg", "--config-dir"):
        return _matching(["job"], current) if given[-1] == "--cfg" else _files(current)
    if not Path(config_folder(), f"{command}.yaml").is_file():
        return _matching(DOCTOR, current) if current.startswith("-") else _files(current)
    known = _known(command, given)
    if current.startswith("-"):
        return _matching(known["options"], current)
    actions = _matching(known["actions"], current) if not given else []
    prefix = re.match(r"[+~]*", current)[0]  # type: ignore[index] # it matches the empty string, too
    word = current.removeprefix(prefix)
    name, equals, value = word.partition("=")
    if not equals:
        return [*actions, *(prefix + found for found in _next_names(known, word))] or _files(current)
    values = known["groups"].get(name) or (["false", "true"] if name in known["switches"] else [])
    before, _, last = value.rpartition(",")  # of several, which a sweep or a list of choices takes
    before = before and f"{before},"
    found = [f"{prefix}{name}={before}{match}" for match in _matching(values, last)]
    return found if values and (found or name != "model") else [f"{prefix}{name}={file}" for file in _files(value)]


def _split(line: str) -> list[str]:
    """The words of an unfinished line; the last is empty where a new one begins."""
    words = shlex.shlex(line, posix=True, punctuation_chars="")
    words.whitespace_split, words.commenters = True, ""
    found: list[str] = []
    try:
        found.extend(words)
    except ValueError:  # a quote is open, or the line ends in a backslash
        return [*found, words.token]
    return found if line and not line[-1].isspace() else [*found, ""]


def _matching(choices: Any, word: str) -> list[str]:
    return sorted(choice for choice in choices if choice.startswith(word))


def _files(word: str) -> list[str]:
    folder, slash, start = word.rpartition("/")
    try:
        with os.scandir(os.path.expanduser(folder + slash) or ".") as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(start)]
    except OSError:  # no such folder
        return []
    shown = (found for found in found if start.startswith(".") or not found[0].startswith("."))
    return sorted(f"{folder}{slash}{name}{'/' * is_folder}" for name, is_folder in shown)


def _next_names(known: dict[str, Any], word: str) -> list[str]:
    """Groups as ``data=``, and keys up to their next dot: ``data.``, then ``data.path=``."""
    names = {f"{group}=" for group in known["groups"] if group.startswith(word)}
    for key in known["keys"]:
        if key.startswith(word):
            end = key.find(".", len(word))
            names.add(f"{key}=" if end < 0 else key[: end + 1])
    return sorted(names)


def _known(command: str, given: Sequence[str]) -> dict[str, Any]:
    """Of a command: ``groups`` with their choices, ``keys``, ``switches`` (keys that are true or false), and the like."""
    groups = {path.relative_to(config_folder()).as_posix() for path in Path(config_folder()).glob("**/") if path.name}
    chosen = [word for word in given if "=" in word and re.split("[=@]", word.lstrip("+~"))[0] in groups]
    folders = [b for a, b in pairwise(given) if a == "--config-dir"]
    folders += [word.removeprefix("--config-dir=") for word in given if word.startswith("--config-dir=")]
    return dict(_remembered(command, _compose, (*chosen, *(f"--config-dir={Path(folder).resolve()}" for folder in folders))))


def _remembered(name: str, make: Any, words: tuple[str, ...]) -> Any:
    """What ``make(name, words)`` gives, from a file of the cache if the configuration has not changed since."""
    folders = [Path(config_folder()), *(Path(word.partition("=")[2]) for word in words if word.startswith("--config-dir="))]
    files = sorted(path for folder in folders for path in folder.rglob("*.yaml"))
    state = [__version__, name, *words, *(f"{path} {path.stat().st_mtime_ns}" for path in (*files, Path(__file__).parents[1]))]
    digest = hashlib.sha256("\n".join(state).encode(errors="surrogatepass")).hexdigest()[:24]
    cache = cache_folder() / "completion"
    kept = cache / f"{digest}.json"
    with suppress(OSError, ValueError):  # none, or cut
        return json.loads(kept.read_text(encoding="utf-8"))
    made = make(name, words)
    with suppress(OSError):  # the next line is completed slowly, too
        cache.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(made))
        for old in sorted(cache.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()
    return made


def _commands(name: str, words: tuple[str, ...]) -> list[str]:
    from tercet.app.cli import COMMANDS

    return list(COMMANDS)


def _compose(command: str, words: tuple[str, ...]) -> dict[str, Any]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from tercet.app.cli import SWITCHES
    from tercet.app.hydra_compat import describe_composition

    folders = [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    chosen = [word for word in words if not word.startswith("--config-dir=")]
    for overrides in (chosen, []):  # a choice on the line may not exist
        try:
            config, groups = describe_composition(config_folder(), command, overrides, folders)
            break
        except (HydraException, OmegaConfBaseException, ValueError, TypeError):
            continue
    else:
        return {"groups": {}, "keys": [], "switches": [], "options": OPTIONS, "actions": []}
    if command != "train":  # no sweeps, no launchers
        del config["hydra"]
    shown = ("hydra/launcher", "hydra/sweeper") if command == "train" else ()
    groups = {name: found for name, found in groups.items() if "/" not in name or name in shown}
    if "model" not in groups and "model" in config:  # a path there, or one of the names of conf/model
        groups["model"] = sorted(path.stem for path in Path(config_folder(), "model").glob("*.yaml"))
    leaves = dict(_leaves(config, ""))
    switches = [key for key, value in leaves.items() if isinstance(value, bool)]
    head = Path(config_folder(), f"{command}.yaml").read_text(encoding="utf-8")
    return {
        "groups": groups, "keys": sorted(leaves), "switches": switches,
        "options": [*OPTIONS, *(["--multirun"] if command == "train" else SWITCHES.get(command, {}))],
        "actions": sorted(set(re.findall(rf"^# tercet {command} ([a-z]+)\s", head, re.MULTILINE))),
    }  # fmt: skip


def _leaves(node: dict[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    """Each key with its value; Hydra's own names, as ``_target_``, aside."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{before}{name}.")
        elif not str(name).startswith("_"):
            yield f"{before}{name}", value
