"""The scheduler against a cache of plain lists: whatever happens, each row finds behind its pages what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.inference.engine.blocks import PAGE, PagePool
from andromeda.inference.engine.scheduler import WAITING, Row, Scheduler, Text


@dataclass
class World:
    """A scheduler, and a model that says of each token only where in the cache it was put.

    What comes next of a text is a number that its tokens decide, so a text that was read wrongly goes on otherwise.
    """

    scheduler: Scheduler
    cache: dict[tuple[int, int], int] = field(default_factory=dict)  # page, place -> token
    left: dict[Text, int] = field(default_factory=dict)  # tokens that are still to come
    first_rows: list[Text] = field(default_factory=list)

    def step(self) -> bool:
        rows = self.scheduler.plan()
        self.check(rows)
        for row in rows:
            if row.text not in self.first_rows:
                self.first_rows.append(row.text)
            self.read(row)
        for row in rows:
            self.scheduler.advance(row, self.draw(row) if row.draws else [])
            if row.draws and self.left[row.text] <= 0:
                self.scheduler.end(row.text)
        return bool(rows)

    def check(self, rows: list[Row]) -> None:
        pool = self.scheduler.pool
        held = [page for text in self.scheduler.running for page in text.pages]
        assert pool.used == len(set(held)) and 0 not in held
        assert pool.used + pool.free == pool.num_pages - 1
        assert sum(row.count for row in rows) <= self.scheduler.step_tokens
        assert len({row.text.slot for row in rows}) == len(rows)
        writes = [
            (row.text.pages[i // PAGE], i % PAGE) for row in rows for i in range(row.start, row.start + row.count)
        ]
        assert len(set(writes)) == len(writes)

    def read(self, row: Row) -> None:
        tokens, pages = row.text.ids + row.text.drafts, row.text.pages
        for place in range(row.start, row.start + row.count):
            self.cache[pages[place // PAGE], place % PAGE] = tokens[place]
        for place in range(row.start + row.count):
            assert self.cache[pages[place // PAGE], place % PAGE] == tokens[place]

    def draw(self, row: Row) -> list[int]:
        new: list[int] = []
        for draft in [*row.text.drafts, None]:
            new.append(following(row.text.ids + new))
            if draft != new[-1]:
                break
        self.left[row.text] -= len(new)
        return new


def following(ids: list[int]) -> int:
    """Of the last token, the number of them and the first."""
    return (7 * ids[-1] + 3 * len(ids) + ids[0]) % 5


def half_right(text: Text, most: int) -> list[int]:
    """Drafts that are right up to some place."""
    drafts: list[int] = []
    for i in range(min(most, len(text.ids) % 9)):
        drafts.append((following(text.ids + drafts) + (i == len(text.ids) % 5)) % 5)
    return drafts


def world(pages: int, max_running: int = 4, step_tokens: int = 100, prefix_cache: bool = True, draft=None) -> World:
    return World(Scheduler(PagePool(pages, prefix_cache), max_running, step_tokens, draft))


def start(world: World, ids: list[int], new: int) -> Text:
    text = Text(list(ids), len(ids))
    world.left[text] = new
    world.scheduler.add(text)
    return text


prompts = st.tuples(st.integers(0, 3), st.integers(1, 200)).map(lambda kind: [kind[0]] * kind[1])  # many begin alike


@settings(max_examples=100)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 200), st.integers(0, 6), st.booleans()), min_size=1, max_size=9),
    st.integers(9, 16), st.integers(1, 4), st.sampled_from([8, 30, 100, 500]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_whatever_comes_no_page_is_lost_and_everything_ends(arrivals, pages, running, tokens, prefix_cache, drafts):
    w = world(pages, running, tokens, prefix_cache, half_right if drafts else None)
    expected, texts = {}, []
    for ids, new, steps, aborted in arrivals:
        text = start(w, ids, new)
        for _ in range(steps):
            w.step()
        if aborted and w.left[text] > 0:
            w.scheduler.end(text)
            continue
        texts.append(text)
        expected[text] = [*ids]
    while w.step():
        pass
    assert not w.scheduler.running and not w.scheduler.waiting and w.scheduler.pool.used == 0
    for text, ids in expected.items():
        assert w.left[text] <= 0
        while len(ids) < len(text.ids):
            ids.append(following(ids))
        assert text.ids == ids
    in_order = [text for text in w.left if text in w.first_rows]
    assert in_order == w.first_rows


def test_what_is_written_comes_before_prompts():
    w = world(20, step_tokens=70)
    first, second = start(w, [1] * 60, 9), start(w, [2] * 100, 9)
    assert [(row.text, row.start, row.count) for row in w.scheduler.plan()] == [(first, 0, 60), (second, 0, 10)]
    w.scheduler.end(second)
    w = world(20, step_tokens=70)
    first = start(w, [1] * 60, 9)
    w.step()
    second = start(w, [2] * 100, 9)
    assert [(row.text, row.count) for row in w.scheduler.plan()] == [(first, 1), (second, 69)]


def test_a_short_prompt_does_not_wait_for_long_ones():
    w = world(99, step_tokens=8 * PAGE)
    longest, long = start(w, [1] * (30 * PAGE), 9), start(w, [2] * (20 * PAGE), 9)
    w.step()
    short = start(w, [3] * 10, 9)
    shares = [(longest, 6 * PAGE - 10), (long, 2 * PAGE), (short, 10)]
    assert [(row.text, row.count) for row in w.scheduler.plan()] == shares
    w.scheduler.end(long)
    w.scheduler.end(short)
    assert [row.count for row in w.scheduler.plan()] == [8 * PAGE]


def test_the_last_to_arrive_gives_back_its_pages_and_is_read_again():
    w = world(5, max_running=2)  # 4 pages
    first, second = start(w, [1] * PAGE, 3 * PAGE), start(w, [2] * 10, 2 * PAGE)
    w.step()
    while w.scheduler.preemptions == 0:
        assert w.step()
    assert second.slot == WAITING and second.pages == [] and list(w.scheduler.waiting) == [second]
    assert w.scheduler.running == [first]
    while w.step():
        pass
    assert w.left == {first: 0, second: 0}


def test_equal_prompts_wait_for_the_first_and_share_its_pages():
    w = world(20, step_tokens=3 * PAGE)
    samples = [start(w, [1] * (2 * PAGE + 5), 9) for _ in range(3)]
    w.step()
    assert w.scheduler.running == samples[:1]  # though there is room for others
    w.step()
    assert w.scheduler.running == samples
    assert {tuple(text.pages[:2]) for text in samples} == {tuple(samples[0].pages[:2])}
    assert [text.cached_tokens for text in samples] == [0, 2 * PAGE, 2 * PAGE]
    assert len({text.pages[2] for text in samples}) == 3


def test_a_waiting_text_does_not_wait_for_one_that_is_gone():
    w = world(20, step_tokens=PAGE)
    first, second = (start(w, [1] * (2 * PAGE + 5), 9) for _ in range(2))
    w.step()
    w.scheduler.end(first)
    w.step()
    assert w.scheduler.running == [second] and second.cached_tokens == PAGE


def test_one_token_at_least_is_read():
    w = world(20, step_tokens=2 * PAGE)
    for _ in range(2):
        text = start(w, [1] * (2 * PAGE), 1)
        while w.step():
            pass
    assert text.cached_tokens == PAGE


def test_drafts_leave_room_for_prompts():
    w = world(40, step_tokens=20, draft=lambda text, most: [1] * most)
    start(w, [1] * 5, 100)
    w.step()
    start(w, [2] * 300, 9)
    rows = w.scheduler.plan()
    assert [row.count for row in rows] == [1 + 9, 10]


def test_drafts_preempt_nobody():
    w = world(4, max_running=2, step_tokens=200, draft=lambda text, most: [1] * min(most, 8))
    first, second = start(w, [1] * (PAGE - 2), 20), start(w, [2] * (PAGE - 2), 20)
    w.step()
    assert [(row.text, row.count) for row in w.scheduler.plan()] == [(first, 9), (second, 2)]
    assert w.scheduler.preemptions == 0 and len(first.pages) == 2 and len(second.pages) == 1
