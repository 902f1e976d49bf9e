"""Profiles of a GPU and a TPU, made up, and one of this CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from protoclip_jax.benchmark import trace

PROGRAM = """
HloModule jit_step
ENTRY %main {
  %fusion.3 = f32[8] fusion(%x), metadata={op_name="jit(step)/attend/exp" stack_frame_id=3}
  ROOT %custom-call.7 = f32[8] custom-call(%y), metadata={op_type="d" op_name="jit(step)/mlp/dot"}
  %bare.1 = f32[8] add(%x, %x)
}
"""


def plane(name: str, lines: dict[str, list[tuple]]) -> str:
    """Text of a plane; events are (name, instruction or none, start in us, microseconds)."""
    names = {event[0] for events in lines.values() for event in events}
    ids = {name: number for number, name in enumerate(sorted(names), 1)}
    told = [f'name: "{name}"', 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }']
    told += [
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for n, i in ids.items()
    ]
    for number, (line, events) in enumerate(lines.items(), 1):
        texts = []
        for event, instruction, start, long in events:
            stat = f'stats {{ metadata_id: 1 str_value: "{instruction}" }}' if instruction else ""
            texts.append(
                f"events {{ metadata_id: {ids[event]} offset_ps: {start * 10**6} "
                f"duration_ps: {long * 10**6} {stat} }}"
            )
        told.append(f'lines {{ id: {number} name: "{line}" {" ".join(texts)} }}')
    return f"planes {{ {' '.join(told)} }}"


def data(*planes: str) -> ProfileData:
    return ProfileData.from_text_proto(" ".join(planes))


GPU = plane(
    "/device:GPU:0",
    {
        "Stream #20(Compute)": [
            ("nvjet_hsh_192x192", "custom-call.7", 0, 40),
            ("loop_exp_fusion_3", "fusion.3", 40, 10),
            ("loop_exp_fusion_4", "fusion.4", 60, 6),
            ("sm90_xmma_wgrad_implicit_gemm", "cudnn-conv.2", 80, 20),
        ],
        "Stream #24(MemcpyD2D)": [("MemcpyD2D", None, 45, 10)],
        # The same time once more, as other tools add it.
        "XLA Modules": [("jit_step(123)", None, 0, 100)],
    },
)
HOST = plane("/host:CPU", {"python": [("PjitFunction(step)", None, 0, 5000)]})


def test_a_gpus_time_by_kind_and_operation():
    found = trace.summary([data(HOST, GPU)], trace.scopes(PROGRAM))
    assert found["ms"] == pytest.approx(0.1)
    # Busy 0 to 55, 60 to 66 and 80 to 100.
    assert found["idle"] == pytest.approx(1 - 81 / 100)
    assert found["kinds"] == pytest.approx(
        {
            "products": 40 / 86,
            "convolutions": 20 / 86,
            "element by element": 16 / 86,
            "copies": 10 / 86,
        }
    )
    first, _, third, _ = found["top"]
    assert first == {
        "name": "nvjet_hsh_192x192",
        "kind": "products",
        "ms": pytest.approx(0.04),
        "count": 1,
        "share": pytest.approx(40 / 86),
        "scope": "jit(step)/mlp/dot",
    }
    assert (third["name"], third["count"], third["ms"]) == (
        "loop_exp_fusion",
        2,
        pytest.approx(0.016),
    )
    assert third["scope"] == "jit(step)/attend/exp"  # of the longer one
    assert [len(trace.summary([data(GPU)], most=n)["top"]) for n in (0, 2)] == [0, 2]
    assert trace.cause(found) == (
        "idle 19% of the time; of the work products 47%, convolutions 23%, element by element 19%"
    )


def test_devices_are_taken_together():
    other = plane(
        "/device:GPU:1", {"Stream #20": [("gemm", None, 7, 300), ("sort", None, 507, 10)]}
    )
    found = trace.summary([data(GPU, other)])
    assert found["ms"] == pytest.approx(0.51)
    assert found["idle"] == pytest.approx((19 / 100 + 200 / 510) / 2)
    assert sum(found["kinds"].values()) == pytest.approx(1)
    assert found["top"][0]["ms"] == pytest.approx(0.3)


def test_a_tpus_operations_hold_others():
    tpu = plane(
        "/device:TPU:0",
        {
            "Steps": [("1", None, 0, 1000)],
            "XLA Ops": [
                ("while.1", None, 0, 100),
                ("dot.4", None, 10, 60),
                ("add.4", None, 70, 5),
                ("copy.2", None, 100, 7),
            ],
        },
    )
    found = trace.summary([data(tpu)])
    times = {one["name"]: one["ms"] for one in found["top"]}
    assert times == pytest.approx({"dot": 0.06, "while": 0.035, "copy": 0.007, "add": 0.005})
    assert found["idle"] == 0


@pytest.mark.parametrize(
    ("name", "scope", "kind"),
    [
        ("loop_convert_fusion", "", "element by element"),
        ("cudnn_generated_fort_native_conv", "", "convolutions"),
        ("ncclDevKernel_AllReduce_Sum", "", "communication"),
        ("input_reduce_fusion_3", "", "reductions"),
        ("gemm_fusion_dot_general", "", "products"),
        ("ynn_fusion.2", "jit(f)/jvp()/dot_general", "products"),
        ("wrapped_broadcast", "jit(f)/dot_general/div", "element by element"),
        ("DeviceRadixSortKernel", "", "sorting, gathering"),
    ],
)
def test_kinds(name, scope, kind):
    op = trace.Operation(name, "it", 0, 1, 1)
    assert trace.kind_of(op, {"it": scope}) == kind


def test_nothing_traced_is_told():
    found = trace.summary([data(plane("/host:CPU", {"python": [("a call", None, 0, 5)]}))])
    assert found["ms"] is None
    assert trace.cause(found) == "the trace holds no operation of a device"


def test_this_machines_profile_names_its_operations():
    def work(x):
        return jnp.sort(jnp.sin(x @ x), axis=0)

    square = jnp.ones((256, 256))
    program = jax.jit(work).lower(square).compile()
    program(square)
    found = trace.profiled(lambda: program(square), program.as_text())
    assert found["ms"] > 0
    assert 0 <= found["idle"] < 1
    scopes = {(one["scope"] or "").rpartition("/")[2] for one in found["top"]}
    assert {"sort", "dot_general"} <= scopes
    assert "sorting, gathering" in found["kinds"]
