"""Which steps and heads are looked at: unbiased, and the same for the same seed."""

from collections import Counter

from turboattention.monitoring.sampling import Rotation, Sampler


def test_the_share_is_met_for_every_layer_of_units_and_every_seed():
    for seed, share in ((0, 0.01), (1, 0.01), (2, 0.3)):
        sampler = Sampler(share, seed)
        taken = [[sampler.takes(request, step) for step in range(500)] for request in range(200)]
        deviation = (share * (1 - share)) ** 0.5
        assert abs(sum(map(sum, taken)) - 100_000 * share) < 5 * deviation * 100_000**0.5
        # Neither early steps nor any request is preferred.
        assert max(abs(sum(row) - 500 * share) for row in taken) < 5 * deviation * 500**0.5 + 1
        early = sum(sum(row[:50]) for row in taken)
        assert abs(early - 10_000 * share) < 5 * deviation * 10_000**0.5


def test_a_unit_is_decided_by_seed_and_number_alone():
    sampler, units = Sampler(0.1, 7), [(r, s) for r in range(40) for s in range(40)]
    once = {unit: sampler.takes(*unit) for unit in units}
    assert once == {unit: Sampler(0.1, 7).takes(*unit) for unit in reversed(units)}
    assert once != {unit: Sampler(0.1, 8).takes(*unit) for unit in units}
    assert all(Sampler(1.0).takes(*unit) for unit in units)


def test_every_head_has_its_turn_before_any_has_a_second():
    heads = [(layer, head) for layer in range(5) for head in range(3)]
    rotation, other = Rotation(heads, 3), Rotation(heads, 3)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(60):
        taken = rotation.take(4)
        assert taken == other.take(4)
        assert len(set(taken)) == 4
        assert len({layer for layer, _ in taken}) <= 3
        counts.update(taken)
        assert max(counts.values()) - min(counts[head] for head in heads) <= 2
    assert set(counts.values()) == {16}
    assert len(rotation.take(100)) == 15
    assert Rotation([], 0).take(4) == []
