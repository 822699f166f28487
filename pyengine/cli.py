"""The command line. Commands import what they need when they run; what they show is safe for a terminal."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__
from .terminal import add, console, deliver, grid, shown
from .usercode import UserCodeError, calibration_batches, load_weights, make_model

FAILED, USAGE, INTERRUPTED = 1, 2, 130

# Wrong in what the user gave us: one line says it all. Other exceptions are our faults and show a traceback.
_BAD_INPUT = (ValueError, TypeError, NotImplementedError, OSError)
_BAD_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_LONGEST_MESSAGE = 1000  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 (failed), 2 (bad usage or input), 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown as an escape.
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output has left; Python would complain at exit that it cannot flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("pyengine: interrupted", file=sys.stderr)
        return INTERRUPTED
    except UserCodeError as error:
        _complain(str(error))
        return FAILED
    except _BAD_INPUT as error:
        _complain(_reason(error))
        return FAILED if isinstance(error, OSError) and not isinstance(error, _BAD_PATH) else USAGE


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _complain(message: str) -> None:
    line = shown(" ".join(message.split()))
    print("pyengine: error:", line[:_LONGEST_MESSAGE], file=sys.stderr)


# ---- commands ----------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    import tempfile

    from . import demo

    output = None if arguments.output is None else Path(arguments.output)
    record = demo.run(output, threads=arguments.threads, quick=arguments.quick)
    folder = output if output is not None else Path(tempfile.mkdtemp(prefix="pyengine-demo-"))
    picture = folder / "minilm-l6.png"
    demo.picture(record, picture)
    deliver(json.dumps(record, indent=1), arguments.json, lambda: console().print(demo.table(record)))
    print(f"picture: {shown(picture)}", file=sys.stderr if arguments.json == "-" else sys.stdout)
    if output is not None:
        print(f"models:  {shown(output)}", file=sys.stderr if arguments.json == "-" else sys.stdout)
    return 0


def _compress(arguments: argparse.Namespace) -> int:
    from . import compress, save
    from .report import human_bytes
    from .scheme import Scheme

    target = Path(arguments.output)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(target))
    if target.exists() and not arguments.force:
        raise ValueError(f"{target} exists; --force replaces it")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))
    scheme = Scheme.parse(arguments.scheme)
    model = make_model(arguments.model)
    if arguments.weights is not None:
        load_weights(model, arguments.weights)
    calibration = None if arguments.calibration is None else calibration_batches(arguments.calibration)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    compressed, report = compress(
        model,
        scheme,
        include=arguments.include,
        exclude=arguments.exclude,
        method=arguments.method,
        calibration_data=calibration,
        checkpoint=arguments.checkpoint,
    )
    save(compressed, target)
    print(report)
    print(f"{shown(target)}: {human_bytes(target.stat().st_size)}; the float model has {human_bytes(before)}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from .io import describe
    from .report import human_bytes

    about = describe(arguments.file)

    def show() -> None:
        table = grid(
            arguments.file, ("layer", "type", "format", "input", "shape", "bytes", "check"), ("bytes",)
        )
        for part in about["layers"]:
            cells = [part[key] for key in ("name", "op", "format", "activations")]
            add(table, *cells, "x".join(map(str, part["shape"])), human_bytes(part["bytes"]), _check(part))
        table.add_section()
        rest = about["rest"]
        add(
            table,
            f"{rest['tensors']} other tensors",
            "",
            "",
            "",
            "",
            human_bytes(rest["bytes"]),
            _check(rest),
        )
        out = console()
        out.print(table)
        version = ".".join(map(str, about["version"]))
        out.print(f"{human_bytes(about['bytes'])}, format {version}, by pyengine {shown(about['library'])}")
        for step in about["recipe"]:
            out.print(f"pass: {shown(json.dumps(step))}", soft_wrap=True)
        for alias, name in about["aliases"].items():
            out.print(f"shared: {shown(alias)} is {shown(name)}", soft_wrap=True)

    deliver(json.dumps(about, indent=1), arguments.json, show)
    if not about["intact"]:
        raise ValueError(f"{arguments.file}: a checksum does not match, the file is damaged")
    return 0


def _check(part: dict[str, Any]) -> str:
    return "ok" if part["intact"] else "DAMAGED"


def _env(arguments: argparse.Namespace) -> int:
    from .environment import environment

    about = environment()

    def show() -> None:
        table = grid("pyengine env", ("what", "value"))
        table.show_header = False
        for key, value in about.items():
            if isinstance(value, dict):
                value = "\n".join(f"{name} {shown(text)}" for name, text in value.items())
            elif isinstance(value, list):
                value = " ".join(value)
            lines = str(value or "none").split("\n")
            for first, line in zip([key, *[""] * len(lines)], lines, strict=False):
                add(table, first.replace("_", " "), line)
        console().print(table)

    deliver(json.dumps(about, indent=1), arguments.json, show)
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from .environment import kernels

    table = kernels()

    def show() -> None:
        shown_table = grid("pyengine kernels", ("op", "kernel", "layout", "isa", "runs", "chosen for"))
        for kernel in table:
            chosen = kernel["chosen_for"]
            what = ", ".join(chosen) if len(chosen) <= 2 else f"{len(chosen)} formats"
            names = [kernel[key] for key in ("op", "name", "layout", "isa")]
            add(shown_table, *names, "yes" if kernel["supported"] else "no", what or "-")
        console().print(shown_table)

    deliver(json.dumps(table, indent=1), arguments.json, show)
    return 0


def _bench_linear(arguments: argparse.Namespace) -> int:
    from . import bench

    shapes = [bench.LinearCase.parse(text) for text in arguments.shape or ()]
    if arguments.suite is not None or not shapes:
        suite = arguments.suite or "default"
        if suite not in bench.LINEAR:
            raise ValueError(f"suite {suite!r} is none of {', '.join(bench.LINEAR)}")
        shapes += bench.LINEAR[suite]
    peers = list(bench.PEERS) if arguments.peers == "all" else _names(arguments.peers)
    records = bench.run(
        shapes,
        schemes=_names(arguments.schemes),
        peers=peers,
        activations=arguments.activations,
        threads=arguments.threads,
    )
    problems = bench.problems(records)

    def show() -> None:
        out = console()
        out.print(bench.table(records, out.width))
        for part in bench.summary(records):
            out.print(part)
        for problem in problems:
            out.print(problem, soft_wrap=True)

    deliver("\n".join(map(json.dumps, records)), arguments.json, show)
    return FAILED if any(record["ours"] and record["check"] != "ok" for record in records) else 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _bench_plot(arguments: argparse.Namespace) -> int:
    from . import bench

    for path in bench.plot(bench.read_records(arguments.file), arguments.output):
        print(shown(path))
    return 0


# ---- arguments ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        sys.exit(USAGE)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("pyengine", description="Compress neural networks and run them.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pyengine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo", allow_abbrev=False, help="compress a real model, compare size, speed and quality"
    )
    demo.add_argument("--output", metavar="DIR", help="keep the files here (default: the picture only)")
    _threads(demo)
    demo.add_argument("--quick", action="store_true", help="fewer sentences and repetitions")
    _json(demo)
    demo.set_defaults(run=_demo)

    compress = commands.add_parser(
        "compress",
        allow_abbrev=False,
        help="quantize a model of yours into a file",
        description="Calls FACTORY() of MODULE, found in the current directory or on the Python path: this "
        "runs your code. Quantizes the model that it returns and writes it to FILE.",
    )
    compress.add_argument("model", metavar="MODULE:FACTORY")
    compress.add_argument("-o", "--output", metavar="FILE", required=True)
    compress.add_argument("--scheme", metavar="S", required=True, help="such as w8a8 or w4_g32")
    compress.add_argument(
        "--weights", metavar="W.safetensors", help="float weights to fill the model with first"
    )
    for option, what in (("--include", "only these layers"), ("--exclude", "all but these layers")):
        compress.add_argument(
            option, metavar="P", action="append", help=f"{what}: a glob or re:regex; repeatable"
        )
    compress.add_argument("--method", metavar="M", help="how codes are found: round, mse, hqq, gptq or awq")
    compress.add_argument(
        "--calibration",
        metavar="MODULE:ITERABLE",
        help="batches for gptq and awq",
    )
    compress.add_argument(
        "--checkpoint", metavar="DIR", help="where finished layers are kept, to go on after an interruption"
    )
    compress.add_argument("--force", action="store_true", help="replace FILE if it exists")
    compress.set_defaults(run=_compress)

    info = commands.add_parser(
        "info", allow_abbrev=False, help="what is in a file: layers, formats, bytes, checksums"
    )
    info.add_argument("file", metavar="FILE")
    _json(info)
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", allow_abbrev=False, help="measure kernels against their peers")
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    linear = benches.add_parser("linear", allow_abbrev=False, help="linear layers")
    linear.add_argument("--suite", metavar="S", help="default, minilm, transformer or quick")
    linear.add_argument("--shape", metavar="MxKxN", action="append", help="instead of a suite; repeatable")
    linear.add_argument("--schemes", metavar="S,S", default="w8a8,w8", help="default: %(default)s")
    linear.add_argument(
        "--peers", metavar="P,P", default="torch,torch_int8_fbgemm,torch_int8_onednn",
        help="names, or all; default: %(default)s",
    )  # fmt: skip
    linear.add_argument("--activations", metavar="A", default="signed", help="signed (the default) or relu")
    _threads(linear)
    _json(linear)
    linear.set_defaults(run=_bench_linear)
    plot = benches.add_parser("plot", allow_abbrev=False, help="pictures of the records that --json wrote")
    plot.add_argument("file", metavar="RECORDS.jsonl")
    plot.add_argument(
        "--output", metavar="DIR", default=".", help="for roofline.png and speedup.png; default: here"
    )
    plot.set_defaults(run=_bench_plot)

    for name, run, what in (
        ("kernels", _kernels, "every kernel: op, format, ISA"),
        ("env", _env, "versions, CPU, ISA, threads, GPU: what to paste into a bug report"),
    ):
        command = commands.add_parser(name, allow_abbrev=False, help=what)
        _json(command)
        command.set_defaults(run=run)
    return parser


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", metavar="N", type=_positive, default=1, help="default: %(default)s")


def _json(parser: argparse.ArgumentParser) -> None:
    what = "the numbers as JSON, to F beside the table, or to stdout instead of it"
    parser.add_argument("--json", metavar="F", nargs="?", const="-", help=what)
