from datasketch import MinHash

from ip2p.triplets.near_duplicates import MinHashDuplicates

LONG = "an old wooden fishing boat with blue trim lying on a pebble beach under heavy grey clouds in autumn"


def test_the_same_edit_of_nearly_the_same_caption_is_found():
    duplicates = MinHashDuplicates(0.8)
    assert duplicates.add(LONG, "make it night")
    assert not duplicates.add(LONG.upper() + "!", "Make it night.")
    assert not duplicates.add(LONG + " light", "make it night")


def test_another_edit_or_another_caption_is_no_duplicate():
    duplicates = MinHashDuplicates(0.8)
    assert duplicates.add(LONG, "make it red")
    assert duplicates.add(LONG, "make it blue")
    assert duplicates.add("a castle on a hill", "make it red")


def test_a_refused_one_is_not_remembered():
    duplicates = MinHashDuplicates(0.8)
    words = LONG.split()
    assert duplicates.add(" ".join(words), "make it night")
    near = [*words[2:], "calm"]  # within 0.8 of the first
    assert not duplicates.add(" ".join(near), "make it night")
    far = [*near[4:], "sea", "gulls", "rope"]  # within 0.6 of the second, 0.5 of the first
    assert duplicates.add(" ".join(far), "make it night")


def test_many_are_handled_quickly_and_all_copies_found():
    duplicates = MinHashDuplicates(0.8)
    captions = [
        f"picture of thing {n} beside thing {n + 1} near place {n * 7} with colour {n * 13}" for n in range(1500)
    ]
    assert all(duplicates.add(caption, "make it night") for caption in captions)
    assert not any(duplicates.add(caption, "make it night") for caption in captions)


def test_permutations_are_drawn_once_and_shared_by_all_triplets(monkeypatch):
    drawn, draw = [], MinHash._init_permutations
    monkeypatch.setattr(MinHash, "_init_permutations", lambda *args: drawn.append(1) or draw(*args))
    duplicates = MinHashDuplicates(0.8)
    assert all(duplicates.add(f"thing {n} beside thing {n + 1}", "make it night") for n in range(50))
    assert len(drawn) == 1
    assert len({id(sketch.permutations) for sketch in duplicates._kept}) == 1
