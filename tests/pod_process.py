"""Trains tiny runs on 32 devices whose owners are hosts in many orders, started by a test.

  python tests/pod_process.py OUT

One process plays all hosts: each has a reader of its own that supplies the rows of its devices,
and puts them there itself, through the code by which a process of many finds its rows. OUT/NAME
gets the workdir of each run, and OUT/NAME.npz the labels of its episode and its final state; NAME
is "one" for a run of one host, a slice of `pod_orders.py`, or random-N.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=32"
    os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

DEVICES = 32


def orders() -> dict[str, list[int]]:
    """The host of each place of the mesh, by name of the run."""
    import numpy as np
    from pod_orders import SLICES, order

    found = {"one": [0] * DEVICES}
    for name in SLICES:
        hosts = order(name)
        found[name] = np.repeat(hosts, DEVICES // len(hosts)).tolist()
    rng = np.random.default_rng(0)
    for number in range(3):
        owners = np.repeat(np.arange(4), DEVICES // 4)
        found[f"random-{number}"] = rng.permutation(owners).tolist()
    return found


def main(out: Path) -> None:
    import jax
    import numpy as np
    from absl import flags
    from jax.sharding import NamedSharding, PartitionSpec
    from tiny_run import MODELS, small_config, write_pairs

    from protoclip_jax.distributed import Rows
    from protoclip_jax.models import presets
    from protoclip_jax.training import clustering, loop, state
    from protoclip_jax.training import input as inputs

    flags.FLAGS.mark_as_parsed()
    presets.PRESETS.update(MODELS)

    class RowsOfHosts:
        """Puts each host's rows, which come one host after the other, on its devices."""

        def __init__(self, hosts: list[Rows], sharding: NamedSharding):
            self.hosts, self.sharding = hosts, sharding

        def on_devices(self, rows):
            shards, start = [], 0
            for host in self.hosts:
                shards += host.shards(rows[start : start + len(host.local)])
                start += len(host.local)
            shape = (self.hosts[0].batch, *rows.shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self.sharding, shards)

    class Joined:
        """The batches of all hosts as one iterator."""

        def __init__(self, each):
            self.each, self.unreadable = each, each[0].unreadable

        def __next__(self):
            parts = [next(one) for one in self.each]
            return {
                key: np.concatenate([part[key] for part in parts])
                if isinstance(value, np.ndarray)
                else value
                for key, value in parts[0].items()
            }

        def __iter__(self):
            return self

        def __getattr__(self, name):
            return getattr(self.each[0], name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            for one in self.each:
                one.close()

    class InputOfHosts(inputs.Input):
        owners: tuple[int, ...] = ()

        def batches(self, *place):
            mesh = state.make_mesh()
            sharding = NamedSharding(mesh, PartitionSpec(state.BATCH_AXES))
            owner = dict(zip(mesh.devices.flat, self.owners, strict=True))
            hosts, each = [], []
            for host in range(max(self.owners) + 1):
                self._rows = Rows(sharding, DEVICES, process=host, process_of=owner.__getitem__)
                hosts.append(self._rows)
                each.append(super().batches(*place))
            self._rows = RowsOfHosts(hosts, sharding)
            return Joined(each)

    loop.Input = InputOfHosts
    pairs = write_pairs(out / "data", 70)
    teacher = out / "teacher.npy"
    np.save(teacher, np.random.default_rng(1).normal(size=(70, 5)).astype(np.float32))
    config = small_config(
        pairs,
        num_devices=DEVICES,
        episode__size=70,  # three batches to extract, the last with 26 rows of padding
        episode__count=2,
        episode__warmup=1,
        optimizer__batch=DEVICES,
        data__teacher=teacher,
        data__augmentation="light",
        objective__external=1,
        checkpoint__every=9,
        log__every=1,
        log__tensorboard=False,
    )
    recorded: dict[str, np.ndarray] = {}
    cluster, close = clustering.Clustering.clusters, loop.Trainer.close

    def clustered(self, episode, features, rows):
        clusters = cluster(self, episode, features, rows)
        recorded.update({name: np.asarray(found.labels) for name, found in clusters.items()})
        return clusters

    def closed(self):
        leaves = jax.tree_util.tree_leaves_with_path(self.state)
        recorded.update({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
        close(self)

    clustering.Clustering.clusters, loop.Trainer.close = clustered, closed
    for name, owners in orders().items():
        recorded.clear()
        InputOfHosts.owners = tuple(owners)
        loop.train(config, out / name)
        np.savez(out / f"{name}.npz", **recorded)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
