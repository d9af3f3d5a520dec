"""Worker threads of the streaming engine: order, and how far they may run ahead."""

from __future__ import annotations

import threading

import pytest

from deltaw.merge import workers


@pytest.mark.parametrize(("bytes_each", "ahead"), [(workers.AHEAD // 3, 3), (2 * workers.AHEAD, 1), (None, 1)])
def test_workers_run_ahead_of_a_large_item_by_a_bounded_number_of_bytes(bytes_each, ahead):
    release, done, lock = threading.Event(), [], threading.Lock()

    def function(item):
        if item == 0:
            assert release.wait(30)
        with lock:
            done.append(item)
        return item

    size = None if bytes_each is None else lambda item: bytes_each
    with workers.ordered(2, function, list(range(8)), size) as results:
        consumer = threading.Thread(target=lambda: done.append(("all", list(results))))
        consumer.start()
        for _ in range(500):  # until as many are through as may be
            with lock:
                if len(done) >= ahead:
                    break
            threading.Event().wait(0.01)
        threading.Event().wait(0.1)  # and no more come
        with lock:
            before = list(done)
        release.set()
        consumer.join(30)
    assert before == list(range(1, ahead + 1))
    assert done[-1] == ("all", list(range(8)))
