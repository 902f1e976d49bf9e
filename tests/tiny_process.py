"""One process of a tiny run, started by tests: the real command line, with tiny presets.

  python tests/tiny_process.py DEVICES OUT [options of protoclip_jax.main]

Writes the final state to OUT/state.npz, and the labels of each prototype episode with the features
and centroids they come from to OUT/labels-E.npz; process 0 alone does so. Each process P writes a
hash of its parameters, at the start and after each episode, to OUT/hashes-P.txt, a line each, and
how many pictures it decoded for evaluations to OUT/decoded-P.txt. The n-th evaluation's features go
to OUT/features-n.npz. TINY_ORDER="0,2,1,3" lays the devices on the mesh in this order.
TINY_SIGTERM=N asks the process to leave in its step N.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # not in the workers that this process starts: they see other arguments
    DEVICES, OUT = int(sys.argv[1]), Path(sys.argv[2])
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
if __name__ == "__main__":
    from protoclip_jax import signals

    signals.install()  # as protoclip_jax.main does


def main() -> None:
    import numpy as np
    from absl import app
    from tiny_run import MODELS

    from protoclip_jax import main as command
    from protoclip_jax.models import presets

    presets.PRESETS.update(MODELS)

    def run(argv):
        # Imported only now: several processes have to be joined before JAX wakes up.
        import jax

        from protoclip_jax.evaluation import suite
        from protoclip_jax.training import agreement, clustering, loop, state
        from protoclip_jax.training.checkpoint import Checkpoints

        if order := os.environ.get("TINY_ORDER"):
            arranged = state.arranged

            def in_order(devices, fsdp):
                grid = arranged(devices, fsdp)
                return grid.reshape(-1)[[int(n) for n in order.split(",")]].reshape(grid.shape)

            state.arranged = in_order
        agreement.MARK_SECONDS = 5.0
        cluster, close = clustering.Clustering.clusters, loop.Trainer.close

        def recorded(self, episode, features, rows):
            clusters = cluster(self, episode, features, rows)
            if jax.process_index() == 0:
                # Each process has a copy; to cut JAX's array would take them all.
                arrays = dict(zip(("image", "text"), np.asarray(features), strict=True))
                for name, found in clusters.items():
                    arrays |= {f"{name}_labels": found.labels, f"{name}_counts": found.counts}
                    arrays[f"{name}_centroids"] = found.centroids
                np.savez(OUT / f"labels-{episode}.npz", **arrays)
            return clusters

        def whole(trainer, tree):
            """Host arrays, of parts that lie on several hosts too: all processes call it."""
            return jax.device_get(jax.jit(lambda x: x, out_shardings=trainer.replicated)(tree))

        def closed(self):
            over = self.done == self.config.total_steps
            state = whole(self, self.state) if over else None
            if jax.process_index() == 0 and over:
                leaves = jax.tree_util.tree_leaves_with_path(state)
                arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
                np.savez(OUT / "state.npz", **arrays)
            close(self)
            (OUT / f"decoded-{jax.process_index()}.txt").write_text(str(len(decoded)))

        decoded, decode = [], suite.decode
        suite.decode = lambda data: (decoded.append(1), decode(data))[1]
        measure, measured = suite.measure, []

        def kept(features, *arguments):
            np.savez(OUT / f"features-{len(measured)}.npz", **vars(features))
            measured.append(1)
            return measure(features, *arguments)

        suite.measure = kept
        clustering.Clustering.clusters, loop.Trainer.close = recorded, closed
        train_episode = loop.Trainer.train_episode

        def noted(self):
            leaves = jax.tree.leaves(whole(self, self.state["params"]))
            digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
            with (OUT / f"hashes-{jax.process_index()}.txt").open("a") as file:
                file.write(f"{self.done} {digest}\n")

        def hashed(self, *arguments):
            if not self.done:
                noted(self)
            result = train_episode(self, *arguments)
            noted(self)
            return result

        loop.Trainer.train_episode = hashed
        fault = os.environ.get("TINY_FAULT", "")
        if fault:
            process, _, message = fault.partition(":")
            extract = loop.Trainer.extract

            def broken(self, episode, batches):
                if jax.process_index() == int(process):
                    raise RuntimeError(message)
                return extract(self, episode, batches)

            loop.Trainer.extract = broken
        stop = os.environ.get("TINY_SIGTERM", "")
        if stop:
            train_inputs = loop.Trainer.train_inputs

            def asked(self, *arguments):
                if self.done + 1 == int(stop):  # heard after the step of these inputs
                    os.kill(os.getpid(), signal.SIGTERM)
                return train_inputs(self, *arguments)

            loop.Trainer.train_inputs = asked
        unreadable = os.environ.get("TINY_UNREADABLE", "")
        if unreadable:
            read, newest = Checkpoints._read, []

            def failing(self, step, items):
                newest.append(step)
                if step == newest[0] and str(jax.process_index()) in unreadable.split(","):
                    raise OSError("this host cannot reach the disk")
                return read(self, step, items)

            Checkpoints._read = failing
        return command.run(argv)

    OUT.mkdir(parents=True, exist_ok=True)
    sys.argv[1:3] = []
    app.run(run, flags_parser=command.parse)


if __name__ == "__main__":
    main()
