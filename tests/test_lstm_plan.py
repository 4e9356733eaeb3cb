"""The planner of the CUDA recurrence, on the published figures of GPUs that need not be here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benches import _work, predicted
from tolerance import examples

native = pytest.importorskip("fusedprompt._C", reason="the compiled extension is not built")

KB, MB = 1 << 10, 1 << 20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def gpu(
    multiprocessors: int, shared_kb: int, l2_mb: int, l2: float, memory: float, clock: float, clusters: bool
) -> Any:
    return {
        "multiprocessors": multiprocessors,
        "shared_bytes": shared_kb * KB,
        "register_bytes": 256 * KB,
        "l2_kept_bytes": l2_mb * MB // 2,
        "l2_gb_per_s": l2,
        "memory_gb_per_s": memory,
        "clock_ghz": clock,
        "clusters": clusters,
    }


GPUS: dict[str, dict[str, Any]] = {
    "A100": gpu(108, 163, 40, 3800, 2039, 1.41, False),
    "L40S": gpu(142, 99, 96, 5000, 864, 2.52, False),
    "H100": gpu(132, 227, 50, 5500, 3350, 1.755, True),
    "H200": gpu(132, 227, 50, 5500, 4800, 1.755, True),
    "B200": gpu(148, 227, 126, 9000, 8000, 1.9, True),
}
each_gpu = pytest.mark.parametrize("name", list(GPUS))
each_pass = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def plan(name_or_gpu: Any, hidden: int, dtype: str = "bfloat16", backward: bool = False, **changes: Any) -> Any:
    figures = GPUS[name_or_gpu] if isinstance(name_or_gpu, str) else name_or_gpu
    sizes = {"steps": 50, "batch": 1, "directions": 2, **changes}
    return native.plan_lstm(hidden=hidden, dtype=dtype, backward=backward, gpu=figures, **sizes)


def assert_possible(
    result: Any, figures: Any, hidden: int, dtype: str, backward: bool, directions: int, batch: int
) -> None:
    """The whole matrix is owned, the whole grid fits at once, and every weight is either on chip or streamed."""
    weights = 4 * hidden * hidden * BYTES[dtype]
    assert result["predicted_us"] > 0 and 1 <= result["directions_at_once"] <= directions
    assert result["blocks"] * result["units"] >= hidden
    assert result["on_chip_bytes"] + result["streamed_bytes"] == weights * result["directions_at_once"]
    if result["variant"] == "STREAM":
        assert result["on_chip_bytes"] == 0
        return
    assert result["blocks"] * result["directions_at_once"] <= figures["multiprocessors"]
    assert result["shared_bytes"] <= figures["shared_bytes"]
    assert result["register_bytes"] <= figures["register_bytes"] * (5 if figures["clusters"] else 4) // 8
    assert result["units"] * batch <= result["threads"] <= 256
    assert (result["streamed_bytes"] > 0) == (result["variant"] == "L")
    if result["variant"] == "S":
        assert figures["clusters"] and 2 <= result["blocks"] <= 8
    else:
        assert (result["blocks"] - 1) * result["units"] < hidden, "a block without units"
    if BYTES[dtype] == 2 and not backward:
        assert result["units"] % 2 == 0, "two 2-byte values share a word"


@each_pass
@each_gpu
def test_plans_of_all_sizes_are_possible_on_known_gpus(name: str, backward: bool) -> None:
    for hidden in (1, 2, 7, 64, 255, 256, 257, 768, 1009, 1024, 1152, 1664, 2304, 3072, 4096, 6151, 8192):
        for dtype in BYTES:
            for batch in (1, 3, 8):
                result = plan(name, hidden, dtype, backward, batch=batch)
                assert_possible(result, GPUS[name], hidden, dtype, backward, 2, batch)


@examples(200)
@given(data=st.data())
def test_a_plan_of_any_size_on_any_device_is_possible(data: st.DataObject) -> None:
    figures = gpu(
        data.draw(st.integers(1, 200)), data.draw(st.integers(1, 256)), 50, 5000, 2000, 1.5, data.draw(st.booleans())
    )
    hidden, dtype = data.draw(st.integers(1, 8192)), data.draw(st.sampled_from(list(BYTES)))
    backward, batch, directions = data.draw(st.booleans()), data.draw(st.integers(1, 8)), data.draw(st.integers(1, 2))
    result = plan(figures, hidden, dtype, backward, batch=batch, directions=directions)
    assert_possible(result, figures, hidden, dtype, backward, directions, batch)


@each_pass
@pytest.mark.parametrize(
    ("name", "hidden", "dtype", "variant"),
    [
        ("H200", 256, "float32", "S"),
        ("H200", 256, "bfloat16", "S"),
        ("H200", 768, "float32", "M"),
        ("H200", 1024, "float32", "M"),
        ("H200", 1024, "bfloat16", "M"),
        ("H200", 3072, "bfloat16", "L"),
        ("H200", 4096, "float32", "L"),
        ("B200", 1152, "float32", "M"),
        ("B200", 2304, "bfloat16", "M"),
        ("A100", 256, "float32", "M"),  # no clusters
        ("A100", 1024, "bfloat16", "M"),
        ("A100", 3072, "bfloat16", "L"),
        ("L40S", 1024, "bfloat16", "M"),
        ("L40S", 1024, "float32", "L"),
    ],
)
def test_sizes_get_the_variant_whose_arithmetic_is_in_the_docs(
    name: str, hidden: int, dtype: str, variant: str, backward: bool
) -> None:
    assert plan(name, hidden, dtype, backward)["variant"] == variant


@each_pass
def test_both_directions_run_at_once_while_they_fit_and_take_turns_beyond(backward: bool) -> None:
    """A turn has the whole chip: at H = 3072 in bf16 two turns read less from memory than one step of both."""
    assert plan("H200", 1024, "float32", backward)["directions_at_once"] == 2
    assert plan("H200", 3072, "bfloat16", backward)["directions_at_once"] == 1
    assert plan("H200", 3072, "bfloat16", backward, directions=1)["directions_at_once"] == 1


@pytest.mark.parametrize(
    ("name", "least", "most"), [("A100", 23, 31), ("H100", 41, 50), ("H200", 41, 50), ("B200", 44, 56)]
)
def test_most_of_shared_memory_and_half_of_the_registers_hold_weights(name: str, least: int, most: int) -> None:
    """(163 + 128) KB on 108 multiprocessors are 31 MB, (227 + 160) KB on 132 are 50.

    Vectors, rounding, and the 32 KB of each that are under way take some.
    """
    assert least <= plan(name, 4096)["on_chip_bytes"] / MB <= most


@each_pass
@each_gpu
def test_a_chosen_plan_is_predicted_no_slower_than_one_launch_a_step(name: str, backward: bool) -> None:
    for hidden in (32, 256, 1024, 3072, 8192):
        chosen, stream = (
            plan(name, hidden, "float32", backward),
            plan(name, hidden, "float32", backward, variant="STREAM"),
        )
        assert chosen["predicted_us"] <= stream["predicted_us"]


def test_predictions_grow_with_the_matrix_and_do_not_depend_on_the_steps() -> None:
    times = [plan("H200", hidden)["predicted_us"] for hidden in (64, 1024, 2304, 3072, 4096, 8192)]
    assert times == sorted(times)
    assert plan("H200", 777, steps=1) == plan("H200", 777, steps=4096)


def test_streamed_weights_come_from_l2_as_long_as_it_keeps_them() -> None:
    """30 MB in each step at H = 3072 in bf16: with room for 25 MB none of them stays, with room for 35 MB all do."""
    small, large = (plan({**GPUS["H100"], "l2_kept_bytes": size * MB}, 3072) for size in (25, 35))
    assert {**small, "predicted_us": 0} == {**large, "predicted_us": 0} and 25 * MB < small["streamed_bytes"] < 35 * MB
    rate = small["streamed_bytes"] / 5500e3 - small["streamed_bytes"] / 3350e3
    assert 2 * rate < large["predicted_us"] - small["predicted_us"] < 0


def test_a_device_that_holds_too_few_blocks_or_too_little_memory_gets_one_launch_a_step() -> None:
    no_room = {**GPUS["H200"], "shared_bytes": 1 * KB}
    assert plan(no_room, 1024)["variant"] == "STREAM"
    assert plan({**GPUS["H200"], "multiprocessors": 1}, 1024)["variant"] == "STREAM"


def test_a_variant_asked_for_is_planned_or_refused() -> None:
    """L streams padding if it must, so that it can be tried with small layers too."""
    for variant in ("S", "M", "L", "STREAM"):
        result = plan("H200", 256, variant=variant)
        assert result["variant"] == variant
    assert plan("H200", 3072, variant="S") is None and plan("H200", 3072, variant="M") is None
    assert plan("A100", 64, variant="S") is None


PROBE = {
    "sm": 90,
    "multiprocessors": 132,
    "shared_bytes_per_block": 227 * KB,
    "read_gb_per_s": 3000.0,
    "l2_read_gb_per_s": {"1 MiB": 5000.0, "24 MiB": 5400.0, "32 MiB": 4100.0, "48 MiB": 3300.0, "256 MiB": 3010.0},
}


def test_l2_keeps_what_the_probe_read_fast() -> None:
    """4200 GB/s lie half-way between memory and the best of L2."""
    figures = predicted.figures(PROBE)
    assert (figures["l2_kept_bytes"], figures["l2_gb_per_s"], figures["memory_gb_per_s"]) == (24 * MB, 5400, 3000)
    assert figures.keys() == GPUS["H100"].keys() and figures["clusters"]


def test_a_prediction_is_the_planners_steps_and_the_products_around_them() -> None:
    gpu = predicted.figures(PROBE)
    for rows, width, hidden, dtype in predicted.SHAPES:
        times = predicted.lstm(rows, width, hidden, dtype, gpu)
        for mode, passes in ((predicted.FORWARD, (False,)), (predicted.BACKWARD, (False, True))):
            steps = sum(2e-6 * rows * plan(gpu, hidden, dtype, backward)["predicted_us"] for backward in passes)
            least = _work.lstm(rows, width, hidden, BYTES[dtype])[mode].bytes / 3000e9
            assert max(steps, least) < times[mode] < steps + 2 * least + 6e-4


def test_predictions_are_printed_for_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "probe.json"
    file.write_text(json.dumps(PROBE))
    assert predicted.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("FUSEDPROMPT_LSTM_L2_MB=25\n") and printed.count("| 50, 3072, 3072 | bfloat16 |") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 0}, "hidden: expected 1 to 8192, got 0"),
        ({"hidden": 8193}, "hidden: expected 1 to 8192, got 8193"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch": 9}, "batch: expected 1 to 8, got 9"),
        ({"directions": 3}, "directions: expected 1 or 2, got 3"),
        ({"dtype": "float64"}, "dtype: expected float32, bfloat16 or float16, got float64"),
        ({"variant": "XL"}, "variant: expected S, M, L or STREAM, got XL"),
        ({"name_or_gpu": {}}, "gpu: expected the key multiprocessors, got none"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**{"name_or_gpu": "H200", "hidden": 64, **changes})
