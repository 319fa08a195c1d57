from sparse_fcmae.runtime.streams import Stream, numpy_generator, torch_seed


def test_streams_never_change():
    """Runs of earlier versions go on with these numbers."""
    assert {s.name: int(s) for s in Stream} == {
        "CROPS": 1,
        "ORDER": 2,
        "MASKS": 3,
        "SPLIT": 4,
        "FEW_LABELS": 5,
        "AUGMENTATION": 6,
        "SURVEY": 7,
        "HELD_OUT": 8,
    }
    assert numpy_generator(7, Stream.CROPS, 2, 5).integers(10**6, size=3).tolist() == [833780, 372929, 706273]
    assert [torch_seed(7, Stream.MASKS, step) for step in (0, 1)] == [2530781778362038830, 6665335680343557524]


def test_places_seeds_and_streams_differ():
    seeds = {torch_seed(seed, stream, step) for seed in (0, 1) for stream in Stream for step in range(3)}
    assert len(seeds) == 2 * len(Stream) * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
