"""An HTTP server with OpenAI's interface for chat completions: prompts about pictures, objects with boxes.

python -m paligemma.serve --model demo --port 8000
"""

import argparse
import importlib.util
import ipaddress
import os
import signal
from pathlib import Path

from . import arguments, command
from .command import at_least, tell
from .engines import load_model
from .errors import PaliGemmaError

KEY = "PALIGEMMA_API_KEY"
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`

PORTS = 65535  # getaddrinfo takes a larger number modulo 65536


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            remedy = "pip install 'paligemma[serve]' installs it"
            raise PaliGemmaError(f"the server needs the package {package}, which is not installed: {remedy}")
    key = api_key(args.api_key_file)
    from .serving.server import listen, serve

    listening = listen(args.host, args.port)  # before the model is loaded, which can take minutes
    decoder = None
    if args.masks or args.mask_decoder:
        from .answers.masks import MaskDecoder

        decoder = MaskDecoder.load(args.mask_decoder, local_files_only=args.local_files_only)
    adapter = args.adapter
    arguments.choose_model(args)
    name = arguments.model_name(args, adapter)
    model, processor = load_model(args)

    from .serving.app import create_app
    from .serving.settings import Settings

    host, port = listening.getsockname()[:2]
    local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    settings = Settings(
        args.batch_size, args.queue, args.timeout, max_body=args.max_body, max_pixels=args.max_pixels,
        max_new_tokens=args.max_new_tokens, api_key=key, local_only=local, mask_decoder=decoder,
    )  # fmt: skip
    app = create_app(model, processor, name, settings)
    if key is None and not local:
        tell(f"hint: whoever reaches {host} can use this server: --api-key-file asks for a key")
    listening.listen()  # a client that has read the next line can connect
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    tell(f"{where} answers with {name}, {app.state.service.engine.slots} requests at a time")
    serve(app, listening)
    return 0


def api_key(path: str | None) -> str | None:
    """The key in the file at `path`, or else in the environment. Raises PaliGemmaError if there is no key in
    what is given."""
    where, text = (path, None) if path else (f"the environment variable {KEY}", os.environ.get(KEY))
    if path:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PaliGemmaError(f"--api-key-file {path} cannot be read: {error}") from None
    if text is None:
        return None
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise PaliGemmaError(f"{where} has no key: it must have one word of printable ASCII characters")
    return key


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = option_parser()
    args = parser.parse_args(argv)
    arguments.refuse_empty(parser, args, "host", "api_key_file")
    if args.port > PORTS:
        parser.error(f"--port {args.port} is not a port: the largest is {PORTS}")
    return args


def option_parser() -> command.Parser:
    about = "Serve PaliGemma over HTTP, with OpenAI's interface for chat completions."
    parser = command.Parser(prog="python -m paligemma.serve", description=about)
    add = parser.add_argument
    # fmt: off
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    add("--port", type=at_least(0), default=8000, help="port; 0 takes a free one (default: %(default)s)")
    add("--api-key-file", metavar="FILE", help="file with the key that clients must send (default: the "
        f"environment variable {KEY}; without it none is needed)")
    add("--batch-size", type=at_least(1), metavar="N",
        help="requests that are answered together (default: 16, or fewer if the free memory is small)")
    add("--queue", type=at_least(0), default=64, metavar="N",
        help="further requests that wait; more are refused (default: %(default)s)")
    add("--timeout", type=at_least(1), default=600, metavar="SECONDS",
        help="longest time from the whole request to its last token (default: %(default)s)")
    add("--max-new-tokens", type=at_least(1), default=1024, metavar="N",
        help="most tokens that a request may ask for (default: %(default)s)")
    add("--max-body", type=at_least(1), default=20_000_000, metavar="BYTES",
        help="size of the largest request (default: %(default)s)")
    add("--max-pixels", type=at_least(1), default=50_000_000, metavar="N",
        help="most pixels of the pictures of a request (default: %(default)s)")
    add("--masks", action="store_true", help="decode the masks of answers to segment")
    add("--mask-decoder", metavar="FILE",
        help="vae-oid.npz, which masks need (default: downloaded on first use)")
    arguments.model_options(add, ("auto", "torch", "numba", "triton"))
    # fmt: on
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, command.interrupted)
    command.process(main)
