"""A small local copy of the Hugging Face Hub's interface, for its real client: branches, commits, LFS, downloads."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

import huggingface_hub.constants as constants
import huggingface_hub.utils._http as http
import yaml

TOKEN = "hf_local_token_of_a_test"


@dataclass
class Repository:
    """``branches`` have the content of files by name; ``private`` as it was made."""

    private: bool
    branches: dict = field(default_factory=lambda: {"main": {}})


@dataclass
class Hub:
    """What was sent: repositories by name, LFS objects by hash, and requests. ``failures`` are statuses by part of a path."""

    repositories: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    failures: dict = field(default_factory=dict)  # 0: the connection is closed
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub, path = self.server.hub, unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        for part, status in hub.failures.items():
            if part in f"{self.command} {path}":
                if not status:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.answer(status, {"error": f"failure {status}"})
                return
        if path.startswith("/objects/"):
            hub.objects[path.rpartition("/")[2]] = body
            self.answer(200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in Authorization header")
        else:
            self.route(hub, path, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def route(self, hub, path, body):
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            hub.repositories[name] = Repository(asked["visibility"] == "private")
            return self.answer(200, {"url": f"{hub.url}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            faults = check_card(json.loads(body)["content"])
            return self.answer(400 if faults else 200, {"errors": [{"message": fault} for fault in faults], "warnings": []})
        name = "/".join(words[2:4] if words[:2] == ["api", "models"] else words[:2]).removesuffix(".git")
        repository = hub.repositories.get(name)
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if path.endswith("/objects/batch"):
            objects = [self.upload(hub, item) for item in json.loads(body)["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "resolve" in words[2:3]:
            return self.send_file(repository, words[3], "/".join(words[4:]))
        return getattr(self, words[4] if len(words) > 4 else "info")(hub, repository, name, words[5:], body)

    def upload(self, hub, item):
        return {**item, "actions": {"upload": {"href": f"{hub.url}/objects/{item['oid']}"}}}

    def info(self, hub, repository, name, words, body):
        files = repository.branches.get(words[0] if words else "main")
        if files is None:
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": file} for file in files]
        return self.answer(
            200, {"id": name, "modelId": name, "private": repository.private, "sha": "0" * 40, "siblings": siblings}
        )

    revision = info

    def tree(self, hub, repository, name, words, body):
        files = repository.branches["main" if words[0] == "0" * 40 else words[0]]
        entries = [
            {"type": "file", "path": file, "size": len(x), "oid": hashlib.sha1(x).hexdigest()} for file, x in files.items()
        ]
        self.answer(200, entries)

    def branch(self, hub, repository, name, words, body):
        known = words[0] in repository.branches
        repository.branches.setdefault(words[0], dict(repository.branches["main"]))
        self.answer(409 if known else 200)

    def preupload(self, hub, repository, name, words, body):
        files = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                  "shouldIgnore": False, "oid": None} for file in json.loads(body)["files"]]  # fmt: skip
        self.answer(200, {"files": files})

    def commit(self, hub, repository, name, words, body):
        files = repository.branches[words[0]]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
        self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}"})

    def send_file(self, repository, branch, file):
        files = repository.branches.get("main" if branch == "0" * 40 else branch, {})
        if file not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)
        tag = hashlib.sha256(files[file]).hexdigest()
        return self.answer(200, files[file], ETag=f'"{tag}"', X_Repo_Commit="0" * 40)


def check_card(text):
    """What the Hub would refuse of a card's front matter, as far as that is known without it."""
    front = yaml.safe_load(text.split("---\n")[1])
    faults = [f"{key} may not be empty" for key, value in front.items() if value in (None, "", [])]
    faults += ["license must be a string"] * (not isinstance(front.get("license", ""), str))
    for model in front.get("model-index", []):
        for result in model["results"]:
            wanted = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"], model["name"]]
            values = [metric["value"] for metric in result["metrics"] if metric["type"]]
            faults += ["model-index is incomplete"] * (not all(wanted) or not all(isinstance(x, int | float) for x in values))
    return faults


@contextmanager
def local_hub(monkeypatch):
    """Serve a hub on 127.0.0.1, and let the client of this process talk to it, without waiting before it tries again."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=lambda _: None, time=http.time.time))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
