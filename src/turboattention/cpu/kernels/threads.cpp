// The threads are those of the OpenMP library that PyTorch has already loaded, so that its pool and ours are one and
// never compete for cores. Nothing is linked: without such a library threads are started for each call.
#include "threads.hpp"

#include <dlfcn.h>
#include <stdlib.h>

#include <atomic>
#include <thread>

namespace {

struct Scratch {
    void *memory = nullptr;
    int64_t size = 0;
    ~Scratch() { free(memory); }

    uint8_t *get(int64_t bytes) {
        if (bytes > size) {
            free(memory);
            memory = nullptr, size = 0;
            if (posix_memalign(&memory, 64, (size_t)bytes) != 0) memory = nullptr;
            size = memory ? bytes : 0;
        }
        return (uint8_t *)memory;
    }
};

struct Job {
    void (*work)(void *, int, uint8_t *);
    void *context;
    int items;
    int64_t scratch_bytes;
    std::atomic<int> next{0}, failed{0};
};

void take_items(void *data) {
    static thread_local Scratch scratch;
    Job &job = *(Job *)data;
    uint8_t *memory = scratch.get(job.scratch_bytes);
    if (!memory) {
        job.failed = 1;
        return;
    }
    for (int i = job.next++; i < job.items; i = job.next++) job.work(job.context, i, memory);
}

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

Parallel openmp() {
    static const Parallel found = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return found;
}

} // namespace

bool ta_parallel(int threads, int items, int64_t scratch_bytes, void (*work)(void *, int, uint8_t *), void *context) {
    Job job{work, context, items, scratch_bytes};
    if (threads > items) threads = items;
    if (threads <= 1) {
        take_items(&job);
    } else if (Parallel run = openmp()) {
        run(take_items, &job, (unsigned)threads, 0);
    } else {
        constexpr int MOST = 256;
        std::thread others[MOST];
        int started = 0;
        try {
            for (; started < threads - 1 && started < MOST; started++) others[started] = std::thread(take_items, &job);
        } catch (...) { // fewer threads than asked for: the others do the work
        }
        take_items(&job);
        for (int i = 0; i < started; i++) others[i].join();
    }
    // A thread without memory leaves its items to the others; only when none had any are items left.
    return job.next >= items;
}
