"""Times the server: answers a second, and how long each takes, with 1, 4 and 16 clients at once.

    python -m benchmarks.serve --model demo
    python -m benchmarks.serve --model checkpoints/random-3b --requests 16 --max-tokens 20 --dtype bfloat16

Each client sends its next request when it has the answer to the last one, over one connection. Answers are
streamed, because the first token is timed; the pictures are those of the demo. The
server is a process of its own on this machine, and shares its cores with the clients. The run with one client
is repeated at the end, to show a drift of the machine. The command prints a table, and writes
benchmarks/results/serve-MODEL-DATE.json."""

import argparse
import base64
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import httpx

from benchmarks.batch import PROMPTS
from benchmarks.whole_model import commit, device_name, versions
from paligemma.demo import SAMPLES

START = 600  # seconds that the server has to load the model


class Answered(NamedTuple):
    first_s: float
    total_s: float
    tokens: int


def main() -> int:
    folder = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="Time the server.")
    parser.add_argument("--model", default="demo", help="checkpoint directory, or demo (default)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=96, help="of each run (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=folder, help="directory of the JSON file")
    args = parser.parse_args()
    command = [sys.executable, "-m", "paligemma.serve", "--model", args.model, "--port", "0"]
    command += ["--dtype", args.dtype, "--device", args.device, "--batch-size", str(max(args.clients))]
    with tempfile.NamedTemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            address, sent = address_of(server, Path(log.name)), requests(args)
            run(address, sent[: max(args.clients)], max(args.clients))  # compiles, and touches the weights
            found = [run(address, sent, clients) for clients in (*args.clients, args.clients[0])]
        finally:
            server.terminate()
    report(args, found)
    return 0


def address_of(server: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + START
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"^(http\S+) answers", log.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server has not started: {log.read_text()}")


def requests(args: argparse.Namespace) -> list[bytes]:
    """The bodies of the requests."""
    pictures = [path.read_bytes() for path in sorted(SAMPLES.glob("*.png"))]
    urls = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
    found = []
    for n in range(args.requests):
        url = urls[n // len(PROMPTS) % len(urls)]
        prompt = {"type": "text", "text": PROMPTS[n % len(PROMPTS)]}
        content = [prompt, {"type": "image_url", "image_url": {"url": url}}]
        body = {
            "model": args.model, "messages": [{"role": "user", "content": content}], "stream": True,
            "max_tokens": args.max_tokens, "stream_options": {"include_usage": True},
        }  # fmt: skip
        found.append(json.dumps(body).encode())
    return found


def run(address: str, sent: list[bytes], clients: int) -> dict:
    """All requests, from so many clients at once."""
    waiting = iter(sent)

    def client(_: int) -> list[Answered]:
        with httpx.Client(verify=False, timeout=START) as http:
            return [ask(http, address, body) for body in waiting]  # each body goes to one of the clients

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for some in pool.map(client, range(clients)) for answer in some]
    seconds = time.perf_counter() - start
    totals, firsts = sorted(a.total_s for a in answers), sorted(a.first_s for a in answers)
    return {
        "clients": clients, "requests": len(answers), "seconds": seconds,
        "images_per_s": len(answers) / seconds, "tokens_per_s": sum(a.tokens for a in answers) / seconds,
        "median_s": statistics.median(totals), "p95_s": totals[int(0.95 * (len(totals) - 1))],
        "first_token_median_s": statistics.median(firsts),
        "first_token_p95_s": firsts[int(0.95 * (len(firsts) - 1))],
    }  # fmt: skip


def ask(http: httpx.Client, address: str, body: bytes) -> Answered:
    start, first, tokens = time.perf_counter(), 0.0, 0
    headers = {"Content-Type": "application/json"}
    with http.stream("POST", f"{address}/v1/chat/completions", content=body, headers=headers) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            first = first or time.perf_counter()
            if '"usage"' in line:
                tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return Answered(first - start, time.perf_counter() - start, tokens)


def report(args: argparse.Namespace, found: list[dict]) -> None:
    model, more = Path(args.model).name, {name: version(name) for name in ("fastapi", "uvicorn")}
    results = {
        "command": " ".join(["python -m benchmarks.serve", *sys.argv[1:]]).replace(args.model, model),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "device": device_name(args.device), "versions": versions() | more,
        "model": model, "dtype": args.dtype,
        "max_tokens": args.max_tokens, "runs": found,
    }  # fmt: skip
    args.results.mkdir(exist_ok=True)
    path = args.results / f"serve-{model}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{results['device']}, {model}, {args.dtype}")
    print(
        f"{'clients':>8} {'images/s':>9} {'tokens/s':>9} {'median s':>9} {'p95 s':>7} {'first token s':>14}"
    )
    for one in found:
        times = f"{one['median_s']:9.3f} {one['p95_s']:7.3f} {one['first_token_median_s']:14.3f}"
        print(f"{one['clients']:8} {one['images_per_s']:9.1f} {one['tokens_per_s']:9.0f} {times}")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
