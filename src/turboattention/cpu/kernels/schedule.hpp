// Attention of a batch as work items: sequences x KV heads x blocks of rows x parts of the tokens.
//
// The parts depend on lengths and on the number of threads alone, with `split` on the sequence's own length alone; partial
// results are merged in order: the same call gives the same bits, whichever thread does what.
#pragma once
#include <stdlib.h>

#include "attend.hpp"
#include "threads.hpp"

namespace TA_ISA {

constexpr int ITEMS_PER_THREAD = 6; // so that a thread that is held up leaves its share to others

struct Plan {
    const TaAttention *call;
    Item *items;
    int32_t *parts;  // of an item: how many parts its rows have; negative: which one of them, minus 1
    int64_t *places; // of its partial result in `partial`, -1: none
    float *partial;
    int refined;
};

static void run_item(void *context, int i, uint8_t *scratch) {
    const Plan &p = *(const Plan *)context;
    attend_item(*p.call, p.items[i], scratch, p.refined, p.places[i] < 0 ? nullptr : p.partial + p.places[i]);
}

static int run_attention(const TaAttention *call) {
    const TaAttention &a = *call;
    const int ratio = a.heads / a.kv_heads, rows = ratio * a.queries, row_blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    int refined = 0;
    int64_t blocks = 0;
    for (int h = 0; h < a.kv_heads; h++) refined = max2(refined, a.pages[h].format ? a.pages[h].format->refined : 0);
    for (int b = 0; b < a.batch; b++) blocks += a.lengths[b] / BLOCK_TOKENS + 1;
    blocks *= (int64_t)a.kv_heads * row_blocks;
    int64_t per_item = max2((int64_t)1, (blocks + a.threads * ITEMS_PER_THREAD - 1) / (a.threads * ITEMS_PER_THREAD));
    if (a.split > 0) per_item = (a.split + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

    int64_t count = 0, partial = 0;
    Plan plan{call, nullptr, nullptr, nullptr, nullptr, refined};
    for (int pass = 0; pass < 2; pass++) { // how many items there are, then the items
        count = 0, partial = 0;
        for (int b = 0; b < a.batch; b++) {
            const int start = a.starts ? (int)a.starts[b] : 0, paged = a.page_tokens[b];
            const int parts = (int)max2((int64_t)1, (paged / BLOCK_TOKENS + 1) / per_item);
            for (int h = 0; h < a.kv_heads; h++)
                for (int block = 0; block < row_blocks; block++)
                    for (int part = 0; part < parts; part++, count++) {
                        const int first_row = block * ROW_BLOCK, of_block = min2(ROW_BLOCK, rows - first_row);
                        if (pass) {
                            const TaHeadPages &pages = a.pages[h];
                            Item &item = plan.items[count];
                            item = Item{};
                            item.call = call, item.pages = &pages, item.format = pages.format;
                            item.b = b, item.h = h, item.first_row = first_row, item.rows = of_block;
                            item.length = a.lengths[b], item.page_tokens = paged, item.start = start;
                            item.sink_low = start, item.sink_high = max2(start, min2(start + a.sinks, paged));
                            item.with_exact = part == parts - 1;
                            if (pages.format) {
                                const int size = pages.format->page_size, total = paged / size, step = BLOCK_TOKENS / size;
                                const int64_t all = (total + step - 1) / step;
                                item.first_page = (int)(all * part / parts) * step;
                                item.last_page = min2((int)(all * (part + 1) / parts) * step, total);
                                item.rotation_norm = (float)pow((double)pages.format->rotation, -0.5);
                                for (int p = item.first_page; pages.table && p < item.last_page; p++) {
                                    const int32_t place = pages.table[b * pages.table_stride + p];
                                    if (place < 0 || place >= pages.pool_pages) {
                                        free(plan.items);
                                        return TA_BAD_TABLE;
                                    }
                                }
                            }
                            plan.parts[count] = part == 0 ? parts : -part - 1;
                            plan.places[count] = parts == 1 ? -1 : partial;
                        }
                        if (parts > 1) partial += (int64_t)of_block * (a.head_dim + 2);
                    }
        }
        if (pass) break;
        const int64_t aligned = (count * (int64_t)sizeof(Item) + 63) & ~(int64_t)63;
        uint8_t *memory = (uint8_t *)malloc((size_t)(aligned + count * 12 + 64 + partial * 4));
        if (!memory) return TA_NO_MEMORY;
        plan.items = (Item *)memory;
        plan.places = (int64_t *)(memory + aligned);
        plan.parts = (int32_t *)(memory + aligned + count * 8);
        plan.partial = (float *)(memory + ((aligned + count * 12 + 63) & ~(int64_t)63));
    }
    const bool done = ta_parallel(a.threads, (int)count, buffer_bytes(a, refined), run_item, &plan);
    float acc[MAX_HEAD_DIM];
    for (int64_t i = 0; done && i < count; i++)
        if (plan.parts[i] > 1) merge_parts(a, plan.items[i], plan.partial + plan.places[i], plan.parts[i], acc);
    free(plan.items);
    return done ? TA_OK : TA_NO_MEMORY;
}

} // namespace TA_ISA
