"""A model hub on the loopback address: what ``huggingface_hub`` asks of one, and its bad days.

It keeps repositories, commits and large files in memory, answers in the real hub's form, writes
down every request, and can be told to fail: every n-th request, one kind of request, in the middle
of an upload, or after a commit was made but before the answer left.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf" + "_" + "fakehubwriter" * 3
READER = "hf" + "_" + "fakehubreader" * 3
STRANGER = "hf" + "_" + "fakehubstrange" * 3
SIGNATURE = "X-Amz-Signature=signedsignedsigned"


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class File:
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> str:
        content = self.content
        if self.large:
            content = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: branches and pull requests are names of commits."""

    kind: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, File], ref: str) -> str:
        listing = sorted((name, file.sha256) for name, file in files.items())
        text = json.dumps([listing, len(self.commits), ref])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def files(self, ref: str = "main") -> dict[str, File]:
        return self.commits[self.refs[ref]]


class FakeHub:
    """The server. Use as a context manager; ``url`` is its address."""

    def __init__(self) -> None:
        self.users = {TOKEN: ("me", True), READER: ("reader", False), STRANGER: ("other", True)}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fail_every = 0
        self.fail: dict[str, int] = {}
        """Part of ``METHOD path`` to the status that such requests get."""
        self.answers_lost = 0
        """Commits that are made without an answer."""
        self.uploads_cut = 0
        """Uploads of large files that break off in the middle."""
        self.alter: Callable[[str, bytes], bytes] = lambda name, content: content
        """Applied to what is downloaded."""
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"
        """Another host name, as storage has one: the token must not go there."""

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, pattern: str) -> int:
        """Return how many requests matched."""
        return sum(bool(re.search(pattern, f"{r.method} {r.path}")) for r in self.requests)

    def add_repo(self, repo_id: str, kind: str = "model", private: bool = True) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, private)
        repo.commit({".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "main")
        return repo


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        hub = self.hub
        length = int(self.headers.get("Content-Length") or 0)
        address = urlsplit(self.path)
        with hub.lock:
            cut = self.command == "PUT" and hub.uploads_cut > 0
            hub.uploads_cut -= cut
        body = self.rfile.read(length // 2 if cut else length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self.read_chunks()
        with hub.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append(Request(self.command, self.path, headers, body))
            number = len(hub.requests)
            if cut:
                return self.hang_up()
            if hub.fail_every and number % hub.fail_every == 0:
                return self.page(503)
            for part, status in hub.fail.items():
                if part in f"{self.command} {address.path}":
                    return self.page(status)
            self.route(unquote(address.path), parse_qs(address.query), body)

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def page(self, status: int) -> None:
        """Answer as a proxy in front of the hub would."""
        self.reply(status, b"<html>try later</html>", Content_Type="text/html")

    def json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.reply(status, json.dumps({"error": message}).encode(), **headers)

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        hub, method = self.hub, self.command
        if match := re.fullmatch(r"/storage/(\w+)", path):
            return self.store(match[1], query, body)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in hub.users:
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.user, self.can_write = hub.users[token]
        if path == "/api/whoami-v2":
            return self.json({"type": "user", "name": self.user, "orgs": []})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, verb, action in (
            (r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/revision/(.+))?", "GET", self.info),
            (r"/api/(model)s/([^/]+/[^/]+)/preupload/(.+)", "POST", self.preupload),
            (r"/()([^/]+/[^/]+)\.git/info/lfs/objects/batch()", "POST", self.batch),
            (r"/api/(model)s/([^/]+/[^/]+)/commit/(.+)", "POST", self.commit),
            (r"/api/(model)s/([^/]+/[^/]+)/branch/(.+)", "POST", self.branch),
            (r"/api/(model)s/([^/]+/[^/]+)/discussions()", "GET", self.discussions),
            (r"/()([^/]+/[^/]+)/resolve/(.+)", "GET", self.resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match and method in (verb, "HEAD"):
                kind, repo_id, rest = (part or "" for part in match.groups())
                repo = hub.repos.get((kind or "model", repo_id))
                if repo is None or (repo.private and not self.sees(repo_id)):
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                writes = (self.preupload, self.batch, self.commit, self.branch)
                if action in writes and not (self.writes(repo_id) or self.proposes(path, body)):
                    return self.refuse(403, "you have no right to write here")
                return action(repo_id, repo, rest, query, body)
        self.refuse(404, f"no such page: {method} {path}")

    def sees(self, repo_id: str) -> bool:
        return self.user == "reader" or repo_id.split("/")[0] in (self.user, "team")

    def writes(self, repo_id: str) -> bool:
        return self.can_write and self.sees(repo_id)

    def proposes(self, path: str, body: bytes) -> bool:
        """Whoever may read may make a pull request; large files then come without a branch."""
        if path.endswith("/objects/batch"):
            return "ref" not in json.loads(body)
        return "create_pr=1" in self.path or "/refs/pr/" in path

    def create(self, wanted: dict[str, Any]) -> None:
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if not self.writes(repo_id):
            return self.refuse(403, "you have no right to create a repository here")
        kind = wanted.get("type") or "model"
        there = (kind, repo_id) in self.hub.repos
        if not there:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.add_repo(repo_id, kind, private)
        answer = {"url": f"{self.hub.url}/{repo_id}"}
        self.json(answer, 409 if there else 200)

    def find(self, repo: Repo, ref: str) -> str | None:
        return ref if ref in repo.commits else repo.refs.get(ref)

    def info(self, repo_id, repo, ref, query, body) -> None:
        sha = self.find(repo, ref or "main")
        if sha is None:
            return self.refuse(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        siblings = []
        for name, file in sorted(repo.commits[sha].items()):
            entry: dict[str, Any] = {"rfilename": name}
            if "blobs" in query:
                entry |= {"size": len(file.content), "blobId": file.blob}
                if file.large:
                    size = len(file.content)
                    entry["lfs"] = {"sha256": file.sha256, "size": size, "pointerSize": 130}
            siblings.append(entry)
        self.json({"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})

    def preupload(self, repo_id, repo, ref, query, body) -> None:
        there = repo.commits[self.find(repo, ref)]
        files = []
        for wanted in json.loads(body)["files"]:
            name = wanted["path"]
            large = name.endswith(".safetensors") or wanted["size"] >= 10_000_000
            oid = None
            if name in there:
                oid = there[name].sha256 if large else there[name].blob
            mode = "lfs" if large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": files})

    def batch(self, repo_id, repo, rest, query, body) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                href = f"{self.hub.storage}/storage/{wanted['oid']}?{SIGNATURE}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects})

    def store(self, oid: str, query: dict[str, list[str]], body: bytes) -> None:
        if SIGNATURE not in self.path:
            return self.refuse(403, "not signed")
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return self.refuse(400, "other bytes than announced")
            self.hub.large[oid] = body
            return self.reply(200, b"", ETag=f'"{oid}"')
        content = self.hub.alter("large", self.hub.large[oid])
        self.reply(200, content, ETag=f'"{oid}"')

    def commit(self, repo_id, repo, ref, query, body) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        base = self.find(repo, ref)
        if header.get("parentCommit") not in (None, base):
            return self.refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[base])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.refuse(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.large[value["oid"]], True)
            else:
                return self.refuse(400, f"unknown operation {line['key']}")
        address = None
        if "create_pr" in query:
            number = len(repo.pull_requests) + 1
            ref = f"refs/pr/{number}"
            pull_request = {"num": number, "title": header["summary"], "status": "open"}
            repo.pull_requests.append(pull_request | {"author": {"name": self.user}})
            address = f"{self.hub.url}/{repo_id}/discussions/{number}"
        sha = repo.commit(files, ref)
        if self.hub.answers_lost:
            self.hub.answers_lost -= 1
            return self.hang_up()
        answer = {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        self.json(answer | {"pullRequestUrl": address})

    def branch(self, repo_id, repo, ref, query, body) -> None:
        if ref in repo.refs:
            return self.refuse(409, "Reference already exists")
        repo.refs[ref] = repo.refs["main"]
        self.json({})

    def discussions(self, repo_id, repo, rest, query, body) -> None:
        common = {
            "createdAt": "2026-01-01T00:00:00.000Z",
            "isPullRequest": True,
            "repo": {"name": repo_id, "type": "model"},
        }
        found = [p | common for p in repo.pull_requests if p["status"] == "open"]
        self.json({"count": len(found), "start": 0, "discussions": found})

    def resolve(self, repo_id, repo, rest, query, body) -> None:
        for ref in sorted({*repo.commits, *repo.refs}, key=len, reverse=True):
            if rest.startswith(ref + "/"):
                break
        else:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        sha, name = self.find(repo, ref), rest.removeprefix(ref + "/")
        file = repo.commits[sha].get(name)
        if file is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        headers = {"X_Repo_Commit": str(sha), "ETag": f'"{file.blob}"'}
        if file.large:
            headers |= {
                "X_Linked_ETag": f'"{file.sha256}"',
                "X_Linked_Size": str(len(file.content)),
                "Location": f"{self.hub.storage}/storage/{file.sha256}?{SIGNATURE}",
            }
            return self.reply(302, b"", **headers)
        self.reply(200, self.hub.alter(name, file.content), **headers)
