"""How a launch of attention over pages divides its work, worked out on the device from the lengths alone.

A row is a KV head (or a block of its query heads) of a sequence. Its pages are split evenly among as many programs as
its share of all pages of the launch is worth, so that a ragged batch loads all multiprocessors; its exact tokens (sinks
and tail) are programs of their own, because only pages are rotated and need the long loop. Programs of pages come
first: they run long and should all start at once, so shares are rounded down, but not so far that a program has over
9/8 of the average, which a ragged batch would wait for. The short programs of exact tokens fill what is left. The
programs of a row are neighbours, and so are their partial results: program ``i`` writes part ``i``.

With a fixed split (a negative number of programs) a row has one program for so many of its own pages: then its result
does not depend on the other rows of the launch.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_work(
    length, page_tokens, start, window, queries, PAGE: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr
):
    """What one KV head of a sequence reads (scalars or tensors).

    start: tokens of left padding. window: how many tokens, itself included, each of the last ``queries`` tokens sees.
    Returns (exact tokens, pages, first token to be read from pages).
    """
    visible = start
    if WINDOW:
        visible = tl.maximum(start, length - (queries - 1) - window)
    lower = tl.minimum(visible, page_tokens)
    tail = length - tl.maximum(page_tokens, visible)
    exact = tl.maximum(tail, 0)
    if SINKS > 0:
        # Sinks in pages are read exactly instead: the pages begin behind them.
        lower = tl.minimum(tl.maximum(visible, start + SINKS), page_tokens)
        exact += tl.where((page_tokens > start) & (length > visible), SINKS, 0)
    pages = tl.where(lower < page_tokens, page_tokens // PAGE - lower // PAGE, 0)
    return exact, pages, lower


@triton.jit
def row_programs(exact, pages, all_pages, programs, EXACT: tl.constexpr, LEAST: tl.constexpr):
    """Programs of one row: for its pages, and for its exact tokens.

    all_pages: pages of all rows of the launch, which ``programs`` programs are to share; negative: pages of a program.
    EXACT: exact tokens of a program. LEAST: a program with fewer pages is not worth the merge.
    """
    if programs < 0:
        for_pages = (pages - programs - 1) // (0 - programs)
    else:
        all_pages = tl.maximum(all_pages, 1)
        share = tl.maximum(pages * programs // all_pages, (8 * pages * programs + 9 * all_pages - 1) // (9 * all_pages))
        for_pages = tl.where(pages > 0, tl.maximum(tl.minimum(share, pages // LEAST), 1), 0)
    return for_pages, (exact + EXACT - 1) // EXACT


@triton.jit
def span(pages, programs, index):
    """First page and number of pages of program ``index`` of the ``programs`` that share the pages of a row.

    In 64 bits: with a page for each program, four million tokens would make the product 2^32.
    """
    begin = (pages.to(tl.int64) * index // programs).to(tl.int32)
    return begin, (pages.to(tl.int64) * (index + 1) // programs).to(tl.int32) - begin
