/* Work split into chunks that idle threads take one after another, on the OpenMP pool that torch already runs. */
#ifndef WANDA_PARALLEL_H
#define WANDA_PARALLEL_H

#include <stdint.h>

/* GOMP_parallel of libgomp (or of LLVM's libomp, which exports it too). */
typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef void (*chunk_function)(void *context, int64_t first, int64_t last);

/* Calls work(context, first, last) until [0, items) is covered in pieces of `chunk`, by `threads` threads at most.
   With pool == NULL the threads are made for this call; the calling thread always takes part. */
void parallel_for(chunk_function work, void *context, int64_t items, int64_t chunk, int threads, gomp_parallel pool);

#endif
