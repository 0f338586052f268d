"""What fp8 products cost in quality: bits per byte, and how far the logits move, against the same model in bf16.

Without a model directory a byte-level model is trained first, for minutes, on examples/verse. The yardstick beside fp8
is bf16 itself: how far it moves from float32.

    python benchmarks/fp8_quality.py --json fp8.json                       # trains; one GPU
    python benchmarks/fp8_quality.py --model runs/verse --text book.txt
    TRITON_INTERPRET=1 python benchmarks/fp8_quality.py --check            # a CPU, tiny
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.inference.loading import load_model
from andromeda.inference.prefill import Prefill
from andromeda.model import Andromeda

VERSE = Path(__file__).parents[1] / "examples" / "verse"
BYTES = AndromedaConfig(
    num_tokens=256, max_seq_len=256, dim=512, depth=8, dim_head=64, heads=8, alibi_num_heads=4
)  # fmt: skip
TINY = AndromedaConfig(num_tokens=256, max_seq_len=64, dim=64, depth=3, dim_head=32, heads=2, alibi_num_heads=1)
BATCH = 64
WARMUP = 50  # steps

Hidden = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """One way to compute the same model; the differences are to the way named in `against`."""

    way: str
    bits_per_byte: float
    against: str | None = None
    relative_error: float | None = None  # of the logits, their mean over the vocabulary left out
    kl: float | None = None  # mean over tokens, nats
    same_top: float | None = None  # share of tokens with the same likeliest next one


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.model:
        model, tokenizer = load_model(options.model)
        text = Path(options.text).read_text(encoding="utf-8")
        ids, num_bytes = torch.tensor(tokenizer.encode(text)), len(text.encode())
    else:
        model = train(TINY if options.check else BYTES, 3 if options.check else options.steps, options.lr, device)
        ids = as_bytes((VERSE / "validation.txt").read_text(encoding="utf-8"))
        num_bytes = len(ids)
    length, limit = (64, 128) if options.check else (options.length, options.tokens)
    scores = compare(model.eval().requires_grad_(False), ids[:limit].to(device), length, num_bytes / len(ids))
    for score in scores:
        print(line(score), flush=True)
    one, other = (next(s.bits_per_byte for s in scores if s.way == way) for way in ("bf16", "fp8"))
    print(f"fp8 costs {other / one - 1:+.3%} in bits per byte")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; without it one is trained")
    parser.add_argument("--text", default=str(VERSE / "validation.txt"), help="what such a model is asked about")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument("--tokens", type=int, default=131072, help="at most, of the text")
    parser.add_argument("--json", help="file to write to")
    parser.add_argument("--check", action="store_true", help="tiny shapes and a few steps")
    return parser.parse_args()


def train(config: AndromedaConfig, steps: int, lr: float, device: torch.device) -> Andromeda:
    """The plain model on bytes of verse, in bf16 where there is a GPU."""
    with (VERSE / "train.jsonl").open(encoding="utf-8") as file:
        corpus = as_bytes("\n\n".join(json.loads(row)["text"] for row in file)).to(device)
    model = Andromeda(config).to(device)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "gain" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() <= 1 or "gain" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
    )
    began, length = time.perf_counter(), config.max_seq_len
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        first = torch.randint(len(corpus) - length - 1, (BATCH if device.type == "cuda" else 4, 1), device=device)
        batch = corpus[first + torch.arange(length + 1, device=device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.token_losses(batch[:, :-1], batch[:, 1:]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            bits = loss.item() / math.log(2)
            print(f"step {step + 1}: {bits:.3f} bits a byte, {time.perf_counter() - began:.0f} s", flush=True)
    return model


def compare(model: Andromeda, ids: Tensor, length: int, bytes_per_token: float) -> list[Score]:
    """The model in float32, bf16 and fp8 over the same windows; each against the one before."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    ways: dict[str, Hidden] = {"float32": model.float().hidden}
    half = model if windows.device.type == "cpu" else bfloat16_copy(model)
    for precision in ("bf16", "fp8"):
        interpreted = "fp32" if windows.device.type == "cpu" and precision == "bf16" else precision
        runner = Prefill(half, interpreted)
        if runner.reason is not None:
            raise SystemExit(f"{precision}: {runner.reason}")
        ways[precision] = runner.hidden
    names, sums = list(ways), dict.fromkeys(ways, torch.zeros(6, dtype=torch.float64, device=windows.device))
    for window in windows:
        logits = {name: logits_of(model, way, window) for name, way in ways.items()}
        for before, name in zip([None, *names], names, strict=False):
            truth = None if before is None else logits[before]
            sums[name] = sums[name] + measures(logits[name], truth, window)
    return [
        score(name, before, sums[name].tolist(), bytes_per_token)
        for before, name in zip([None, *names], names, strict=False)
    ]


def bfloat16_copy(model: Andromeda) -> Andromeda:
    copy = Andromeda(model.config).to(next(model.parameters()).device)
    copy.load_state_dict(model.state_dict())
    return copy.bfloat16().eval().requires_grad_(False)


@torch.no_grad()
def logits_of(model: Andromeda, way: Hidden, window: Tensor) -> Tensor:
    """(T, num_tokens) float32; the projection to the vocabulary itself is in float32 always."""
    return model.logits(way(window[None]).float())[0].float()


def measures(logits: Tensor, truth: Tensor | None, window: Tensor) -> Tensor:
    """(6,) sums over tokens: nats of the targets, targets; squared error and size, KL, equal likeliest tokens."""
    logits = logits[:-1]
    nats = F.cross_entropy(logits, window[1:], reduction="sum").double()
    count = nats.new_tensor(len(logits))
    if truth is None:
        return torch.stack([nats, count, *nats.new_zeros(4)])
    centred, wanted = (x - x.mean(-1, keepdim=True) for x in (logits.double(), truth[:-1].double()))
    log_p, log_q = wanted.log_softmax(-1), centred.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    same = (logits.argmax(-1) == truth[:-1].argmax(-1)).sum().double()
    return torch.stack([nats, count, (centred - wanted).square().sum(), wanted.square().sum(), kl, same])


def score(way: str, against: str | None, sums: list[float], bytes_per_token: float) -> Score:
    nats, targets, error, size, kl, same = sums
    bits = nats / math.log(2) / targets / bytes_per_token
    if against is None:
        return Score(way, bits)
    return Score(way, bits, against, math.sqrt(error / size), kl / targets, same / targets)


def line(score: Score) -> str:
    text = f"{score.way:8} {score.bits_per_byte:.4f} bits per byte"
    if score.against is None:
        return text
    return (
        f"{text}; against {score.against}: logits {score.relative_error:.2%} off, "
        f"KL {score.kl:.2e} nats, same likeliest token {score.same_top:.2%}"
    )


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


if __name__ == "__main__":
    main()
