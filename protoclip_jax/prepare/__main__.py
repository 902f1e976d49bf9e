"""Makes pairs ready for training: from a list of links to checked ArrayRecord shards.

  python -m protoclip_jax.prepare download Train_GCC-training.tsv --out cc3m
  python -m protoclip_jax.prepare convert cc3m --out cc3m_256
  python -m protoclip_jax.prepare stats cc3m_256

`python -m protoclip_jax.prepare COMMAND --help` says more. Stopped or killed, the first two go
on where they were when the same command is given again.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from protoclip_jax.data import typed_values
from protoclip_jax.data.source_options import WHAT, add_source_options, chosen_source
from protoclip_jax.storage.screen import cut_off, show_any_text

# The rest is imported late: --help and a wrong option answer at once.


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(
        prog="python -m protoclip_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_download(commands)
    _add_convert(commands)
    _add_stats(commands)
    return parser


def _add(commands, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _place_to_write(text: str) -> str:
    if not text.strip():  # it would be the current folder
        raise argparse.ArgumentTypeError("it is empty: name where to write")
    return typed_values.place(text)


def _add_download(commands) -> None:
    command = _add(
        commands,
        "download",
        _download,
        "Downloads the pictures of a list of links with img2dataset, into tar shards.\n\n"
        "Conceptual Captions (caption, URL), CC12M (URL, caption), lists with a header, and the\n"
        "YFCC100M table are recognised. The result is a source: give its folder to `convert`.",
    )
    command.add_argument(
        "list",
        type=typed_values.place,
        help="the list: .tsv, .csv or .txt, also compressed (gzip, bzip2, xz)",
    )
    command.add_argument("--out", type=_place_to_write, required=True, help="folder for the shards")
    command.add_argument("--url-column", help="name, or number from 0; default: found out")
    command.add_argument("--caption-column", help="name, or number from 0; default: found out")
    command.add_argument(
        "--separator", type=typed_values.separator, help="one character; default: found out"
    )
    command.add_argument(
        "--photo-ids",
        type=typed_values.place,
        metavar="FILE",
        help="YFCC100M: only these photos, as in OpenAI's yfcc100m_subset_data.tsv (line, id, ...)",
    )
    command.add_argument(
        "--side",
        type=typed_values.not_negative,
        default=0,
        help="let img2dataset shrink to this shorter side; default: 0, keep JPEG files as they are",
    )
    command.add_argument(
        "--processes",
        type=typed_values.above_zero,
        default=os.cpu_count(),
        help="default: all cores",
    )
    command.add_argument(
        "--threads", type=typed_values.above_zero, default=64, help="of each process; default: 64"
    )
    command.add_argument(
        "--timeout", type=typed_values.above_zero, default=10, help="seconds a link; default: 10"
    )
    command.add_argument(
        "--retries", type=typed_values.not_negative, default=1, help="of a failed link; default: 1"
    )
    command.add_argument(
        "--shard-rows", type=typed_values.above_zero, default=10_000, help="default: 10000"
    )
    command.add_argument(
        "--img2dataset-python",
        "--img2dataset_python",
        type=typed_values.place,
        metavar="PYTHON",
        help="an interpreter that has img2dataset; default: this one, or `img2dataset` on the PATH",
    )


def _add_convert(commands) -> None:
    command = _add(
        commands,
        "convert",
        _convert,
        "Writes any source as ArrayRecord shards, and checks every picture once.\n\n"
        "Killed and started again, it keeps finished shards and loses or repeats no row.",
    )
    command.add_argument("source", type=typed_values.place, help=WHAT)
    command.add_argument("--out", type=_place_to_write, required=True, help="folder for the shards")
    command.add_argument(
        "--side",
        type=typed_values.not_negative,
        default=256,
        help="shorter side of larger pictures; 0 = as they are; default: 256",
    )
    command.add_argument("--encoding", choices=("jpeg", "webp"), default="jpeg")
    command.add_argument(
        "--quality", type=typed_values.above_zero, default=95, help="of the encoding; default: 95"
    )
    command.add_argument(
        "--shard-rows", type=typed_values.above_zero, default=20_000, help="rows a shard; 20000"
    )
    _add_workers(command)
    add_source_options(command)


def _add_stats(commands) -> None:
    command = _add(
        commands,
        "stats",
        _stats,
        "Reads a whole source and describes it: unreadable and repeated pairs, captions, sizes.",
    )
    command.add_argument("source", type=typed_values.place, help=WHAT)
    command.add_argument(
        "--json", type=_place_to_write, metavar="FILE", help="write the numbers there too"
    )
    _add_workers(command)
    add_source_options(command)


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=typed_values.above_zero,
        default=os.cpu_count(),
        help="processes; default: all cores",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, or 2 for what cannot be done."""
    show_any_text()
    options = build_parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()  # here, where a reader that has left can be met
        return code
    except BrokenPipeError:
        return cut_off()
    except (ValueError, OSError) as error:
        print(f"protoclip_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = options.run is not _stats
        print("\nstopped" + resumes * ": the same command goes on from here", file=sys.stderr)
        return 130


def _source(options: argparse.Namespace):
    source = chosen_source(options)
    print(f"{len(source):,} pairs of {source.name}")
    for reason, dropped in getattr(source, "report", {}).items():
        print(f"  left out, {reason}: {dropped}")
    return source


def _download(options: argparse.Namespace) -> int:
    from protoclip_jax.prepare.download import DownloadSettings, download

    settings = DownloadSettings(
        side=options.side,
        processes=options.processes,
        threads=options.threads,
        timeout=options.timeout,
        retries=options.retries,
        shard_rows=options.shard_rows,
    )
    return download(
        options.list,
        options.out,
        settings,
        url_column=options.url_column,
        caption_column=options.caption_column,
        separator=options.separator,
        photo_ids=options.photo_ids,
        python=options.img2dataset_python,
    )


def _convert(options: argparse.Namespace) -> int:
    from protoclip_jax.prepare.convert import ConvertSettings, convert

    settings = ConvertSettings(
        side=options.side,
        encoding=options.encoding,
        quality=options.quality,
        shard_rows=options.shard_rows,
    )
    if not convert(_source(options), options.out, settings, workers=options.workers)["pairs"]:
        raise ValueError(
            f"{options.out} holds 0 pairs, since no pair of {options.source} could be read: "
            "its unreadable.tsv says why"
        )
    return 0


def _stats(options: argparse.Namespace) -> int:
    from protoclip_jax.prepare.stats import describe, measure, write

    numbers = measure(_source(options), workers=options.workers)
    if options.json:  # first: nobody may be left to print to
        write(numbers, options.json)
    print(describe(numbers))
    if options.json:
        print(f"wrote {options.json}")
    return 0


def _stop(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that no process of ours is left behind
    sys.exit(main())
