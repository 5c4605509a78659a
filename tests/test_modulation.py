"""The table of a schedule's modulation against the blocks' own, and how long the cache keeps it."""

import pytest
import torch
import torch.nn.functional as F

from qwen_edit.attention import resolve
from qwen_edit.linear import NO_ADAPTERS, RESIDENT, LowRank
from qwen_edit.modulation import ROWS_KEPT, ModulationCache, ModulationTable, compute_table
from qwen_edit.quantize import quantize_weight
from qwen_edit.transformer import Forward, QwenEditTransformer, denoise

CONFIG = dict(
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=48,
    axes_dims_rope=(8, 12, 12),
)
CHANNELS = 64
SCHEDULE = (1.0, 0.75, 0.5, 0.25, 0.0)
LIKE = torch.empty(0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> QwenEditTransformer:
    torch.manual_seed(0)
    model = QwenEditTransformer(**CONFIG, zero_cond_t=True).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def own(model, linear, timestep: float) -> torch.Tensor:
    return linear(F.silu(model.time_text_embed(torch.tensor([timestep]), LIKE)))[0]


# The table


def test_the_table_is_what_each_block_computes_itself(model):
    table = compute_table(model, SCHEDULE, LIKE, RESIDENT, NO_ADAPTERS)
    assert table.blocks.shape == (5, 2, 2, 6 * CHANNELS)
    for item, (now, reference) in enumerate([(0.75, 0.0), (0.25, 0.5)]):
        rows = table.rows([0.75, 0.25], [0.0, 0.5])
        for index, block in enumerate(model.transformer_blocks):
            for stream, linear in enumerate((block.img_mod[1], block.txt_mod[1])):
                for half, modulation in enumerate(table.halves(index, stream, rows, 7)):
                    assert modulation.split == 7
                    for side, timestep in enumerate((now, reference)):
                        got = modulation.table[modulation.rows[side, item]]
                        torch.testing.assert_close(got, own(model, linear, timestep).chunk(2)[half])
        scale, shift = own(model, model.norm_out.linear, now).chunk(2)  # diffusers' AdaLayerNormContinuous
        torch.testing.assert_close(table.final[rows[0, item]], torch.cat([shift, scale]))


def test_the_table_holds_adapters_quantized_weights_and_hooks(model):
    linear, hooked = model.transformer_blocks[0].img_mod[1], model.transformer_blocks[1].txt_mod[1]
    adapter = LowRank(torch.randn(3, CHANNELS), torch.randn(6 * CHANNELS, 3), 0.5)
    activated = F.silu(model.time_text_embed(torch.tensor(SCHEDULE), LIKE))
    quantized = torch.nn.Parameter(quantize_weight(linear.weight, "int8"), requires_grad=False)
    expected = F.linear(activated, quantized.dequantize(), linear.bias) + 0.5 * activated @ adapter.a.T @ adapter.b.T
    kept = linear.weight
    hook = hooked.register_forward_hook(lambda module, args, output: 2 * output)
    linear.weight = quantized
    try:
        table = compute_table(model, SCHEDULE, LIKE, RESIDENT, {linear: [adapter]})
        torch.testing.assert_close(table.blocks[:, 1, 1], hooked(activated))
    finally:
        linear.weight = kept
        hook.remove()
    torch.testing.assert_close(table.blocks[:, 0, 0], expected)


# The cache


@pytest.mark.parametrize(
    "name", ["norm_out.linear", "time_text_embed.timestep_embedder.linear_2", "transformer_blocks.1.txt_mod.1"]
)
def test_a_replaced_forward_is_not_hidden_by_what_was_kept(model, name):
    """No key knows what it does."""
    latents, text = torch.randn(1, 16, 64), torch.randn(1, 3, 48)
    forward = Forward(resolve("pytorch", CPU, torch.float32, 32).attend)
    given = {"axes_dims": CONFIG["axes_dims_rope"], "zero_cond_t": False, "modulation": ModulationCache()}

    def velocity():
        return denoise(model, latents, torch.tensor([0.5]), text, ((4, 4),), forward, **given)

    before, module = velocity(), model.get_submodule(name)
    own = module.forward
    module.forward = lambda x: 2 * own(x)
    try:
        assert not torch.allclose(velocity(), before)
    finally:
        del module.forward
    assert torch.equal(velocity(), before)


@pytest.fixture
def cache():
    """``look_up`` in a cache whose tables have one channel; ``computed`` are the timesteps of each computation."""

    class Counted(ModulationCache):
        computed: list[list[float]]

        def look_up(self, key, needed, schedule=()):
            return self.table(key, needed, schedule, self.compute)

        def compute(self, timesteps):
            self.computed.append(list(timesteps))
            rows = len(timesteps)
            return ModulationTable(
                torch.zeros(rows, 1, 2, 6), torch.zeros(rows, 2), {t: i for i, t in enumerate(timesteps)}
            )

    counted = Counted()
    counted.computed = []
    return counted


def test_a_schedule_is_computed_once(cache):
    tables = [cache.look_up("key", [sigma, 0.0], SCHEDULE) for sigma in SCHEDULE * 2]
    assert all(table is tables[0] for table in tables)
    assert cache.computed == [sorted(SCHEDULE)]


def test_a_timestep_outside_the_schedule_gets_a_table_of_its_own(cache):
    whole = cache.look_up("key", [0.5, 0.0], SCHEDULE)
    other = cache.look_up("key", [0.6, 0.0], SCHEDULE)
    assert cache.computed == [sorted(SCHEDULE), [0.0, 0.6]]
    assert cache.look_up("key", [0.6, 0.0], SCHEDULE) is other
    assert cache.look_up("key", [0.25, 0.0], SCHEDULE) is whole
    assert len(cache.computed) == 2


def test_another_schedule_has_its_own_table_in_either_order(cache):
    """Products of other timesteps together may round differently: what was made before must decide nothing."""
    short = (1.0, 0.0)
    for key, schedules in (("one", (short, SCHEDULE)), ("other", (SCHEDULE, short))):
        for each in schedules:
            assert set(cache.look_up(key, [1.0, 0.0], each).row_of) == set(each)


def test_without_a_schedule_only_what_is_needed_is_computed(cache):
    cache.look_up("key", [0.5, 0.25, 0.5, 0.0])
    assert cache.computed == [[0.0, 0.25, 0.5]]


def test_other_weights_or_adapters_are_computed_anew(cache):
    first, second = (cache.look_up(key, [0.5, 0.0], SCHEDULE) for key in ("first", "second"))
    assert first is not second
    assert cache.look_up("first", [0.5, 0.0], SCHEDULE) is first
    assert cache.computed == [sorted(SCHEDULE)] * 2
    cache.clear()
    assert cache.look_up("first", [0.5, 0.0], SCHEDULE) is not first


def schedule(rows: int, first: float = 0.0) -> list[float]:
    return [first + i / 1000 for i in range(rows)]


def test_the_key_not_used_for_longest_is_forgotten(cache):
    third = ROWS_KEPT // 3
    tables = {key: cache.look_up(key, [0.0], schedule(third)) for key in "abc"}
    assert cache.look_up("a", [0.0], schedule(third)) is tables["a"]  # now the last used
    cache.look_up("d", [0.0], schedule(third))
    assert cache.look_up("a", [0.0], schedule(third)) is tables["a"]
    assert cache.look_up("c", [0.0], schedule(third)) is tables["c"]
    assert len(cache.computed) == 4
    assert cache.look_up("b", [0.0], schedule(third)) is not tables["b"]


def test_of_one_key_the_oldest_table_is_forgotten(cache):
    half = ROWS_KEPT // 2
    numbers = [half * n / 1000 for n in range(3)]
    # timesteps outside the schedule, which is the same each time, get tables of their own
    oldest, kept, newest = (cache.look_up("key", schedule(half, n), ()) for n in numbers)
    assert cache.look_up("key", [numbers[1]], ()) is kept
    assert cache.look_up("key", [numbers[2]], ()) is newest
    assert cache.look_up("key", [numbers[0]], ()) is not oldest


def test_a_table_larger_than_the_cache_is_kept_while_in_use(cache):
    small = cache.look_up("small", [0.0], schedule(2))
    large = cache.look_up("large", [0.0], schedule(ROWS_KEPT + 1))
    assert cache.look_up("large", [0.1], schedule(ROWS_KEPT + 1)) is large
    assert cache.look_up("small", [0.0], schedule(2)) is not small


def test_a_failed_computation_leaves_nothing(cache):
    """As when memory runs out; the cache has to go on working with other keys."""

    def fail(timesteps):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        cache.table("failed", [0.0], SCHEDULE, fail)
    for key in ("a", "b", "c"):
        cache.look_up(key, [0.0], schedule(ROWS_KEPT // 2))
    assert len(cache.computed) == 3
