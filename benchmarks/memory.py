"""Peak memory of one forward pass on CPU, beside x-transformers with the same flags.

Each pass runs in a process of its own; what is measured is the peak resident size of that process. x-transformers has
no tiled form of ALiBi: it builds a bias of heads x T x T, so it is given a limit and stops there.

    python benchmarks/memory.py                          # about 5 minutes on 2 cores
    python benchmarks/memory.py --lengths 4096,8192
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from andromeda.config import preset

GIB = 2**30
LIMIT = 16 * GIB  # of address space for the peer
LENGTHS = (2048, 8192, 32768, 131072)
PEER_STOPS = 32768  # its bias of one layer alone is 24 GiB there


def forward(who: str, length: int) -> None:
    """Prints seconds and peak bytes of one pass over `length` tokens by preset nano."""
    config, ids = preset("nano"), torch.randint(2048, (1, length), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    if who == "andromeda":
        from andromeda.model import Andromeda

        model: torch.nn.Module = Andromeda(config)
    else:
        from x_transformers import Decoder, TransformerWrapper

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
        layers = Decoder(
            dim=config.dim, depth=config.depth, heads=config.heads, attn_dim_head=config.dim_head, attn_flash=True,
            alibi_pos_bias=True, alibi_num_heads=config.alibi_num_heads, rotary_xpos=True, shift_tokens=1,
            attn_one_kv_head=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True, ff_relu_squared=True,
        )  # fmt: skip
        model = TransformerWrapper(
            num_tokens=config.num_tokens, max_seq_len=length, attn_layers=layers, use_abs_pos_emb=False
        )
    began = time.perf_counter()
    with torch.inference_mode():
        logits = model.eval()(ids)
    assert logits.shape == (1, length, config.num_tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": peak}))


def measure(who: str, length: int) -> dict[str, float] | None:
    """None: it ran out of memory."""
    call = [sys.executable, __file__, "--forward", who, "--lengths", str(length)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode == 0:
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return figures
    if "memory" not in done.stderr:
        sys.exit(done.stderr)
    return None


def _cells(figures: dict[str, float] | None) -> str:
    return f"{figures['bytes'] / GIB:.2f} | {figures['seconds']:.1f}" if figures else f"> {LIMIT / GIB:.0f} | -"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, with commas")
    parser.add_argument("--forward", choices=("andromeda", "x-transformers"), help="one pass in this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    if args.forward:
        forward(args.forward, lengths[0])
        return
    rows = []
    print("| tokens | Andromeda nano, GiB | seconds | x-transformers, GiB | seconds |\n|---:|---:|---:|---:|---:|")
    for length in lengths:
        ours = measure("andromeda", length)
        tried = length <= PEER_STOPS
        peer = measure("x-transformers", length) if tried else None
        theirs = _cells(peer) if tried else "not run | -"
        print(f"| {length:,} | {_cells(ours)} | {theirs} |", flush=True)
        rows.append({"tokens": length, "andromeda": ours, "x-transformers": peer})
    print(f"\n{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
