"""Pages: held by whom, known by what, forgotten when."""

from __future__ import annotations

from andromeda.inference.engine.blocks import PAGE, PagePool, extend_hashes


def hashes_of(ids: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, ids, len(ids) // PAGE)
    return hashes


def filled(pool: PagePool, hashes: list[bytes]) -> list[int]:
    """Pages that hold a text with these hashes, held once."""
    pages = []
    for known in hashes:
        page = pool.take()
        assert page is not None
        pool.register(page, known)
        pages.append(page)
    return pages


def test_every_page_but_the_first_is_given_out_once():
    pool = PagePool(6)
    assert sorted(pool.take() or 0 for _ in range(5)) == [1, 2, 3, 4, 5]
    assert pool.take() is None and (pool.free, pool.used) == (0, 5)


def test_a_hash_is_of_all_tokens_up_to_a_pages_end():
    first, second = list(range(PAGE)), list(range(7, 7 + PAGE))
    whole = hashes_of(first + second + [1, 2, 3])
    assert len(whole) == 2 and whole[0] == hashes_of(first)[0]
    assert whole[1] != hashes_of(second)[0]
    assert whole[1] != hashes_of([*first[:-1], 999, *second])[1]
    again = whole[:1]
    extend_hashes(again, first + second, 2)
    assert again == whole


def test_what_nobody_holds_is_found_until_its_room_is_needed():
    pool, hashes = PagePool(4), hashes_of(list(range(2 * PAGE)))
    pages = filled(pool, hashes)
    pool.release(pages)
    assert pool.find(hashes) == pages and (pool.used, pool.kept, pool.free) == (0, 2, 3)
    assert pool.take() not in pages  # empty ones first
    assert pool.take() == pages[1]  # then the end of a text before its beginning
    assert pool.find(hashes) == pages[:1]
    assert pool.take() == pages[0] and pool.take() is None


def test_the_one_given_back_longest_ago_goes_first():
    pool = PagePool(3)
    old, new = hashes_of([1] * PAGE), hashes_of([2] * PAGE)
    first, second = filled(pool, old), filled(pool, new)
    pool.release(first)
    pool.release(second)
    pool.hold(first)  # used again
    pool.release(first)
    assert pool.take() == second[0]


def test_a_page_is_free_when_its_last_holder_gives_it_back():
    pool, hashes = PagePool(2), hashes_of([5] * PAGE)
    pages = filled(pool, hashes)
    pool.hold(pages)
    pool.release(pages)
    assert pool.take() is None
    pool.release(pages)
    assert pool.take() == pages[0]


def test_of_two_pages_with_the_same_tokens_one_is_known():
    pool, hashes = PagePool(3), hashes_of([5] * PAGE)
    first, second = filled(pool, hashes), filled(pool, hashes)
    assert pool.find(hashes) == first
    pool.release(second)
    assert (pool.kept, pool.free) == (0, 1) and pool.find(hashes) == first


def test_without_the_prefix_cache_nothing_is_known():
    pool, hashes = PagePool(3, prefix_cache=False), hashes_of([5] * PAGE)
    pool.release(filled(pool, hashes))
    assert pool.find(hashes) == [] and pool.kept == 0
