"""As much of an MLflow server as runs need, which can be told to fail."""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_HANG_SECONDS = 600.0


class FakeMlflow:
    """Keeps runs and their metrics; fails while the file `failing` stands in its folder, which a
    process of a job can write.

    Args:
        fails_with: "dies" closes each connection, "hangs" never answers, or a status.
    """

    def __init__(self, folder: Path, fails_with: str) -> None:
        folder.mkdir(parents=True)
        self._folder, self._fails_with = folder, fails_with
        self._runs: dict[str, dict[str, Any]] = {}
        self._metrics: list[dict[str, Any]] = []
        self._is_over = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake._answer(self)

            do_POST = do_PATCH = do_PUT = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"

    @classmethod
    @contextmanager
    def started(cls, folder: Path, fails_with: str) -> Iterator["FakeMlflow"]:
        fake = cls(folder, fails_with)
        thread = threading.Thread(target=fake._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            fake._is_over.set()
            fake._server.shutdown()
            fake._server.server_close()
            thread.join()

    def fail(self) -> None:
        (self._folder / "failing").touch()

    def mend(self) -> None:
        (self._folder / "failing").unlink(missing_ok=True)

    def points(self, name: str) -> dict[int, float]:
        """The values of a metric that arrived, by step; of several of one step the last."""
        return {m["step"]: m["value"] for m in self._metrics if m["key"] == name}

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if (self._folder / "failing").exists():
            if self._fails_with == "hangs":
                self._is_over.wait(_HANG_SECONDS)
            if self._fails_with.isdigit():
                self._reply(request, int(self._fails_with), {"message": "as it was told"})
            request.close_connection = True
            return
        fields = json.loads(body) if body.startswith(b"{") else {}
        self._reply(request, 200, self._result_of(request.path.partition("?")[0], fields))

    def _reply(self, request: BaseHTTPRequestHandler, status: int, result: Any) -> None:
        data = json.dumps(result).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _result_of(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        experiment = {
            "experiment_id": "1",
            "name": "tokendiff",
            "lifecycle_stage": "active",
            "artifact_location": (self._folder / "artifacts").as_uri(),
        }
        match path.rpartition("/mlflow/")[2]:
            case "experiments/search":
                return {"experiments": [experiment]}
            case "experiments/get-by-name" | "experiments/get":
                return {"experiment": experiment}
            case "runs/create":
                run_id = uuid.uuid4().hex
                self._runs[run_id] = {
                    "run_id": run_id,
                    "run_uuid": run_id,
                    "experiment_id": "1",
                    "status": "RUNNING",
                    "lifecycle_stage": "active",
                    "start_time": int(time.time() * 1000),
                    "artifact_uri": (self._folder / "artifacts" / run_id).as_uri(),
                }
                return {"run": {"info": self._runs[run_id], "data": {}}}
            case "runs/get":
                return {"run": {"info": next(reversed(self._runs.values())), "data": {}}}
            case "runs/update":
                return {"run_info": self._runs[fields["run_id"]]}
            case "runs/log-batch":
                self._metrics += fields.get("metrics", [])
        return {}
