"""Costs of single instructions, written as the TPU compiler writes them, against arithmetic."""

import pytest
from compile_programs import V5P

from tml.plan.chips import CHIPS
from tml.plan.cost import ATTENTION, GATHER, GROUPED_MATMUL, MATMUL, MOVEMENT, SORT, Cost, CostModel
from tml.plan.hlo import parse


def cost_of(body: str, fused: str = "", chip=V5P) -> Cost:
    """The cost of the instruction called %it."""
    program = parse(f"HloModule m, is_scheduled=true\n\n{fused}\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}\n")
    return CostModel(program, chip).cost(program.entry, program.entry.instructions["it"])


BATCHED = """  %a = bf16[4,256,64]{2,1,0} parameter(0)
  %b = bf16[4,64,128]{2,1,0} parameter(1)
  ROOT %it = bf16[4,256,128]{2,1,0} convolution(%a, %b), """
BATCHED += "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf"


def test_a_batched_matmul_is_no_convolution_over_its_batch():
    assert cost_of(BATCHED).flops == 2 * 4 * 256 * 64 * 128


def test_padding_of_a_convolution_costs_nothing():
    body = """  %a = f32[2,16,8]{2,1,0} parameter(0)
  %b = f32[4,1,8]{2,1,0} parameter(1)
  ROOT %it = f32[2,16,8]{2,1,0} convolution(%a, %b), window={size=4 pad=3_0}, """
    body += "dim_labels=b0f_0io->b0f, feature_group_count=8"
    taps = 16 * 4 - (3 + 2 + 1)
    assert cost_of(body).flops == 2 * 2 * 8 * taps


def test_a_matmul_takes_what_the_compiler_says_where_that_is_trusted():
    cycles = ', backend_config={"window_config":{"estimated_cycles":"1750000"}}'
    assert cost_of(BATCHED + cycles).seconds == pytest.approx(1e-3)
    moved = 2 * 4 * (256 * 64 + 64 * 128 + 256 * 128)
    assert cost_of(BATCHED + cycles, chip=CHIPS["v6e"]).seconds == pytest.approx(moved / 1.64e12)


def test_what_stays_on_the_chip_moves_nothing():
    body = """  %a = f32[1024,1024]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %it = f32[1024,1024]{1,0:T(8,128)} copy(%a)"""
    found = cost_of(body)
    assert found.hbm_bytes == 4 * 1024 * 1024
    assert found.category == MOVEMENT


FUSED_UPDATE = """%fused (p: f32[50,128], q: f32[1,128], i: s32[]) -> f32[50,128] {
  %p = f32[50,128]{1,0} parameter(0)
  %q = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[50,128]{1,0} dynamic-update-slice(%p, %q, %i, %zero)
}
"""


def test_an_update_in_place_moves_the_update():
    body = """  %a = f32[50,128]{1,0} parameter(0)
  %b = f32[1,128]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %it = f32[50,128]{1,0} fusion(%a, %b, %n), kind=kLoop, calls=%fused"""
    assert cost_of(body, FUSED_UPDATE).hbm_bytes == 4 * 128 * 2 + 4


def test_rows_are_gathered_at_a_price_each():
    body = """  %a = bf16[131072,4096]{1,0} parameter(0)
  %b = s32[122880]{0} parameter(1)
  ROOT %it = bf16[122880,4096]{1,0} gather(%a, %b), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,4096}"""
    found = cost_of(body)
    assert found.category == GATHER
    # The compiler's schedule has 5,233 bundles for 128 rows on each of two cores (bench_row_gather).
    assert found.seconds == pytest.approx(122_880 * 5_233 / 128 / 2 / 1.75e9, rel=0.01)
    assert found.seconds > 1.9 * 2 * 122_880 * 8_192 / 2.765e12


def test_a_sort_passes_over_its_rows_as_often_as_these_are_long():
    body = """  %a = f32[32768,256]{1,0} parameter(0)
  ROOT %it = f32[32768,256]{1,0} sort(%a), dimensions={1}, to_apply=%greater"""
    found = cost_of(body)
    assert found.category == SORT
    assert found.hbm_bytes == 2 * 8 * 4 * 32768 * 256


KERNEL = """  %a = bf16[128,128]{1,0} parameter(0)
  ROOT %it = bf16[128,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", """


def test_a_kernel_costs_what_it_states():
    scope = 'metadata={op_name="jit(f)/jvp(layer)/attend/kernel"}, '
    stated = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"459000000000","bytes_accessed":"1000"}}}'
    found = cost_of(KERNEL + scope + stated)
    assert (found.flops, found.hbm_bytes, found.unknown) == (459e9, 1000, "")
    assert found.seconds == pytest.approx(1e-3)
    assert found.category == ATTENTION


def test_a_kernel_for_gpu_states_its_cost_beside_it():
    stated = r'backend_config={num_warps = 4 : i32, serialized_metadata = "{\22flops\22: \22989000000000\22, '
    stated += r'\22bytes_accessed\22: \221000\22}"}'
    scope = 'metadata={op_name="jit(f)/mlp/experts/kernel"}, '
    found = cost_of(KERNEL.replace("tpu_custom_call", "__gpu$xla.gpu.triton") + scope + stated, chip=CHIPS["h200"])
    assert (found.flops, found.hbm_bytes, found.unknown) == (989e9, 1000, "")
    assert found.seconds == pytest.approx(1e-3)
    assert found.category == GROUPED_MATMUL


def test_a_kernel_that_states_nothing_is_named():
    found = cost_of(KERNEL + "backend_config={}")
    assert "tpu_custom_call" in found.unknown
    assert found.hbm_bytes == 2 * 2 * 128 * 128


def test_matmuls_of_experts_count_by_themselves():
    assert cost_of(BATCHED).category == MATMUL
    grouped = ', metadata={op_name="jit(step)/transpose(jvp(mlp))/experts/dot_general"}'
    assert cost_of(BATCHED + grouped).category == GROUPED_MATMUL
    shared = ', metadata={op_name="jit(step)/jvp(mlp)/shared_experts/dot_general"}'
    assert cost_of(BATCHED + shared).category == MATMUL


def test_a_library_matmul_costs_its_shapes():
    body = """  %a = bf16[8,64,32]{2,1,0} parameter(0)
  %b = bf16[8,32,16]{2,1,0} parameter(1)
  ROOT %it = (bf16[8,64,16]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", """
    batch = 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":["0"]}}}'
    assert cost_of(body + batch).flops == pytest.approx(2 * 8 * 64 * 32 * 16)


FUSED_SCATTER = """%fused (p: bf16[64,512,128], i: s32[16,2], q: bf16[16,128]) -> bf16[64,512,128] {
  %p = bf16[64,512,128]{2,1,0} parameter(0)
  %i = s32[16,2]{1,0} parameter(1)
  %q = bf16[16,128]{1,0} parameter(2)
  ROOT %update = bf16[64,512,128]{2,1,0} scatter(%p, %i, %q), update_window_dims={1}, inserted_window_dims={0,1}
}
"""


def test_a_scatter_in_place_moves_what_it_updates():
    body = """  %a = bf16[64,512,128]{2,1,0} parameter(0)
  %b = s32[16,2]{1,0} parameter(1)
  %c = bf16[16,128]{1,0} parameter(2)
  ROOT %it = bf16[64,512,128]{2,1,0} fusion(%a, %b, %c), kind=kCustom, calls=%fused"""
    found = cost_of(body, FUSED_SCATTER)
    assert found.category == GATHER
    # Rows are read, updated and written; the places are read.
    assert found.hbm_bytes == 3 * 2 * 16 * 128 + 4 * 16 * 2


HANDED_ON = """%inner (p: bf16[4096,1024]) -> bf16[4096,1024] {
  %p = bf16[4096,1024]{0,1} parameter(0)
  ROOT %same = bf16[4096,1024]{0,1} bitcast(%p)
}

%fused (w: bf16[4096,1024], x: bf16[16,4096]) -> bf16[16,1024] {
  %w = bf16[4096,1024]{0,1} parameter(0)
  %x = bf16[16,4096]{1,0} parameter(1)
  %handed = bf16[4096,1024]{0,1} fusion(%w), kind=kLoop, calls=%inner
  ROOT %dot = bf16[16,1024]{1,0} convolution(%x, %handed), dim_labels=bf_io->bf
}
"""


def test_what_a_fusion_inside_hands_on_is_read():
    body = """  %a = bf16[4096,1024]{0,1} parameter(0)
  %b = bf16[16,4096]{1,0} parameter(1)
  ROOT %it = bf16[16,1024]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused"""
    assert cost_of(body, HANDED_ON).hbm_bytes == 2 * (4096 * 1024 + 16 * 4096 + 16 * 1024)
