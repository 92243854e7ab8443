"""The estimator on programs whose cost is known by arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_programs import V5P, array, compile_program, cube, mesh_of
from jax.sharding import PartitionSpec as P

from tml.plan.chips import CHIPS, Chip
from tml.plan.cost import MATMUL, MOVEMENT
from tml.plan.estimate import estimate
from tml.plan.hlo import parse
from tml.plan.links import COLLECTIVES


def flops_of(program) -> float:
    return sum(line.flops for line in estimate(program, cube()).lines)


def test_a_matmul_costs_its_flops_or_its_bytes():
    one = mesh_of(data=1)
    program = compile_program(lambda a, b: a @ b, array((256, 512), one), array((512, 128), one))
    found = estimate(program, cube())
    assert flops_of(program) == 2 * 256 * 512 * 128
    # On one chip this matmul is bound by memory: three arrays move.
    moved = 4 * (256 * 512 + 512 * 128 + 256 * 128)
    assert found.seconds == pytest.approx(moved / V5P.hbm_bytes_per_s)
    assert found.lower_limit == "main memory"
    assert list(found.by_category()) == [MATMUL]


def test_loops_count_as_often_as_they_run():
    one = mesh_of(data=1)

    def nested(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        def layer(x_BD: jax.Array, w_DD: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w_DD), x_BD), None

        return jax.lax.scan(layer, x_BD, w_LDD)[0]

    program = compile_program(nested, array((5, 64, 64), one), array((32, 64), one))
    assert flops_of(program) == 5 * 3 * 2 * 32 * 64 * 64
    found = estimate(program, cube())
    (matmul,) = [line for line in found.lines if line.category == MATMUL]
    assert matmul.count == 15
    assert not found.unknown


def test_gradients_of_a_scan_cost_three_times_its_matmuls():
    one = mesh_of(data=1)

    def loss(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0])

    args = array((6, 64, 64), one), array((32, 64), one)
    program = compile_program(jax.value_and_grad(loss, argnums=(0, 1)), *args)
    assert flops_of(program) == 3 * 6 * 2 * 32 * 64 * 64


def test_a_loop_that_nobody_can_count_is_named():
    one = mesh_of(data=1)

    def until_small(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: x @ x, x)

    program = compile_program(until_small, array((64, 64), one))
    once, often = estimate(program, cube()), estimate(program, cube(), unknown_trips=10)
    assert "how often the loop at" in once.unknown[0]
    assert sum(line.flops for line in often.lines) == 10 * sum(line.flops for line in once.lines) == 10 * 2 * 64**3


def test_a_scan_reads_its_slice_and_not_the_stack():
    one = mesh_of(data=1)
    num_layers, width = 50, 128

    def total(w_LD: jax.Array, x_D: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x + w), None), x_D, w_LD)[0]

    program = compile_program(total, array((num_layers, width), one), array((width,), one))
    moved = sum(line.hbm_bytes for line in estimate(program, cube()).lines)
    # A layer reads its row and the carry and writes the carry; twice that for a compiler that copies.
    assert moved < 2 * num_layers * 4 * width * 4
    assert moved > num_layers * 4 * width * 2


def test_collectives_are_counted_and_wait():
    mesh = mesh_of(data=2, model=4)
    shape = (1024, 512)

    def gathered(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, "model", axis=0, tiled=True)

    program = compile_program(
        jax.shard_map(gathered, mesh=mesh, in_specs=P("model"), out_specs=P(), check_vma=False),
        array(shape, mesh, "model"),
    )
    found = estimate(program, cube())
    (line,) = [line for line in found.lines if line.category in COLLECTIVES]
    assert line.category == "all-gather"
    assert line.transfer_bytes == 4 * 1024 * 512 * 3 / 4
    # Four devices are a square of the cube: one link along each of two axes, which no chip beyond them uses.
    assert line.exposed_seconds == pytest.approx(line.transfer_bytes / (2 * V5P.link_bytes_per_s), rel=0.5)
    assert line.exposed_seconds > line.transfer_bytes / (2 * V5P.link_bytes_per_s)
    assert found.seconds >= line.exposed_seconds


ASYNCHRONOUS = """HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (a: f32[1048576], b: f32[4096,4096]) -> (f32[8388608], f32[4096,4096]) {
  %a = f32[1048576]{0} parameter(0)
  %b = f32[4096,4096]{1,0} parameter(1)
  %start = (f32[1048576]{0}, f32[8388608]{0}) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %dot = f32[4096,4096]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[8388608]{0} all-gather-done(%start)
  %again = f32[8388608]{0} all-gather(%a), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %out = (f32[8388608]{0}, f32[4096,4096]{1,0}) tuple(%done, %dot)
}
"""


def test_what_stands_between_start_and_done_hides_the_transfer():
    found = estimate(parse(ASYNCHRONOUS), cube())
    by_name = {line.name: line for line in found.lines}
    dot_seconds = 2 * 4096**3 / V5P.peak_flops_per_s
    assert by_name["dot"].core_seconds == pytest.approx(dot_seconds)
    transfer_seconds = by_name["again"].link_seconds
    assert by_name["start"].link_seconds == transfer_seconds
    assert by_name["start"].exposed_seconds == pytest.approx(max(0.0, transfer_seconds - dot_seconds))
    assert by_name["again"].exposed_seconds == pytest.approx(transfer_seconds)
    assert found.seconds == pytest.approx(max(dot_seconds, transfer_seconds) + transfer_seconds)
    assert found.lower_seconds == pytest.approx(max(dot_seconds, 2 * transfer_seconds))


FETCHED_BY_PARTS = """HloModule m, is_scheduled=true, num_partitions=1

%part (p: s8[67108864]) -> s8[4194304] {
  %p = s8[67108864]{0} parameter(0)
  ROOT %slice = s8[4194304]{0:S(1)} slice(%p), slice={[0:4194304]}
}

ENTRY %main (a: s8[67108864], b: f32[4096,4096]) -> (s8[4194304], f32[4096,4096]) {
  %a = s8[67108864]{0} parameter(0)
  %b = f32[4096,4096]{1,0} parameter(1)
  %start = ((s8[67108864]{0}), s8[4194304]{0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%part
  %dot = f32[4096,4096]{1,0} dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = s8[4194304]{0:S(1)} async-done(%start)
  ROOT %out = (s8[4194304]{0:S(1)}, f32[4096,4096]{1,0}) tuple(%done, %dot)
}
"""


def test_a_part_that_is_fetched_ahead_counts_its_own_bytes_beside_what_hides_it():
    found = estimate(parse(FETCHED_BY_PARTS), cube())
    dot_seconds = 2 * 4096**3 / V5P.peak_flops_per_s
    assert found.seconds == pytest.approx(dot_seconds)
    assert sum(line.hbm_bytes for line in found.lines) == 3 * 4 * 4096**2 + 4_194_304


OF_A_STACK = """HloModule m, is_scheduled=true, num_partitions=1

%part (p: f32[64,65536], q: f32[1,65536], i: s32[], j: s32[]) -> f32[64,65536] {
  %p = f32[64,65536]{1,0} parameter(0)
  %q = f32[1,65536]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %j = s32[] parameter(3)
  ROOT %update = f32[64,65536]{1,0} dynamic-update-slice(%p, %q, %i, %j)
}

ENTRY %main (a: f32[64,65536], b: f32[1,65536], n: s32[], x: f32[4096,4096]) -> (RESULT, f32[4096,4096]) {
  %a = f32[64,65536]{1,0} parameter(0)
  %b = f32[1,65536]{1,0SPACE} parameter(1)
  %n = s32[] parameter(2)
  %x = f32[4096,4096]{1,0} parameter(3)
  %start = START
  %dot = f32[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = RESULT DONE(%start)
  ROOT %out = (RESULT, f32[4096,4096]{1,0}) tuple(%done, %dot)
}
"""
ROW, STACK = "f32[1,65536]{1,0SPACE}", "f32[64,65536]{1,0}"
UPDATE = f"(({STACK}, {ROW}, s32[], s32[]), {STACK}, u32[]) OPCODE(%a, %b, %n, %n)"


@pytest.mark.parametrize(
    ("start", "done", "result"),
    [
        (UPDATE.replace("OPCODE", "dynamic-update-slice-start"), "dynamic-update-slice-done", STACK),
        (UPDATE.replace("OPCODE", "async-start") + ", calls=%part", "async-done", STACK),
        (f"(({STACK}, s32[], s32[]), {ROW}, u32[]) dynamic-slice-start(%a, %n, %n)", "dynamic-slice-done", ROW),
    ],
    ids=["update", "wrapped update", "slice"],
)
@pytest.mark.parametrize(("space", "times"), [("", 2), (":S(1)", 1)], ids=["in main memory", "on the chip"])
def test_a_row_of_a_stack_that_moves_ahead_counts_its_own_bytes(
    start: str, done: str, result: str, space: str, times: int
):
    text = OF_A_STACK.replace("START", start).replace("DONE", done).replace("RESULT", result)
    found = estimate(parse(text.replace("SPACE", space)), cube())
    (line,) = [line for line in found.lines if line.name == "start"]
    assert line.hbm_bytes == times * 4 * 65_536
    assert found.seconds == pytest.approx(2 * 4096**3 / V5P.peak_flops_per_s)


RENDEZVOUS = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="psum.1"}'

OVER_SLICES = f"""HloModule m, is_scheduled=true, num_partitions=16

ENTRY %main (a: f32[1048576], b: f32[4096,4096]) -> (f32[1048576], f32[4096,4096]) {{
  %a = f32[1048576]{{0}} parameter(0)
  %b = f32[4096,4096]{{1,0}} parameter(1)
  %after = token[] after-all()
  %send = (f32[1048576]{{0}}, u32[], token[]) send(%a, %after), channel_id=1, {RENDEZVOUS}
  %sent = token[] send-done(%send), channel_id=1, {RENDEZVOUS}
  %recv = (f32[1048576]{{0}}, u32[], token[]) recv(%sent), channel_id=2, {RENDEZVOUS}
  %dot = f32[4096,4096]{{1,0}} dot(%b, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %received = (f32[1048576]{{0}}, token[]) recv-done(%recv), channel_id=2, {RENDEZVOUS}
  %sum = f32[1048576]{{0}} get-tuple-element(%received), index=0
  ROOT %out = (f32[1048576]{{0}}, f32[4096,4096]{{1,0}}) tuple(%sum, %dot)
}}
"""


@pytest.mark.parametrize("chip", [V5P, CHIPS["tpu7x"]], ids=lambda chip: chip.name)
def test_a_sum_over_slices_takes_the_network_until_it_is_received(chip: Chip):
    pod = cube()
    coords = np.concatenate([pod.coords, pod.coords + np.array([1, 0, 0, 0])])
    found = estimate(parse(OVER_SLICES), dataclasses.replace(pod, chip=chip, coords=coords))
    network_seconds = 4 * 2**20 * chip.devices_per_chip / chip.network_bytes_per_s
    dot_seconds = 2 * 4096**3 * chip.devices_per_chip / chip.peak_flops_per_s
    assert network_seconds > dot_seconds
    assert found.seconds == pytest.approx(network_seconds)
    assert (found.lower_seconds, found.lower_limit) == (pytest.approx(network_seconds), "network")


GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}"

ON_SPARSE_CORES = f"""HloModule m, is_scheduled=true, num_partitions=8

%called (p: f32[1048576]) -> f32[8388608] {{
  %p = f32[1048576]{{0}} parameter(0)
  ROOT %ag = f32[8388608]{{0}} all-gather(%p), {GROUPS}, dimensions={{0}}
}}, execution_thread="sparsecore"

%wrapped (q: f32[1048576]) -> f32[8388608] {{
  %q = f32[1048576]{{0}} parameter(0)
  ROOT %call = f32[8388608]{{0}} call(%q), to_apply=%called
}}, execution_thread="sparsecore"

ENTRY %main (a: f32[1048576], b: f32[1024,1024]) -> (f32[8388608], f32[1024,1024]) {{
  %a = f32[1048576]{{0}} parameter(0)
  %b = f32[1024,1024]{{1,0}} parameter(1)
  %start = ((f32[1048576]{{0}}), f32[8388608]{{0}}) async-start(%a), async_execution_thread="sparsecore", calls=%wrapped
  %dot = f32[1024,1024]{{1,0}} dot(%b, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %done = f32[8388608]{{0}} async-done(%start)
  ROOT %out = (f32[8388608]{{0}}, f32[1024,1024]{{1,0}}) tuple(%done, %dot)
}}
"""

AS_CALLS = (
    ON_SPARSE_CORES.replace("async-start(%a)", "call-start(%a)")
    .replace("calls=%wrapped", "to_apply=%called")
    .replace("async-done", "call-done")
)
"""How the finished program writes it; the one before code generation has wrapped calls."""

IN_FUSIONS = f"""HloModule m, is_scheduled=true, num_partitions=8

%begin (p: f32[1048576]) -> (f32[1048576], f32[8388608]) {{
  %p = f32[1048576]{{0}} parameter(0)
  %first = f32[8388608]{{0}} all-gather(%p), {GROUPS}, dimensions={{0}}
  ROOT %to = (f32[1048576]{{0}}, f32[8388608]{{0}}) custom-call(%first), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (x: f32[1024,1024], q: f32[1048576], w: f32[8388608]) -> (f32[1024,1024], f32[8388608]) {{
  %x = f32[1024,1024]{{1,0}} parameter(0)
  %q = f32[1048576]{{0}} parameter(1)
  %w = f32[8388608]{{0}} parameter(2)
  %product = f32[1024,1024]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %second = f32[8388608]{{0}} all-gather(%q), {GROUPS}, dimensions={{0}}
  ROOT %both = (f32[1024,1024]{{1,0}}, f32[8388608]{{0}}) tuple(%product, %second)
}}

%end (v: f32[8388608]) -> f32[8388608] {{
  %v = f32[8388608]{{0}} parameter(0)
  ROOT %from = f32[8388608]{{0}} custom-call(%v), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (a: f32[1048576], b: f32[1024,1024]) -> (f32[8388608], f32[1024,1024]) {{
  %a = f32[1048576]{{0}} parameter(0)
  %b = f32[1024,1024]{{1,0}} parameter(1)
  %start = (f32[1048576]{{0}}, f32[8388608]{{0}}) fusion(%a), kind=kCustom, calls=%begin
  %mine = f32[1048576]{{0}} get-tuple-element(%start), index=0
  %all = f32[8388608]{{0}} get-tuple-element(%start), index=1
  %dot = (f32[1024,1024]{{1,0}}, f32[8388608]{{0}}) fusion(%b, %mine, %all), calls=%async_collective_fusion.1
  %result = f32[1024,1024]{{1,0}} get-tuple-element(%dot), index=0
  %rest = f32[8388608]{{0}} get-tuple-element(%dot), index=1
  %done = f32[8388608]{{0}} fusion(%rest), kind=kCustom, calls=%end
  ROOT %out = (f32[8388608]{{0}}, f32[1024,1024]{{1,0}}) tuple(%done, %result)
}}
"""


@pytest.mark.parametrize(
    "text", [ON_SPARSE_CORES, AS_CALLS, IN_FUSIONS], ids=["SparseCores", "calls", "steps inside fusions"]
)
def test_a_transfer_under_way_counts_once_however_it_is_written(text: str):
    again = next(line for line in estimate(parse(ASYNCHRONOUS), cube()).lines if line.name == "again")
    found = estimate(parse(text), cube())
    by_name = {line.name: line for line in found.lines}
    dot_seconds = 2 * 1024**3 / V5P.peak_flops_per_s
    assert dot_seconds < again.link_seconds, "some of the transfer is left over"
    assert by_name["dot"].core_seconds == pytest.approx(dot_seconds)
    assert sum(line.link_seconds for line in found.lines) == pytest.approx(again.link_seconds)
    assert by_name["start"].exposed_seconds == pytest.approx(again.link_seconds - dot_seconds)
    assert found.seconds == pytest.approx(again.link_seconds)


def test_a_collective_beside_the_cores_has_the_line_of_what_it_runs():
    metadata = 'metadata={op_name="layer/gather/all_gather" source_file="m.py" source_line=7}'
    text = ON_SPARSE_CORES.replace("dimensions={0}", f"dimensions={{0}}, {metadata}")
    (start,) = [line for line in estimate(parse(text), cube()).lines if line.name == "start"]
    assert (start.source, start.scope) == ("m.py:7", "layer/gather/all_gather")


EXCHANGED = f"""HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (a: bf16[8192,128], b: bf16[12288,128], n: s32[64]) -> bf16[8192,128] {{
  %a = bf16[8192,128]{{1,0}} parameter(0)
  %b = bf16[12288,128]{{1,0}} parameter(1)
  %n = s32[64]{{0}} parameter(2)
  %there = bf16[12288,128]{{1,0}} ragged-all-to-all(%a, %b, %n, %n, %n, %n), {GROUPS}
  ROOT %back = bf16[8192,128]{{1,0}} ragged-all-to-all(%there, %a, %n, %n, %n, %n), {GROUPS}
}}
"""


def test_a_ragged_exchange_moves_its_rows_and_not_the_room_of_its_buffers():
    found = estimate(parse(EXCHANGED), cube())
    there, back = found.lines
    # Each device sends its 8,192 rows and keeps an eighth; 12,288 find room at every receiver.
    assert there.transfer_bytes == back.transfer_bytes == 2 * 128 * 8192 * 7 / 8
    assert there.link_seconds == back.link_seconds


SCATTERED = f"""HloModule m, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (p: f32[8388608]) -> f32[1048576] {{
  %p = f32[8388608]{{0}} parameter(0)
  %sum = f32[8388608]{{0}} all-reduce(%p), {GROUPS}
  %zero = s32[] constant(0)
  ROOT %mine = f32[1048576]{{0}} dynamic-slice(%sum, %zero), dynamic_slice_sizes={{1048576}}
}}

ENTRY %main (a: f32[8388608]) -> f32[1048576] {{
  %a = f32[8388608]{{0}} parameter(0)
  ROOT %out = f32[1048576]{{0}} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""


def test_a_reduction_of_which_a_slice_is_kept_is_a_reduce_scatter():
    (line,) = estimate(parse(SCATTERED), cube()).lines
    assert line.category == "reduce-scatter"
    assert line.transfer_bytes == 4 * 8388608 * 7 / 8


def test_copies_are_called_what_they_are():
    one = mesh_of(data=1)
    program = compile_program(lambda x: x.T.astype(jnp.bfloat16), array((256, 512), one))
    assert set(estimate(program, cube()).by_category()) == {MOVEMENT}


def test_sums_agree_with_the_lines():
    one = mesh_of(data=1)
    program = compile_program(lambda a, b: jnp.tanh(a @ b).T, array((64, 128), one), array((128, 32), one))
    found = estimate(program, cube())
    assert sum(line.seconds for line in found.by_category().values()) == pytest.approx(found.seconds)
    assert sum(line.seconds for line in found.top(10_000)) == pytest.approx(found.seconds)
    assert np.all(np.diff([line.seconds for line in found.top(10)]) <= 0)


def test_what_one_line_costs_in_two_scopes_is_told_apart():
    def thrice(x: jax.Array) -> jax.Array:
        for scope in ("first", "second", "second"):
            with jax.named_scope(scope):
                x = x @ x
        return x

    top = estimate(compile_program(thrice, array((256, 256), mesh_of(data=1))), cube()).top(10)
    assert [(line.scope.split("/")[-2], line.count) for line in top] == [("second", 2), ("first", 1)]
