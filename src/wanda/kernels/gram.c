/* VDPBF16PS multiplies pairs of tokens: both inputs are laid out as pairs first, b in panels of 64 columns, a in strips
   of 6; a tile of 6 x 64 sums then lives in 24 registers while DEPTH pairs pass by. */
#include "gram.h"

#include <stdlib.h>
#include <string.h>

#include "packed_rows.h"

enum { STRIP = 6, PANEL = 64, DEPTH = 64, STRIPS = 16 };

#ifdef WANDA_BF16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

typedef struct {
    const token_product *p;
    int64_t pairs, strips, panels;
    uint32_t *a; /* [strips, pairs, STRIP] */
    uint32_t *b; /* [panels, pairs, PANEL] */
} gram_job;

/* Columns [first, first + width) of x as pairs of tokens, [pairs, width], zeros beyond the edges. */
static void lay_out(const uint16_t *x, int64_t stride, int64_t tokens, int64_t columns, int64_t first, int64_t width,
                    uint32_t *out) {
    const int64_t here = columns - first < width ? columns - first : width;
    for (int64_t t = 0; t < tokens; t += 2, out += width) {
        const uint16_t *even = x + t * stride + first, *odd = even + stride;
        if (t + 1 < tokens)
            for (int64_t j = 0; j < here; j++) out[j] = even[j] | (uint32_t)odd[j] << 16;
        else
            for (int64_t j = 0; j < here; j++) out[j] = even[j];
        for (int64_t j = here; j < width; j++) out[j] = 0;
    }
}

static void lay_out_both(void *context, int64_t first, int64_t last) {
    const gram_job *job = context;
    const token_product *p = job->p;
    for (int64_t i = first; i < last; i++)
        if (i < job->panels)
            lay_out(p->b, p->b_stride, p->tokens, p->columns, i * PANEL, PANEL, job->b + i * job->pairs * PANEL);
        else
            lay_out(p->a, p->a_stride, p->tokens, p->rows, (i - job->panels) * STRIP, STRIP,
                    job->a + (i - job->panels) * job->pairs * STRIP);
}

TARGET static void tile(const uint32_t *a, const uint32_t *b, int64_t pairs, float *out, int64_t stride, int rows,
                        int64_t columns) {
    __m512 sums[STRIP][4];
    __mmask16 lanes[4];
    for (int v = 0; v < 4; v++) {
        const int64_t left = columns - 16 * v;
        lanes[v] = left >= 16 ? (__mmask16)0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    }
    for (int i = 0; i < STRIP; i++)
        for (int v = 0; v < 4; v++)
            sums[i][v] = i < rows ? _mm512_maskz_loadu_ps(lanes[v], out + i * stride + 16 * v) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, a += STRIP, b += PANEL) {
        __m512bh columns_of_b[4];
        for (int v = 0; v < 4; v++) columns_of_b[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
        for (int i = 0; i < STRIP; i++) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32((int)a[i]);
            for (int v = 0; v < 4; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], row, columns_of_b[v]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 4; v++) _mm512_mask_storeu_ps(out + i * stride + 16 * v, lanes[v], sums[i][v]);
}

/* An item is a panel of columns and STRIPS strips of rows, the tall panels of an upper triangle first. */
static void multiply(void *context, int64_t first, int64_t last) {
    const gram_job *job = context;
    const token_product *p = job->p;
    const int64_t groups = (job->strips + STRIPS - 1) / STRIPS;
    for (int64_t item = first; item < last; item++) {
        const int64_t panel = job->panels - 1 - item / groups, group = item % groups;
        const int64_t column = panel * PANEL;
        const uint32_t *b = job->b + panel * job->pairs * PANEL;
        for (int64_t k = 0; k < job->pairs; k += DEPTH) {
            const int64_t depth = job->pairs - k < DEPTH ? job->pairs - k : DEPTH;
            for (int64_t s = group * STRIPS; s < (group + 1) * STRIPS && s < job->strips; s++) {
                const int64_t row = s * STRIP;
                if (p->upper && row >= column + PANEL) break;
                const int rows = (int)(p->rows - row < STRIP ? p->rows - row : STRIP);
                tile(job->a + (s * job->pairs + k) * STRIP, b + k * PANEL, depth, p->out + row * p->out_stride + column,
                     p->out_stride, rows, p->columns - column);
            }
        }
    }
}

int add_token_product(const token_product *p, int level, int threads, gomp_parallel pool) {
    if (level >= LEVEL_AMX) return add_token_product_amx(p, threads, pool);
    gram_job job = {.p = p,
                    .pairs = (p->tokens + 1) / 2,
                    .strips = (p->rows + STRIP - 1) / STRIP,
                    .panels = (p->columns + PANEL - 1) / PANEL};
    if (p->tokens <= 0 || p->rows <= 0 || p->columns <= 0) return 0;
    job.a = malloc((size_t)(job.strips * job.pairs * STRIP) * sizeof *job.a);
    job.b = malloc((size_t)(job.panels * job.pairs * PANEL) * sizeof *job.b);
    if (job.a && job.b) {
        parallel_for(lay_out_both, &job, job.panels + job.strips, 8, threads, pool);
        parallel_for(multiply, &job, job.panels * ((job.strips + STRIPS - 1) / STRIPS), 1, threads, pool);
    }
    const int failed = job.a && job.b ? 0 : -1;
    free(job.a);
    free(job.b);
    return failed;
}
#else
int add_token_product(const token_product *p, int level, int threads, gomp_parallel pool) {
    (void)p, (void)level, (void)threads, (void)pool;
    return -1;
}
#endif
