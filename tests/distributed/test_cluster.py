"""Who is in the run: flags and environments of schedulers."""

import pytest

from protoclip_jax.config import ConfigError
from protoclip_jax.distributed import cluster

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}


def find(environment: dict | None = None, gpus: int = 8, flags=(None, None, None), search=False):
    return cluster.find(*flags, search=search, environment=environment or {}, gpus=gpus)


def test_alone():
    assert find() == (None, ())
    assert find({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == (None, ())
    assert find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) == (None, ())  # RUN-12 a
    assert find({"TPU_WORKER_HOSTNAMES": "a"}) == (None, ())


def test_leftover_slurm_variables_run_alone_and_say_so():
    """RUN-12 b: JAX would stop with a traceback."""
    member, notes = find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert member is None
    assert len(notes) == 1
    assert "4 tasks" in notes[0]
    assert "SLURM_STEP_NODELIST" in notes[0]
    member, notes = find({"OMPI_COMM_WORLD_SIZE": "2"})
    assert member is None
    assert "OMPI_MCA_orte_hnp_uri" in notes[0]


def test_a_step_of_one_task_inside_a_larger_job_is_alone():
    assert find(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == (None, ())


def test_one_process_by_flag_whatever_the_environment_says():
    assert find(STEP, flags=(None, 1, None)) == (None, ())
    assert find(STEP, flags=(None, 1, 0)) == (None, ())


def test_one_task_a_node_takes_all_gpus():
    member, notes = find(STEP)
    assert (member.count, member.index, member.local_devices, notes) == (2, 1, (), ())
    assert member.coordinator is None
    assert "SLURM_NTASKS=2" in member.found


@pytest.mark.parametrize(
    ("tasks", "local", "environment", "expected", "told"),
    [
        ("8(x2)", "3", {}, (3,), ""),  # eight tasks, eight GPUs
        ("4(x2)", "3", {}, (6, 7), ""),
        ("3(x2)", "1", {}, (2, 3), "2 of this node's 8 GPUs are not used"),
        # The scheduler gave each task its own.
        ("8(x2)", "3", {"CUDA_VISIBLE_DEVICES": "3", "SLURM_GPUS_ON_NODE": "8"}, (), ""),
        ("4(x2)", "3", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "8"}, (), ""),
        # The job has two of the node's eight, and both tasks see both.
        ("2(x2)", "1", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, (1,), ""),
        ("4(x2)", "3", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, (1,), "share"),
        ("2(x2)", "1", {"CUDA_VISIBLE_DEVICES": ""}, (), ""),
    ],
)
def test_tasks_of_a_node_share_its_gpus(tasks, local, environment, expected, told):
    env = STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": local} | environment
    member, notes = find(env)
    assert member.local_devices == expected
    assert told in " ".join(notes)
    assert bool(told) == bool(notes)


def test_tasks_of_uneven_nodes():
    env = STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_LOCALID": "0"}
    assert find(env | {"SLURM_NODEID": "1"})[0].local_devices == (0, 1, 2, 3)
    assert find(env | {"SLURM_NODEID": "2"})[0].local_devices == ()


def test_open_mpi():
    member, notes = find(MPI)
    assert (member.count, member.index, member.local_devices) == (4, 3, (4, 5, 6, 7))
    assert notes == ()


def test_tpu_slice():
    assert find({"TPU_WORKER_HOSTNAMES": "a,b"})[0].coordinator is None
    assert find(search=True)[0].found == "the TPU slice's metadata"


def test_flags():
    member, _ = find(flags=("10.0.0.1:29400", 3, 2))
    assert (member.coordinator, member.count, member.index) == ("10.0.0.1:29400", 3, 2)
    assert member.local_devices == ()
    assert find(flags=("10.0.0.1:29400", 1, 0)) == (None, ())
    for flags, message in (
        (("127.0.0.1:1", None, 0), "go together"),
        ((None, 2, None), "go together"),
        (("127.0.0.1:1", 2, 2), "0 .. 1"),
        (("127.0.0.1", 2, 0), "host:port"),
    ):
        with pytest.raises(ConfigError, match=message):
            find(flags=flags)
