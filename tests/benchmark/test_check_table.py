"""The table of `check`: every number in its place."""

import copy

from protoclip_jax.benchmark import check, check_table
from protoclip_jax.benchmark.check_runner import Outcome

DEVICES = {
    "cpu": "A CPU",
    "cores": 16,
    "memory_gb": 128,
    "platform": "gpu",
    "device": "NVIDIA H100 80GB HBM3",
    "devices": 2,
    "jax": "0.11.2",
    "python": "3.12.3",
    "load": 0.5,
    "kinds": {"NVIDIA H100 80GB HBM3": 2},
    "device_gb": 73.41,
    "driver": ["NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB"],
    "runtime": "PJRT C API cuda 13000",
    "versions": {"jax": "0.11.2", "flax": "0.12.9", "grain": None, "python": "3.12.3"},
    "commit": "c3a1f04",
    "missing": ["grain", "clu"],
}


def phases(dtype: str, scale: float) -> dict:
    names = ("first loss", "first gradient norm", "later losses")
    return {
        "dtype": dtype,
        "phases": {"warmup": 1e-6 * scale, "prototype": 3e-5 * scale, "locked": 2e-7 * scale},
        "deviations": {
            name: {
                "deviation": scale * 10.0 ** -(7 - i),
                "step": i + 1,
                "term": "loss/clip",
                "bound": scale * 10.0 ** -(4 - i),
                "within": True,
            }
            for i, name in enumerate(names)
        },
    }


KMEANS = {
    "n": 200_000,
    "d": 128,
    "k": 20_000,
    "precision": "bfloat16",
    "iterations": 20,
    "wall_seconds": 0.3125,
    "ms_for_20": 312.5,
    "compile_seconds": 21.0,
    "matmul_share": 0.123,
    "matmul_gflops": 456_000.0,
    "bandwidth_share": 0.789,
    "copy_gb_per_second": 2_950.0,
    "profile": {
        "ms": 310.0,
        "idle": 0.05,
        "kinds": {"products": 0.6, "reductions": 0.3, "copies": 0.1},
        "top": [
            {
                "name": "nvjet",
                "kind": "products",
                "ms": 180.0,
                "count": 260,
                "share": 0.6,
                "scope": None,
            },
            {
                "name": "input_reduce_fusion",
                "kind": "reductions",
                "ms": 90.5,
                "count": 13,
                "share": 0.301,
                "scope": "jit(kmeans)/max",
            },
        ],
    },
}


def step(model: str, batch: int, rate: float, peak: float) -> dict:
    return {
        "model": model,
        "dtype": "bfloat16",
        "prototypes": 20_000,
        "batch": batch,
        "pairs_per_second": 2 * rate,
        "pairs_per_second_per_device": rate,
        "step_ms": 1e3 * batch / rate / 2,
        "host_ms": 3.21,
        "gflop": 51.6 * batch,
        "gflops": peak * 989e3,
        "peak_use": peak,
        "flop_use": 1.25 * peak,
        "matmul_gflops": 791e3,
        "memory_gb": 61.2,
        "compile_seconds": 44.4,
        "search": {"larger": f"{batch} would take 122 of 70 GB"},
    }


EPISODE = {
    "model": "RN50-quickgelu",
    "batch": 512,
    "pairs": 20_480,
    "prototypes": 20_000,
    "workers": 15,
    "episodes": 2,
    "seconds": {"extract": 3.14, "cluster": 0.271, "train": 9.87},
    "extracted_per_second": 6_522.0,
    "trained_per_second": 2_075.0,
    "input_wait_share": 0.0456,
    "host_gb": 5.43,
    "device_gb": 58.7,
}
OUTCOMES = {
    "devices": Outcome("done", 9.0, DEVICES),
    "tests": Outcome(
        "failed",
        31.4,
        {"passed": 57, "skipped": 2, "failed": {"tests/x.py::test_y": "assert 1 == 2"}},
        "1 of 58 fail: tests/x.py::test_y: assert 1 == 2",
        ["a line", "another line"],
    ),
    "quickstart-float32": Outcome("done", 66.0, phases("float32", 1.0)),
    "quickstart-bfloat16": Outcome("done", 67.0, phases("bfloat16", 20.0)),
    "kmeans": Outcome("done", 33.0, KMEANS),
    "step-RN50": Outcome("done", 71.0, step("RN50", 1024, 2_600.0, 0.136)),
    "step-ViT-B-32": Outcome("done", 52.0, step("ViT-B-32", 2048, 8_000.0, 0.358)),
    "step-ViT-B-16": Outcome("timed out", 75.0, {"model": "ViT-B-16"}, "ended after 75 s"),
    "episode": Outcome("done", 88.0, EPISODE),
}
SHOWN = """\
A CPU, 16 cores, 128 GB; 2 x NVIDIA H100 80GB HBM3; jax 0.11.2, Python 3.12.3; load 0.5
Devices   2 x NVIDIA H100 80GB HBM3; 73.4 GB for JAX on each
Driver    NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB
Runtime   PJRT C API cuda 13000
Versions  jax 0.11.2, flax 0.12.9, python 3.12.3
Commit    c3a1f04
Missing   grain, clu

Tests     57 passed, 1 failed, 2 skipped

Quickstart: largest relative deviation from a CPU's float32 run

                           float32  bfloat16
--------------------------------------------
losses of phase warmup     1.0e-06   2.0e-05
losses of phase prototype  3.0e-05   6.0e-04
losses of phase locked     2.0e-07   4.0e-06
--------------------------------------------
first loss                 1.0e-07   2.0e-06
  may be                     1e-04     2e-03
first gradient norm        1.0e-06   2.0e-05
  may be                     1e-03     2e-02
later losses               1.0e-05   2.0e-04
  may be                     1e-02     2e-01

k-means of one modality: 200,000 x 128, K 20,000

                            bfloat16
------------------------------------
wall ms                          312
updates                           20
compilation, wall s             21.0
share of a matmul's rate       12.3%
that matmul, TFLOP/s             456
share of the memory's rate     78.9%
that memory, GB/s              2,950

A training step with 20,000 prototypes, in bfloat16

                            RN50  ViT-B-32
------------------------------------------
batch                      1,024     2,048
pairs a second             5,200    16,000
  a device                 2,600     8,000
wall ms a step               197       128
host ms a step              3.21      3.21
GFLOP a step              52,838   105,677
TFLOP/s                      135       354
share of the peak          13.6%     35.8%
share of a matmul's rate   17.0%     44.8%
that matmul, TFLOP/s         791       791
GB a device, as compiled    61.2      61.2
compilation, wall s         44.4      44.4

RN50, pairs a device: 1024 would take 122 of 70 GB.
ViT-B-32, pairs a device: 2048 would take 122 of 70 GB.

Episode 2 of 20,480 pairs from JPEG files, 20,000 prototypes, batch 512, 15 workers

                                RN50-quickgelu
----------------------------------------------
extracted pairs a second                 6,522
trained pairs a second                   2,075
waiting for input, of training            4.6%
peak GB of a device                       58.7
peak GB of the host process               5.43
----------------------------------------------
extract, s                                3.14
cluster, s                               0.271
train, s                                  9.87

Profile of kmeans: idle 5% of the time; of the work products 60%, reductions 30%, copies 10%

                       ms  times  share        kind
---------------------------------------------------
nvjet                 180    260  60.0%    products
input_reduce_fusion  90.5     13  30.1%  reductions

input_reduce_fusion: jit(kmeans)/max

Goals on an H100

                                           here   goal      reached
-------------------------------------------------------------------
k-means, ms a modality for 20 iterations    312    250  80%, MISSED
RN50, pairs a second                      2,600  2,500         104%
ViT-B-32, pairs a second                  8,000  8,900  90%, MISSED
ViT-B-16, pairs a second                      -  3,200            -

Parts

                                   s
------------------------------------
devices                   done  9.00
tests                   failed  31.4
quickstart-float32        done  66.0
quickstart-bfloat16       done  67.0
kmeans                    done  33.0
step-RN50                 done  71.0
step-ViT-B-32             done  52.0
step-ViT-B-16        timed out  75.0
episode                   done  88.0

tests failed: 1 of 58 fail: tests/x.py::test_y: assert 1 == 2
  | a line
  | another line
step-ViT-B-16 timed out: ended after 75 s
Missed goal: k-means, ms a modality for 20 iterations: 312, not 250
  idle 5% of the time; of the work products 60%, reductions 30%, copies 10%
Missed goal: ViT-B-32, pairs a second: 8,000, not 8,900
  there is no profile of it
FAILED: tests, step-ViT-B-16; 346 s of at most 360
"""


def numbers(**changes) -> dict:
    outcomes = copy.deepcopy(OUTCOMES) | changes
    return check.assembled(outcomes, False, 6.0, 345.6)


def test_everything_is_shown():
    assert check_table.text(numbers()).splitlines() == SHOWN.splitlines()


def test_parts_that_found_nothing_have_no_section():
    nothing = {name: Outcome("failed", 1.0, {}, "fell over") for name in OUTCOMES}
    lines = check_table.text(numbers(**nothing)).splitlines()
    assert lines[0] == "Goals on an H100"
    assert "kmeans failed: fell over" in lines
    assert "k-means of" not in "\n".join(lines)


def test_a_cpu_is_not_held_to_goals():
    device = Outcome("done", 1.0, DEVICES | {"device": "cpu", "device_gb": None, "driver": None})
    text = check_table.text(numbers(devices=device))
    assert "MISSED" not in text
    assert "Missed goal" not in text
    assert "memory not told" in text
    assert "Driver    not told" in text


def test_all_is_right():
    done = {name: Outcome("done", 1.0, OUTCOMES[name].numbers) for name in OUTCOMES}
    done["step-ViT-B-16"] = Outcome("done", 1.0, step("ViT-B-16", 512, 3_300.0, 0.41))
    found = numbers(**done)
    assert check.CheckReport(found).code == 0
    assert check_table.text(found).splitlines()[-1] == "All is right; 346 s of at most 360"
