"""`andromeda serve` as a process: what it needs, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import httpx
import pytest
import torch

from andromeda.checkpoint import save_checkpoint
from andromeda.cli import main
from andromeda.config import AndromedaConfig
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from tests.forks import forks

ROOT = Path(__file__).parents[2]
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "verse"
    tokenizer = Tokenizer.train(["The sea, the sea! user assistant\n" * 3], vocab_size=290)
    torch.manual_seed(5)
    config = AndromedaConfig(
        num_tokens=tokenizer.vocab_size, max_seq_len=64, dim=16, depth=2, dim_head=8, heads=2, alibi_num_heads=1
    )  # fmt: skip
    save_checkpoint(folder, Andromeda(config), files=tokenizer.save)
    return folder


class Process:
    """A server of its own.

    Attributes:
        log: its lines so far, as objects.
    """

    def __init__(self, directory: Path, *arguments: str, key: str | None = None) -> None:
        read, write = Pipe(duplex=False)
        command = ["serve", str(directory), "--port", "0", *arguments]
        self.process = forks().Process(target=_serve, args=(command, key, write))
        self.process.start()
        write.close()
        self.log: list[dict[str, Any]] = []
        self._said = os.fdopen(os.dup(read.fileno()))
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.url = f"http://127.0.0.1:{self.wait_for('listening')['port']}"
        except BaseException:
            self.end()
            raise

    def _read(self) -> None:
        for line in self._said:
            self._lines.put(line)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None: it runs on."""
        self.process.join(seconds)
        return self.process.exitcode

    def wait_for(self, message: str, seconds: float = 120) -> dict[str, Any]:
        """The next line of the log with this message."""
        while True:
            try:
                text = self._lines.get(timeout=seconds)
            except Empty:
                raise AssertionError(f"{message!r} did not come; what did: {self.log}") from None
            try:
                line = json.loads(text)
            except ValueError:
                line = {"message": text}
            self.log.append(line)
            if line["message"] == message:
                return line

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(arguments: list[str], key: str | None, errors: Connection) -> None:
    """Like `andromeda` with these arguments, and with its standard error at the other end."""
    os.dup2(errors.fileno(), 2)
    errors.close()
    torch.set_num_threads(1)
    os.environ.pop("ANDROMEDA_API_KEY", None)
    if key is not None:
        os.environ["ANDROMEDA_API_KEY"] = key
    sys.exit(main(arguments))


@pytest.fixture
def start(directory: Path) -> Iterator[Any]:
    processes: list[Process] = []

    def run(*arguments: str, key: str | None = None) -> Process:
        processes.append(Process(directory, *arguments, key=key))
        return processes[-1]

    yield run
    for process in processes:
        process.end()


def long_text(directory: Path, model: str) -> dict[str, Any]:
    """A request whose text does not end by itself."""
    never = {str(token): -100 for token in Tokenizer.load(directory).stop_ids}
    return {"model": model, "prompt": "a secret of the sea", "max_tokens": 500, "stream": True, "logit_bias": never}


def test_sigterm_ends_what_is_begun_and_then_the_process(start, directory):
    server = start()
    assert httpx.get(f"{server.url}/health").status_code == 200, "while the model is loaded"
    server.wait_for("ready")
    assert httpx.get(f"{server.url}/ready").status_code == 200
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=long_text(directory, "verse"), timeout=120
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and len(rest) > 10
    assert server.wait(60) == 0
    stopped = server.wait_for("stopped")
    assert stopped["level"] == "info"
    assert all("level" in line for line in server.log), "every line is an object"
    text = json.dumps(server.log)
    assert "secret" not in text and '"route": "/v1/completions"' in text and "traceback" not in text


def test_a_second_sigterm_ends_it_at_once(start, directory):
    server = start("--name", "sea", key=KEY)
    server.wait_for("ready")
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"][0]["id"] == "sea"
    body = long_text(directory, "sea")
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/ready", headers=headers).status_code == 200:
            pass
        server.signal(signal.SIGTERM)
        assert server.wait(10) == 128 + signal.SIGTERM
    assert KEY not in json.dumps(server.log)


def test_sigterm_while_the_model_is_loaded_ends_it(start):
    server = start()
    httpx.get(f"{server.url}/ready")  # it runs; should the model be there already, it ends in the same way
    server.signal(signal.SIGTERM)
    assert server.wait(60) == 0


@pytest.mark.slow
def test_replicas_are_renewed_on_sighup_and_end_with_the_server(start, directory):
    pytest.importorskip("ray")
    server = start("--replicas", "2")
    server.wait_for("ready", seconds=300)
    body = {**long_text(directory, "verse"), "max_tokens": 20, "stream": False, "seed": 1}
    before = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
    server.signal(signal.SIGHUP)
    server.wait_for("renewed", seconds=300)
    after = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
    assert before["choices"] == after["choices"]
    server.signal(signal.SIGTERM)
    assert server.wait(120) == 0


# ---- what is refused before it starts ----------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANDROMEDA_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.invalid"])
def test_other_addresses_demand_a_key(capsys, host):
    assert "ANDROMEDA_API_KEY" in refusal(capsys, "nowhere", "--host", host)


def test_a_key_is_one_and_is_sound(capsys, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("short\n")
    assert "holds no API key" in refusal(capsys, "nowhere", "--api-key-file", str(tmp_path / "key"))
    assert "cannot be read" in refusal(capsys, "nowhere", "--api-key-file", str(tmp_path / "none"))
    monkeypatch.setenv("ANDROMEDA_API_KEY", "")
    assert "ANDROMEDA_API_KEY holds no API key" in refusal(capsys, "nowhere")
    monkeypatch.setenv("ANDROMEDA_API_KEY", KEY)
    assert "not both" in refusal(capsys, "nowhere", "--api-key-file", str(tmp_path / "key"))


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_is_not_installed_is_told(capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith("andromeda.serving")]:
        monkeypatch.delitem(sys.modules, module)
    assert "pip install 'andromeda-lm[serve]'" in refusal(capsys, "nowhere")


def test_a_port_that_is_taken_is_told(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refusal(capsys, "nowhere", "--port", str(taken.getsockname()[1]))
    assert "cannot listen" in refusal(capsys, "nowhere", "--port", "123456")


def test_a_model_that_is_not_there_is_told(directory):
    command = [sys.executable, "-m", "andromeda", "serve", str(directory / "nowhere"), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("andromeda: error: ")
