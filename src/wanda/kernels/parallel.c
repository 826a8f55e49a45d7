#include "parallel.h"

#include <pthread.h>
#include <stdatomic.h>

enum { MOST_THREADS = 256 };

typedef struct {
    chunk_function work;
    void *context;
    int64_t items, chunk;
    _Atomic int64_t next;
} team;

static void take_chunks(void *argument) {
    team *t = argument;
    for (;;) {
        int64_t first = atomic_fetch_add_explicit(&t->next, t->chunk, memory_order_relaxed);
        if (first >= t->items) return;
        int64_t last = first + t->chunk < t->items ? first + t->chunk : t->items;
        t->work(t->context, first, last);
    }
}

static void *thread_main(void *argument) {
    take_chunks(argument);
    return 0;
}

void parallel_for(chunk_function work, void *context, int64_t items, int64_t chunk, int threads, gomp_parallel pool) {
    if (items <= 0) return;
    int64_t chunks = (items + chunk - 1) / chunk;
    if (threads > chunks) threads = (int)chunks;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads <= 1) {
        work(context, 0, items);
        return;
    }
    team t = {.work = work, .context = context, .items = items, .chunk = chunk};
    atomic_init(&t.next, 0);
    if (pool) {
        pool(take_chunks, &t, (unsigned)threads, 0);
        return;
    }
    pthread_t made[MOST_THREADS];
    int count = 0;
    while (count < threads - 1 && pthread_create(&made[count], 0, thread_main, &t) == 0) count++;
    take_chunks(&t);
    while (count > 0) pthread_join(made[--count], 0);
}
