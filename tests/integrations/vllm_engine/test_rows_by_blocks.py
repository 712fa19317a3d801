"""Rows of the open-page pool found by blocks, as vLLM's older runner needs; needs no vLLM."""

import pytest

from turboattention.errors import UnsupportedError
from turboattention.integrations.vllm.rows import RowMap


def test_a_sequence_keeps_its_row_while_its_page_is_open():
    rows = RowMap(4)
    (first,) = rows.assign([0], [10], [[7]])
    (second,) = rows.assign([10], [11], [[7]])
    assert second.row == first.row == second.source
    assert first.source is None


def test_a_full_page_gives_a_new_row_and_the_statistics_of_the_old():
    rows = RowMap(4)
    (first,) = rows.assign([0], [64], [[7]])
    (second,) = rows.assign([64], [65], [[7, 8]])
    assert second.row != first.row
    assert second.source == first.row


def test_two_sequences_after_the_same_prefix_have_rows_of_their_own():
    rows = RowMap(4)
    rows.assign([0], [64], [[7]])
    own, hit = rows.assign([64, 64], [65, 70], [[7, 8], [7, 9]])
    assert own.row != hit.row


def test_rows_of_a_batch_differ():
    rows = RowMap(6)
    assert len({entry.row for entry in rows.assign([0] * 5, [3] * 5, [[b] for b in range(5)])}) == 5
    later = rows.assign([3] * 5, [4] * 5, [[b] for b in range(5)])
    assert len({entry.row for entry in later}) == 5


def test_a_block_that_is_used_again_begins_anew():
    rows = RowMap(3)
    rows.assign([0], [5], [[7]])
    (other,) = rows.assign([0], [9], [[7]])
    (later,) = rows.assign([9], [10], [[7]])
    assert later.row == other.row


def test_a_lost_open_page_is_an_error():
    rows = RowMap(2)
    rows.assign([0], [5], [[1]])
    for block in (2, 3):
        rows.assign([0], [5], [[block]])
    with pytest.raises(UnsupportedError, match="max_num_seqs"):
        rows.assign([5], [6], [[1]])


def test_after_drafts_are_taken_back_the_row_is_found_by_the_earlier_block():
    rows = RowMap(4, drafts=5)
    (first,) = rows.assign([0], [60], [[7, 8]])
    (drafted,) = rows.assign([60], [66], [[7, 8]])
    (back,) = rows.assign([62], [63], [[7, 8]])
    assert first.row == drafted.row == back.row
    (forward,) = rows.assign([63], [69], [[7, 8]])
    (on,) = rows.assign([66], [67], [[7, 8]])
    assert on.row == forward.row == first.row


def test_a_chunk_does_not_lend_its_statistics_to_hits_of_its_earlier_blocks():
    rows = RowMap(4, drafts=5)
    rows.assign([0], [300], [[1, 2, 3, 4, 5]])
    (hit,) = rows.assign([64], [70], [[1, 9]])
    assert hit.source is None
