"""A Hub of one's own on localhost: as much of its protocol as creating, uploading, committing and loading need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_test"
USER = "tester"
BAD_LICENSE = "none-of-the-hubs"


class LocalHub:
    """Files of repositories in memory, behind HTTP.

    ``GET /control?fail=lfs`` (or ``commit``) makes that step answer 500 until ``GET /control?fail=``.

    Attributes:
        files: repository id to path to content.
        requests: (method, path) of all that was asked.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.commits: defaultdict[str, int] = defaultdict(int)
        self.fail = ""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def revision(self, repo: str) -> str:
        """40 hex digits, as a commit's."""
        return hashlib.sha1(f"{repo} {self.commits[repo]}".encode()).hexdigest()


def mistakes(content: str) -> list[str]:
    """The mistakes of a card's metadata, by rules of the Hub: a licence, relations, and the model index."""
    data, found = yaml.safe_load(content.split("---")[1]) or {}, []
    if data.get("license") == BAD_LICENSE:
        found.append("license must be one of ...")
    if data.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
        found.append("base_model_relation must be one of ...")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        found.append("tags must be strings")
    for result in (result for model in data.get("model-index", []) for result in model["results"]):
        named = result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")
        if not all(isinstance(one, str) for one in named):
            found.append("model-index needs the task and the dataset of each result")
        if not all(isinstance(one["value"], (int, float)) for one in result["metrics"]):
            found.append("model-index needs a number for each metric")
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Says nothing."""

    def answer(self, status: int, body: dict | bytes = b"", headers: dict[str, str] | None = None) -> None:
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.read_chunks()
        if path == "control":
            self.hub.fail = parse_qs(url.query).get("fail", [""])[0]
            return self.answer(200)
        if self.command in ("GET", "HEAD"):
            return self.load(path)
        if path.startswith("blobs/"):
            return self.store(path.removeprefix("blobs/"), body)
        if path == "api/validate-yaml":
            errors = [{"message": message} for message in mistakes(json.loads(body)["content"])]
            return self.answer(400 if errors else 200, {"errors": errors})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        return self.write(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def store(self, oid: str, body: bytes) -> None:
        if self.hub.fail == "lfs":
            return self.answer(500)
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return self.answer(200)

    def write(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or USER}/{asked['name']}"
            known = repo in hub.files
            hub.files.setdefault(repo, {})
            return self.answer(409 if known else 200, {"url": f"{hub.endpoint}/{repo}", "name": repo, "id": repo})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.endpoint}/blobs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        repo, verb = path.removeprefix("api/models/").rsplit("/", 2)[:2]
        if verb == "preupload":
            large = (".safetensors", ".bin", ".png")
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if verb == "commit":
            if hub.fail == "commit":
                return self.answer(500)
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        return self.answer(404)

    def commit(self, repo: str, lines: list[dict]) -> None:
        hub = self.hub
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[repo][value["path"]] = hub.blobs[value["oid"]]
        hub.commits[repo] += 1
        oid = hub.revision(repo)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.endpoint}/{repo}/commit/{oid}"})

    def load(self, path: str) -> None:
        repo, _, rest = path.partition("/resolve/")
        content = self.hub.files.get(repo, {}).get(rest.partition("/")[2])
        if content is None:
            known = repo in self.hub.files
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.hub.revision(repo)}
        return self.answer(200, content, headers)
