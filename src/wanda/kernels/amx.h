/* Tiles of 16 rows of 64 bytes: 0 to 3 hold sums, 4 and 5 the left factors, 6 and 7 the right ones. */
#ifndef WANDA_AMX_H
#define WANDA_AMX_H

#include <stdint.h>

#include "level.h"

#ifdef WANDA_AMX
#define TARGET_AMX                                                                                                  \
    __attribute__((target(                                                                                          \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt,amx-tile,amx-bf16")))

typedef struct {
    _Alignas(64) uint8_t bytes[64];
} tile_shapes;

/* Not the intrinsics: those of GCC 11 and 12 name 8 of the 64 bytes, and what is stored to the others may be dropped. */
TARGET_AMX INLINE void load_shapes(const tile_shapes *shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(*shapes)); }
TARGET_AMX INLINE void store_shapes(tile_shapes *shapes) { __asm__ volatile("sttilecfg %0" : "=m"(*shapes)); }

/* Shapes the thread's tiles and says how they were: torch's libraries may still count on that. */
TARGET_AMX INLINE tile_shapes begin_tiles(void) {
    tile_shapes before, all = {{1}}; /* palette 1; bytes of a row of tile i at 16 + 2 i, its rows at 48 + i */
    for (int i = 0; i < 8; i++) {
        all.bytes[16 + 2 * i] = 64;
        all.bytes[48 + i] = 16;
    }
    store_shapes(&before);
    load_shapes(&all);
    return before;
}

TARGET_AMX INLINE void end_tiles(const tile_shapes *before) { load_shapes(before); }

/* What was written before is in memory for the tile loads behind it, of whose reads the compiler is not told. */
INLINE void tiles_read_memory(void) { __asm__ volatile("" ::: "memory"); }
#endif

#endif
