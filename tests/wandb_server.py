"""A stand-in for the W&B server on 127.0.0.1: as much of it as a run of W&B 0.31 and ``wandb sync`` ask for.

    with WandbServer() as server:
        ...  # processes with server.environment(home) in their environment
        server.runs["run-id"].history

``server.answer`` is what it does: "ok", a status of HTTP that every request gets ("401", "500") or "hang". ``stop`` and
``start`` take it away and bring it back, with all that it has received.
"""

import base64
import gzip
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

ENTITY = "tester"
PROJECT = {"id": "UHJvamVjdDp2MTp4", "name": "watchrl", "entity": {"id": "RW50aXR5OjE=", "name": ENTITY}}


@dataclass
class Run:
    """What has arrived of a run. ``history`` and ``events`` are rows, ``files`` the contents by name."""

    name: str
    history: list = field(default_factory=list)
    events: list = field(default_factory=list)
    console: list = field(default_factory=list)
    files: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)  # displayName, groupName, jobType ...
    exit_code: int | None = None

    def bucket(self) -> dict:
        common = {"id": base64.b64encode(self.name.encode()).decode(), "name": self.name, "project": PROJECT}
        common |= {"displayName": self.fields.get("displayName"), "config": self.fields.get("config", "{}")}
        common |= {"historyLineCount": len(self.history), "eventsLineCount": len(self.events), "tags": []}
        common |= {"historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]), "eventsTail": "[]"}
        common |= {"logLineCount": len(self.console), "summaryMetrics": json.dumps(self.summary)}
        return common | {"wandbConfig": json.dumps({"t": 1}), "sweepName": None, "notes": None}


class WandbServer:
    def __init__(self):
        self.answer = "ok"
        self.runs: dict[str, Run] = {}
        self.artifacts: list[dict] = []  # collection, type, state, files
        self.asked = threading.Event()  # set by every request
        self.released = threading.Event()  # lets go of the requests that hang
        self.port = 0
        self.start()

    def start(self) -> None:
        handler = type("BoundHandler", (Handler,), {"stand_in": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.http.handle_error = lambda *_: None  # a client that was killed
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: Path) -> dict:
        return os.environ | {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "k" * 40, "HOME": str(home)}

    def graphql(self, operation: str, variables: dict) -> dict:
        """The answer's data; an operation that is not known here gets nothing."""
        name = variables.get("name") or variables.get("run")
        if operation == "Viewer":
            viewer = {"id": "VXNlcjox", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            run = self.runs.get(name)
            return {"model": PROJECT | {"bucket": run.bucket() if run else None}}
        if operation == "UpsertBucket":
            known = name in self.runs
            run = self.runs.setdefault(name, Run(name))
            run.fields |= {key: value for key, value in variables.items() if value is not None}
            return {"upsertBucket": {"bucket": run.bucket(), "inserted": not known}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/run/{name}/{quote(file)}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":
            given = variables["input"]
            collection = given["artifactCollectionName"]
            self.artifacts.append({"collection": collection, "type": given["artifactTypeName"], "files": {}})
            artifact = {"id": str(len(self.artifacts) - 1), "state": "PENDING"}
            return {"createArtifact": {"artifact": artifact | {"artifactSequence": {"latestArtifact": None}}}}
        if operation == "CreateArtifactManifest":
            number = variables["artifactID"]
            file = {"id": "file", "uploadUrl": f"{self.url}/artifact/{number}/manifest", "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": number, "file": file}}}
        if operation == "CreateArtifactFiles":
            edges = [{"node": self.artifact_file(file)} for file in variables["input"]["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            number = variables["artifactID"]
            self.artifacts[int(number)]["state"] = "COMMITTED"
            return {"commitArtifact": {"artifact": {"id": number, "digest": ""}}}
        return {}

    def artifact_file(self, file: dict) -> dict:
        number, name = file["artifactID"], file["name"]
        found = {"storagePath": name, "uploadUrl": f"{self.url}/artifact/{number}/{quote(name)}", "uploadHeaders": []}
        return found | {"uploadMultipartUrls": None, "artifact": {"id": number}}

    def stream(self, name: str, request: dict) -> None:
        """Rows of a run: each piece says at which row it begins."""
        run = self.runs.setdefault(name, Run(name))
        lists = {"wandb-history.jsonl": run.history, "wandb-events.jsonl": run.events, "output.log": run.console}
        for file, piece in (request.get("files") or {}).items():
            content, offset = piece["content"], piece.get("offset", 0)
            if file == "wandb-summary.json":
                run.summary = json.loads(content[-1])
            elif file in lists:
                rows = content if file == "output.log" else [json.loads(line) for line in content]
                lists[file][offset : offset + len(rows)] = rows
        if request.get("complete"):
            run.exit_code = request.get("exitcode")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.stand_in.asked.set()
        if self.stand_in.answer == "hang":
            self.stand_in.released.wait(600)
        if self.stand_in.answer not in ("ok", "hang"):
            return self.reply({"errors": [{"message": "as asked for"}]}, int(self.stand_in.answer))
        place = [unquote(part) for part in self.path.strip("/").split("/")]
        answer = {}
        if self.path == "/graphql":
            request = json.loads(body)
            operation = request.get("operationName") or re.search(r"(query|mutation) (\w+)", request["query"])[2]
            answer = {"data": self.stand_in.graphql(operation, request.get("variables") or {})}
        elif place[-1] == "file_stream":
            self.stand_in.stream(place[3], json.loads(body))
        elif place[0] == "run":
            self.stand_in.runs[place[1]].files["/".join(place[2:])] = body
        elif place[0] == "artifact":
            self.stand_in.artifacts[int(place[1])]["files"][place[2]] = body
        self.reply(answer)

    do_GET = do_PUT = do_POST

    def reply(self, answer: dict, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Nothing on the console of the tests."""
