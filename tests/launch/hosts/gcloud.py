"""`gcloud compute tpus tpu-vm` with a slice of folders: one a worker, which is its home.

In FAKE_CLOUD: `state` (the slice's; absent: there is none), `calls` (what was asked), worker-N, and
what goes wrong, each a file:
  offline      nothing can be reached, for as many calls as the number in it
  drop-start, drop-follow   the connection breaks while so many commands of worker.sh run: what they
               started goes on, ssh ends with 255, and gcloud runs the command again, as it does
  unreachable  worker number that no ssh comes to
  create-fails  no capacity, for as many calls as the number in it
"""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
WORKERS = int(os.environ.get("FAKE_WORKERS", "2"))
STATE = CLOUD / "state"


def used_up(name: str) -> bool:
    """Whether something goes wrong this time too."""
    file = CLOUD / name
    count = int(file.read_text()) if file.exists() else 0
    if count:
        file.write_text(str(count - 1))
    return count > 0


def ssh(worker: int, command: str, out) -> int:
    home = CLOUD / f"worker-{worker}"
    unreachable = CLOUD / "unreachable"
    if unreachable.exists() and unreachable.read_text() == str(worker):
        return 255
    environment = {
        name: os.environ[name] for name in os.environ if not name.startswith(("NAME", "SLURM"))
    } | {"HOME": str(home), "TPU_WORKER_ID": str(worker)}
    for _ in range(10):
        verb = next((word for word in ("start", "follow") if f" {word} " in command), None)
        breaks = verb is not None and used_up(f"drop-{verb}")
        remote = subprocess.Popen(
            ["bash", "-c", command],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if breaks else out,
            stderr=subprocess.STDOUT,
        )
        if not breaks:
            return remote.wait()
        # What came before the connection broke has been shown: the head and a line of the log.
        for _ in range(2 if verb == "follow" else 1):
            sys.stdout.write(remote.stdout.readline().decode())
        sys.stdout.flush()
        remote.stdout.close()
        remote.kill()
        print(f"Retrying: SSH command error to worker {worker}", file=sys.stderr)
    return 255


def everywhere(workers, action) -> int:
    codes = {}
    threads = [
        threading.Thread(target=lambda n=n: codes.__setitem__(n, action(n))) for n in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, code in codes.items():
        if code:
            print(f"##### Command execution on worker {number} failed: {code}", file=sys.stderr)
    return max(codes.values())


def main() -> int:
    compute, tpus, vm, verb, *arguments = sys.argv[1:]
    assert (compute, tpus, vm) == ("compute", "tpus", "tpu-vm")
    with (CLOUD / "calls").open("a") as calls:
        calls.write(" ".join([verb, *arguments]).replace("\n", " ") + "\n")
    options = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
    names = [a for a in arguments if not a.startswith("--")]
    if used_up("offline"):
        print("ERROR: gcloud cannot reach anything", file=sys.stderr)
        return 1
    if verb == "list":
        print("projects/p/locations/z/nodes/other\tREADY")
        if STATE.exists():
            print(f"projects/p/locations/z/nodes/clip\t{STATE.read_text()}")
        return 0
    if verb == "create":
        if used_up("create-fails"):
            print("ERROR: there is no more capacity in the zone", file=sys.stderr)
            return 1
        for number in range(WORKERS):
            shutil.rmtree(CLOUD / f"worker-{number}", ignore_errors=True)
            (CLOUD / f"worker-{number}").mkdir()
        STATE.write_text("READY")
        return 0
    if verb == "delete":
        for number in range(WORKERS):
            shutil.rmtree(CLOUD / f"worker-{number}", ignore_errors=True)
        STATE.unlink()
        return 0
    if not STATE.exists() or STATE.read_text() != "READY":
        print("ERROR: the slice is not ready", file=sys.stderr)
        return 1
    chosen = options["worker"]
    workers = range(WORKERS) if chosen == "all" else [int(chosen)]
    if verb == "scp":
        source, target = names
        for number in workers:
            shutil.copy(source, CLOUD / f"worker-{number}" / target.partition(":")[2])
        return 0
    assert verb == "ssh"
    folder = options.get("output-directory")

    def action(number: int) -> int:
        if folder is None:
            return ssh(number, options["command"], None)
        with open(f"{folder}/{number}.log", "wb") as out:
            return ssh(number, options["command"], out)

    return everywhere(workers, action)


if __name__ == "__main__":
    sys.exit(main())
