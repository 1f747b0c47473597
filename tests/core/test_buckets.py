"""Length buckets: few distinct lengths, at most 1.5 times the input above the smallest ones."""

from monoblock.generation.buckets import bucket


def test_buckets():
    sizes = [bucket(length) for length in range(1, 2049)]
    assert sorted(set(sizes)) == [16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert sizes == sorted(sizes)
    for length, size in enumerate(sizes, start=1):
        assert size == bucket(size)
        assert length <= size <= max(16, 2 * length)
        assert length <= 64 or size < 1.5 * length
