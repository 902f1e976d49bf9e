"""python rewrite.py OUT shorter|other: a list is written again in place while it is read.

Right: an error that says that the list has changed; no bus error, and no rows of another list.
"""

import os
import sys

from protoclip_jax.data.sources import open_source

out, how = sys.argv[1:]
os.makedirs(out, exist_ok=True)
path = f"{out}/pairs.tsv"


def write(rows: list[str]) -> None:
    with open(path, "w") as file:
        file.write("filepath\ttitle\n" + "\n".join(rows) + "\n")


filler = "x" * 200 if how == "shorter" else ""
write([f"{row}.jpg\tcaption number {row} {filler}" for row in range(2000)])
source = open_source(path)
print(source.caption(1900)[:20], flush=True)
write(["0.jpg\tnew"] if how == "shorter" else [f"{row:04}.jpg\tother {row}" for row in range(5000)])
print("row 1900 is now", source.cells(1900))
