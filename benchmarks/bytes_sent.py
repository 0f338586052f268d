"""Bytes that two processes of a small model send for a token: DDP, DiLoCo and local SGD.

    python benchmarks/bytes_sent.py

All that crosses the loopback of a network namespace of its own, which nobody else uses: what the processes send each
other, and the launcher or the lighthouse too. A token is one of a step's, of DiLoCo's two groups together. Linux;
needs the extra [diloco].
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from andromeda.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
FIRST, LAST, EVERY = 20, 120, 20  # steps between which is measured, and between two exchanges
STEP = 2 * 2 * 16  # tokens
RECIPE = {
    "model": {
        "preset": "nano", "dim": 32, "depth": 2, "heads": 4, "alibi_num_heads": 2, "dim_head": 8, "max_seq_len": 16,
    },
    "data": {"train": str(ROOT / "examples" / "verse" / "validation.txt")},
    "tokenizer": {"vocab_size": 300}, "batch_size": 2, "accumulate": 2, "steps": LAST, "schedule": "constant",
    "log_every": 1, "save_every": LAST,
}  # fmt: skip
LIGHTHOUSE = "127.0.0.1:29510"
KINDS = ("ddp", "diloco", "local_sgd")


def isolated() -> None:
    """Starts this script once more, in a network namespace."""
    again = ["unshare", "--user", "--map-root-user", "--net", sys.executable, *sys.argv, "--isolated"]
    raise SystemExit(subprocess.call(again, env=os.environ | {"OMP_NUM_THREADS": "1"}))


def raise_loopback() -> None:
    with socket.socket() as any_socket:
        up, set_flags = 0x1, 0x8914  # IFF_UP, SIOCSIFFLAGS of netdevice(7)
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up))


def crossed() -> int:
    rows = Path("/proc/net/dev").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.strip().startswith("lo:"))


def commands(kind: str, recipe: Path, outputs: Sequence[Path]) -> list[list[str]]:
    train = ["-m", "andromeda", "train", str(recipe)]
    if kind == "ddp":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
        return [[sys.executable, *torchrun, *train, f"output={outputs[0]}"]]
    house = Path(sys.executable).with_name("torchft_lighthouse")
    section = json.dumps({"lighthouse": f"http://{LIGHTHOUSE}", "host": "127.0.0.1", "every": EVERY, "method": kind})
    groups = [
        [sys.executable, *train, f"output={output}", f"seed={seed}", f"diloco={section}"]
        for seed, output in enumerate(outputs)
    ]
    return [[str(house), "--bind", LIGHTHOUSE, "--min_replicas", "2", "--join_timeout_ms", "60000"], *groups]


def reached(outputs: Sequence[Path]) -> int:
    """The step that all have logged."""
    return min(max((line["step"] for line in read_metrics(path / "metrics.jsonl")), default=0) for path in outputs)


def wait_for(step: int, outputs: Sequence[Path], running: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """The step that is reached then, and bytes so far."""
    while (now := reached(outputs)) < step:
        if any(process.poll() for process in running):
            raise SystemExit(f"one failed: {[process.args for process in running if process.poll()]}")
        time.sleep(0.002)
    return now, crossed()


def bytes_per_token(kind: str) -> float:
    with TemporaryDirectory() as name:
        folder = Path(name)
        outputs = [folder / "one"] if kind == "ddp" else [folder / "one", folder / "two"]
        recipe = folder / "small.yaml"
        recipe.write_text(json.dumps(RECIPE))  # which YAML is, too
        running = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for command in commands(kind, recipe, outputs)
        ]
        try:
            begin, before = wait_for(FIRST, outputs, running)
            end, after = wait_for(LAST, outputs, running)
            for process in running[0 if kind == "ddp" else 1 :]:
                process.wait()
        finally:
            for process in running:
                with suppress(ProcessLookupError):
                    process.terminate()
                process.wait()
    return (after - before) / ((end - begin) * STEP * len(outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    if not parser.parse_args().isolated:
        isolated()
    raise_loopback()
    for kind in KINDS:
        print(f"{kind}: {bytes_per_token(kind):,.0f} bytes a token", flush=True)


if __name__ == "__main__":
    main()
