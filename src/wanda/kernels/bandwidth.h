#ifndef WANDA_BANDWIDTH_H
#define WANDA_BANDWIDTH_H

#include <stdint.h>

#include "parallel.h"

/* Reads all words once and returns their exclusive or. */
uint64_t read_memory(const uint64_t *words, int64_t count, int threads, gomp_parallel pool);

#endif
