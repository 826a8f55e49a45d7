#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* syscall */
#endif
#include "level.h"

#include <stdatomic.h>

#ifdef WANDA_X86
#include <cpuid.h>

/* __builtin_cpu_supports does not compile with this name before GCC 11 and clang 18; that the system saves the registers
   follows from AVX2, which it is asked with. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

#ifdef WANDA_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* A process may use tiles once Linux has let it (5.16 and later; it reserves their 8 KiB then). */
static int has_tiles(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

static int find_best_level(void) {
#ifdef WANDA_X86
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
                     __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi") &&
                     __builtin_cpu_supports("bmi2");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef WANDA_BF16
    if (avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16")) {
#ifdef WANDA_AMX
        if (has_tiles()) return LEVEL_AMX;
#endif
        return LEVEL_AVX512_BF16;
    }
#endif
    if (avx512) return LEVEL_AVX512;
    if (avx2) return LEVEL_AVX2;
#endif
    return LEVEL_PORTABLE;
}

int best_level(void) {
    static _Atomic int known = -1; /* the answer costs a system call */
    int level = atomic_load_explicit(&known, memory_order_relaxed);
    if (level < 0) {
        level = find_best_level();
        atomic_store_explicit(&known, level, memory_order_relaxed);
    }
    return level;
}
