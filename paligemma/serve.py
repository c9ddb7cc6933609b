"""An HTTP server with OpenAI's interface for chat completions: prompts about pictures, objects with boxes.

python -m paligemma.serve --model demo --port 8000
"""

import argparse
import importlib.util
import signal

from . import arguments, command
from .command import at_least
from .engines import load_model
from .errors import PaliGemmaError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            remedy = "pip install 'paligemma[serve]' installs it"
            raise PaliGemmaError(f"the server needs the package {package}, which is not installed: {remedy}")
    adapter = args.adapter
    arguments.choose_model(args)
    name = arguments.model_name(args, adapter)
    model, processor = load_model(args)

    import uvicorn

    from .serving.app import create_app
    from .serving.settings import Settings

    app = create_app(model, processor, name, Settings(batch_size=args.batch_size))
    uvicorn.run(app, host=args.host, port=args.port)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = option_parser()
    args = parser.parse_args(argv)
    return args


def option_parser() -> command.Parser:
    about = "Serve PaliGemma over HTTP, with OpenAI's interface for chat completions."
    parser = command.Parser(prog="python -m paligemma.serve", description=about)
    add = parser.add_argument
    # fmt: off
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--port", type=at_least(0), default=8000, help="port; 0 takes a free one (default: %(default)s)")
    add("--batch-size", type=at_least(1), metavar="N",
        help="requests that are answered together (default: 16, or fewer if the free memory is small)")
    arguments.model_options(add, ("auto", "torch", "numba", "triton"))
    # fmt: on
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, command.interrupted)
    command.process(main)
