"""Many clients at once, for minutes, against a server at a real port: no error, no page lost, and how long each waited.

    python benchmarks/serving_load.py --clients 64 --minutes 5

Starts `andromeda serve` by itself. Each client asks one thing after another, half of them streamed: conversations that
begin alike, completions, tools and schemas, texts of 8 to 64 tokens. Writes results/serving_load.json and a picture.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import torch

from andromeda.checkpoint import save_checkpoint
from andromeda.config import preset
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "parameters": {"type": "object", "properties": {"high": {"type": "boolean"}}, "required": ["high"]},
    },
}
SCHEMA = {"type": "object", "properties": {"fish": {"enum": ["cod", "eel"]}}, "required": ["fish"]}
FORM = {"type": "json_schema", "json_schema": {"name": "catch", "schema": SCHEMA}}
SYSTEM = "You know the sea, its tides and its winds, and you answer in verse. " * 8


class Client:
    """One of many: what it asked, how it ended, and how long it waited.

    Attributes:
        ends: by kind, and `ok` or the error.
        first, whole, between: seconds to the first token of a stream, to the end of an answer, and from token to token.
    """

    def __init__(self, url: str, model: str, number: int) -> None:
        self._client: Any = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self._model, self._random = model, random.Random(number)
        self.ends: Counter[str] = Counter()
        self.first: list[float] = []
        self.whole: list[float] = []
        self.between: list[float] = []
        self.tokens = 0

    async def run(self, ends: float) -> None:
        while time.monotonic() < ends:
            kind = self._random.choice(["chat", "chat", "completion", "tool", "schema"])
            started = time.perf_counter()
            try:
                await self._ask(kind, stream=self._random.random() < 0.5)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.ends[f"{kind}: {type(error).__name__}: {error}"] += 1
                await asyncio.sleep(1)
            else:
                self.ends["ok"] += 1
                self.whole.append(time.perf_counter() - started)

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, kind: str, stream: bool) -> None:
        asked: dict[str, Any] = {"model": self._model, "max_tokens": self._random.randint(8, 64)}
        if kind == "completion":
            asked["prompt"] = f"THE SEA, canto {self._random.randint(1, 40)}\n\n"
            create = self._client.completions.create
        else:
            question = {"role": "user", "content": f"Verse {self._random.randint(1, 1000)} of the tide, please."}
            asked["messages"] = [{"role": "system", "content": SYSTEM}, question]
            create = self._client.chat.completions.create
        if kind == "tool":
            asked |= {"tools": [TOOL], "tool_choice": "required"}
        if kind == "schema":
            asked["response_format"] = FORM
        if not stream:
            self.tokens += (await create(**asked)).usage.completion_tokens
            return
        started = latest = time.perf_counter()
        chunks = await create(**asked, stream=True, stream_options={"include_usage": True})
        begun = False
        async for chunk in chunks:
            now = time.perf_counter()
            if chunk.usage is not None:
                self.tokens += chunk.usage.completion_tokens
            elif not begun:
                self.first.append(now - started)
                begun = True
            else:
                self.between.append(now - latest)
            latest = now


async def load(url: str, model: str, clients: int, seconds: float) -> list[Client]:
    made = [Client(url, model, number) for number in range(clients)]
    ends = time.monotonic() + seconds
    await asyncio.gather(*(client.run(ends) for client in made))
    await asyncio.gather(*(client.close() for client in made))
    return made


def random_model(folder: Path) -> str:
    """`nano` with random weights and a vocabulary of verse."""
    texts = (Path(__file__).parents[1] / "examples" / "verse" / "validation.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.train(texts.split("\n\n"), 1024)
    torch.manual_seed(0)
    save_checkpoint(folder, Andromeda(preset("nano", num_tokens=tokenizer.vocab_size)), files=tokenizer.save)
    return str(folder)


# ---- the server --------------------------------------------------------------------------------------


class Server:
    """`andromeda serve DIR` in a process of its own, with its log in a file."""

    def __init__(self, directory: str, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "andromeda", "serve", directory, "--port", "0"]
        with log.open("w") as stderr:
            self.process = psutil.Popen(command, stderr=stderr)
        while not (ready := self._said("ready")):
            if self.process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        (listening,) = self._said("listening")
        self.url, self.model = f"http://127.0.0.1:{listening['port']}", ready[0]["model"]

    def _said(self, message: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line["message"] == message]

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return {name: float(value) for name, value in re.findall(r"^(andromeda_\S+) (\S+)$", text, re.MULTILINE)}

    def end(self) -> int:
        """By SIGTERM; its exit code."""
        self.process.terminate()
        return int(self.process.wait(60))


def measure(server: Server, clients: int, minutes: float) -> dict[str, Any]:
    """The load, and what is left behind it."""
    asyncio.run(load(server.url, server.model, 4, 10))  # what is allocated once
    memory, before, started = server.process.memory_info().rss, server.metrics(), time.monotonic()
    made = asyncio.run(load(server.url, server.model, clients, 60 * minutes))
    seconds = time.monotonic() - started
    after = server.metrics()
    ends = sum((client.ends for client in made), Counter[str]())
    drawn = after["andromeda_engine_new_tokens_total"] - before["andromeda_engine_new_tokens_total"]
    cached = after["andromeda_engine_cached_tokens_total"] - before["andromeda_engine_cached_tokens_total"]
    prompts = after["andromeda_engine_prompt_tokens_total"] - before["andromeda_engine_prompt_tokens_total"]
    return {
        "clients": clients,
        "seconds": seconds,
        "answered": ends.pop("ok", 0),
        "errors": dict(ends),
        "tokens": sum(client.tokens for client in made),
        "drawn_tokens": drawn,
        "prompt_tokens": prompts,
        "cached_prompt_tokens": cached,
        "left": {name: after[f"andromeda_{name}"] for name in ("texts", "engine_running", "engine_used_pages")},
        "memory_bytes": {"before": memory, "after": server.process.memory_info().rss},
        "first": sorted(value for client in made for value in client.first),
        "between": sorted(value for client in made for value in client.between),
        "whole": sorted(value for client in made for value in client.whole),
    }


# ---- what is written ---------------------------------------------------------------------------------

SHOWN = {"first": "to the first token", "between": "between tokens", "whole": "to the end of the answer"}
PERCENTILES = (50, 90, 99, 100)


def report(found: dict[str, Any]) -> str:
    lines = [
        "| milliseconds | " + " | ".join(f"{p}%" for p in PERCENTILES) + " |",
        "|---|" + "---:|" * len(PERCENTILES),
    ]
    for name, shown in SHOWN.items():
        values = [1000 * float(np.percentile(found[name], p)) for p in PERCENTILES]
        lines.append(f"| {shown} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
    left, memory = found["left"], {key: value / 2**20 for key, value in found["memory_bytes"].items()}
    return "\n".join([
        f"{found['answered']:,} answers, {sum(found['errors'].values())} errors in {found['seconds']:.0f} s; "
        f"{found['tokens'] / found['seconds']:,.0f} tokens/s written, {found['prompt_tokens'] / found['seconds']:,.0f} "
        f"of prompts taken, {found['cached_prompt_tokens'] / found['prompt_tokens']:.0%} of them from the prefix cache",
        "", *lines, "",
        f"left: {left}; memory {memory['before']:.0f} MiB before, {memory['after']:.0f} MiB after",
        *(f"{number} x {error}" for error, number in found["errors"].items()),
    ])  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, shown) in zip(figure.subplots(1, 3), SHOWN.items(), strict=True):
        values = 1000 * np.array(found[name])
        bins, percent = np.geomspace(max(values[0], 0.1), values[-1], 50), np.full(len(values), 100 / len(values))
        axes.hist(values, bins=bins.tolist(), weights=percent, color="#2c5f9e")
        axes.set(xscale="log", xlabel="ms", ylabel="%", title=shown)
        axes.xaxis.set_minor_formatter(NullFormatter())  # its labels would lie on each other
        axes.grid(alpha=0.3)
    figure.suptitle(f"{found['clients']} clients, {found['answered']:,} answers")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or a run (default: nano with random weights)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments.model or random_model(Path(folder, "nano")), Path(folder, "log"))
        try:
            found = measure(server, arguments.clients, arguments.minutes)
        finally:
            code = server.end()
    print(report(found), f"\nexit code {code}, torch {torch.__version__}, {os.cpu_count()} cores")
    draw(found, arguments.out / "serving_load.png")
    for name in SHOWN:  # a thousand quantiles say as much
        found[name] = [round(float(value), 5) for value in np.percentile(found[name], np.linspace(0, 100, 1001))]
    (arguments.out / "serving_load.json").write_text(json.dumps(found) + "\n")
    if found["errors"] or any(found["left"].values()) or code:
        raise SystemExit("not all is well")


if __name__ == "__main__":
    main()
