"""The C source that reads rows of codes, and the products with what was read; c_attention.py has attention of them.

One of the modelling files that travel with every converted checkpoint: only Python files do, so the source is text.

A tile of tokens at a time is read from bytes into numbers x[coefficient][token], which stay in a CPU's caches. All
tokens of a coefficient share its levels, so that one instruction looks up eight of them. Products are then sums over
coefficients for scores, and over tokens for the context.
"""

from __future__ import annotations

READING = r"""
#define STEP (TILE + 16) /* numbers from a row of numbers to the next: powers of two would share few lines of a cache */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint64_t words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef float numbers[STEP];
typedef uint8_t bytes[TILE];
#define INLINE static inline __attribute__((always_inline))

typedef struct {             /* rows of bytes, and what explains them: code_layout.py */
    const uint8_t *rows;     /* [B,S,row_bytes] */
    const int32_t *places;   /* [3,width] */
    const int32_t *bits;     /* [width] */
    const float *levels;     /* eight more may be read */
    const i64 *exact_row, *exact_column; /* [exact]: tokens whose numbers are these */
    const float *exact_numbers;          /* [exact,width] */
    const float *run;        /* [B,run_length,width]: those of the columns from run_first on, in every sequence */
    const int32_t *used, *every; /* [useds], [width]: coefficients that coded tokens have, and all */
    i64 row_step, token_step, byte_step, width, row_bytes, outliers, scale, block, exact, run_first, run_length, useds;
} side;

typedef struct {             /* coefficients of a tile that are not zero, rising */
    const int32_t *c;
    i64 count;
} list;

typedef struct {             /* what meets the keys, and how they turn */
    const int32_t *pair;     /* [3,pairs]: real part, imaginary part, frequency */
    const float *wave;       /* [2,frequencies,TILE]: cos and sin of a tile's columns */
    const float *starts;     /* [tiles,2,frequencies]: of its first column */
    const float *decoder, *constant; /* [numbers,block], [numbers]: keys are rebuilt; or 0 */
    const float *query;      /* [B,groups,rows,numbers / groups], turned by their own positions */
    const float *of_mean;    /* [B,groups,rows,2 frequencies], too; or 0 */
    const int32_t *every;    /* [numbers]: 0, 1, .. */
    i64 pairs, frequencies, groups, rows, numbers, block;
} keys;

static float half(int h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits = sign | ((rest << 13) + (112 << 23));
    float found;
    if (rest < 0x400) return (sign ? -0x1p-24f : 0x1p-24f) * rest;
    memcpy(&found, &bits, 4);
    return found;
}

static void halves(const bytes *columns, float *x) {
    for (int t = 0; t < TILE; t++) x[t] = half(columns[0][t] | columns[1][t] << 8);
}

/* columns[byte][token]: as they lie, or of bytes that lie by tokens */
static void gather(const side *s, const uint8_t *rows, i64 count, bytes *columns) {
    if (count < TILE) memset(columns, 0, s->row_bytes * sizeof *columns);
    for (i64 i = 0; i < s->row_bytes; i++, rows += s->byte_step) {
        if (s->token_step == 1 && count == TILE) memcpy(columns[i], rows, TILE);
        else
            for (i64 t = 0; t < count; t++) columns[i][t] = rows[t * s->token_step];
    }
}

/* The part of codes that lies in one byte: the mask cuts what was shifted into the next byte */
INLINE void piece(int32_t place, const bytes *columns, uint8_t *codes, int more) {
    int below = place >> 16 & 7, left = place >> 19 & 15;
    const uint8_t *in = columns[place & 0xffff];
    words mask = (words){0} + (uint64_t)(place >> 23 & 255) * 0x0101010101010101;
    for (int t = 0; t < TILE; t += sizeof(words)) {
        words found = (*(words *)(in + t) >> below & mask) << left;
        if (more) found |= *(words *)(codes + t);
        *(words *)(codes + t) = found;
    }
}

#ifdef __AVX2__
INLINE __m256 one_of_8(const float *levels, __m256i code) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), code);
}

INLINE __m256 one_of_16(const float *levels, __m256i code) {
    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    return _mm256_blendv_ps(one_of_8(levels, code), one_of_8(levels + 8, code), upper);
}

INLINE __m256 one_of_32(const float *levels, __m256i code) {
    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 27));
    return _mm256_blendv_ps(one_of_16(levels, code), one_of_16(levels + 16, code), upper);
}
#define EACH(level)                                                                                  \
    for (int t = 0; t < TILE; t += 8) {                                                              \
        __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + t)));          \
        _mm256_storeu_ps(x + t, level);                                                              \
    }
#endif

static void look_up(const uint8_t *codes, const float *levels, int bits, float *x) {
#ifdef __AVX2__
    if (bits <= 3) EACH(one_of_8(levels, code))
    else if (bits == 4) EACH(one_of_16(levels, code))
    else if (bits == 5) EACH(one_of_32(levels, code))
    if (bits <= 5) return;
#endif
    for (int t = 0; t < TILE; t++) x[t] = levels[codes[t]]; /* to gather them is not faster */
}

/* Outliers and exact tokens take the place of what was read; whether there are some of the latter */
static int put(const side *s, i64 row, i64 start, i64 count, const bytes *columns, numbers *x) {
    int found = 0;
    for (i64 o = 0; o < s->outliers; o++) {
        const bytes *value = columns + 2 * (s->outliers + o) + (s->scale == 2 ? 4 : 0), *place = columns + 2 * o;
        for (i64 t = 0; t < count; t++) {
            i64 c = place[0][t] | place[1][t] << 8;
            if (c < s->width) x[c][t] = half(value[0][t] | value[1][t] << 8); /* bytes that are no codes do no harm */
        }
    }
    for (i64 e = 0; e < s->exact; e++) {
        i64 t = s->exact_column[e] - start;
        if (s->exact_row[e] != row || t < 0 || t >= count) continue;
        for (i64 c = 0; c < s->width; c++) x[c][t] = s->exact_numbers[e * s->width + c];
        found = 1;
    }
    for (i64 t = start < s->run_first ? s->run_first - start : 0; t < count; t++) {
        i64 place = start + t - s->run_first;
        if (place >= s->run_length) break;
        for (i64 c = 0; c < s->width; c++) x[c][t] = s->run[(row * s->run_length + place) * s->width + c];
        found = 1;
    }
    return found;
}

/* x[coefficient][token] of `count` tokens of a sequence from column `start` on; those that may not be zero */
static list read_tile(const side *s, i64 row, i64 start, i64 count, bytes *columns, numbers *x) {
    const int32_t *first = s->places, *second = first + s->width, *level = second + s->width;
    uint8_t codes[TILE];
    float zero[TILE] = {0}, scale[TILE];
    gather(s, s->rows + row * s->row_step + start * s->token_step, count, columns);
    if (s->scale == 2) {
        halves(columns + 2 * s->outliers, zero);
        halves(columns + 2 * s->outliers + 2, scale);
    }
    for (i64 c = 0; c < s->width; c++) {
        if (s->bits[c] == 0) {
            for (int t = 0; t < TILE; t += LANES) *(vector *)(x[c] + t) = (vector){0};
        } else if (s->bits[c] == 16) {
            halves(columns + (first[c] & 0xffff), x[c]);
        } else {
            piece(first[c], columns, codes, 0);
            if (second[c]) piece(second[c], columns, codes, 1);
            look_up(codes, s->levels + level[c], s->bits[c], x[c]);
            if (s->scale == 1 && c % s->block == 0) halves(columns + c / s->block * 2, scale);
            if (s->scale)
                for (int t = 0; t < TILE; t++) x[c][t] = x[c][t] * scale[t] + zero[t];
        }
    }
    return put(s, row, start, count, columns, x) ? (list){s->every, s->width} : (list){s->used, s->useds};
}

/* Those from `first` to before `stop` */
static list part(list all, i64 first, i64 stop) {
    while (all.count && all.c[0] < first) all.c++, all.count--;
    while (all.count && all.c[all.count - 1] >= stop) all.count--;
    return all;
}

/* out[r][t] = constant[r] or out[r][t], + sum over c of q[r][c] x[c][t]: `rows` of six at most, two vectors of t */
INLINE void product(
    int rows, const float *q, i64 step, numbers *x, list some, const float *constant, int more, numbers *out, int t) {
    vector sum[6][2];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 2; k++) {
            if (more) sum[r][k] = *(vector *)(out[r] + t + k * LANES);
            else sum[r][k] = (vector){0} + (constant ? constant[r] : 0);
        }
    for (i64 i = 0; i < some.count; i++)
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < 2; k++)
                sum[r][k] += q[r * step + some.c[i]] * *(vector *)(x[some.c[i]] + t + k * LANES);
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 2; k++) *(vector *)(out[r] + t + k * LANES) = sum[r][k];
}

static void products(
    const float *q, i64 rows, i64 step, numbers *x, list some, const float *constant, int more, numbers *out) {
    for (int t = 0; t < TILE; t += 2 * LANES)
        for (i64 r = 0, parts = (rows + 5) / 6, high; r < rows; r += high, parts--) {
            const float *own = q + r * step, *c = constant ? constant + r : 0;
            switch (high = (rows - r + parts - 1) / parts) { /* equal parts: few rows leave a CPU waiting */
            case 1: product(1, own, step, x, some, c, more, out + r, t); break;
            case 2: product(2, own, step, x, some, c, more, out + r, t); break;
            case 3: product(3, own, step, x, some, c, more, out + r, t); break;
            case 4: product(4, own, step, x, some, c, more, out + r, t); break;
            case 5: product(5, own, step, x, some, c, more, out + r, t); break;
            case 6: product(6, own, step, x, some, c, more, out + r, t);
            }
        }
}

static void turn_keys(const keys *k, numbers *x) {
    for (i64 p = 0; p < k->pairs; p++) {
        float *real = x[k->pair[p]], *imag = x[k->pair[k->pairs + p]];
        const float *cos = k->wave + (i64)k->pair[2 * k->pairs + p] * TILE, *sin = cos + k->frequencies * TILE;
        for (int t = 0; t < TILE; t++) {
            float was = real[t];
            real[t] = was * cos[t] - imag[t] * sin[t];
            imag[t] = imag[t] * cos[t] + was * sin[t];
        }
    }
}

INLINE void turn_back(float *real, float *imag, float cos, float sin) {
    float was = *real;
    *real = was * cos + *imag * sin;
    *imag = *imag * cos - was * sin;
}

/* Queries of a sequence, turned from the first column of a tile on */
static void turn_queries(const keys *k, i64 row, i64 tile, float *query, float *of_mean) {
    i64 width = k->numbers / k->groups, all = k->groups * k->rows, count = k->frequencies;
    const float *cos = k->starts + tile * 2 * count, *sin = cos + count;
    memcpy(query, k->query + row * all * width, all * width * 4);
    for (i64 p = 0; p < k->pairs; p++) {
        i64 real = k->pair[p], imag = k->pair[k->pairs + p], f = k->pair[2 * k->pairs + p];
        float *own = query + real / width * k->rows * width;
        for (i64 r = 0; r < k->rows; r++, own += width)
            turn_back(own + real % width, own + imag % width, cos[f], sin[f]);
    }
    if (!k->of_mean) return;
    memcpy(of_mean, k->of_mean + row * all * 2 * count, all * 2 * count * 4);
    for (i64 r = 0; r < all; r++, of_mean += 2 * count)
        for (i64 f = 0; f < count; f++) turn_back(of_mean + f, of_mean + count + f, cos[f], sin[f]);
}

/* out[r][c] += w[r][t] x[c][t] by lanes: `rows` of three at most, `few` of four c at most */
INLINE void dots(int rows, int few, numbers *w, numbers *x, const int32_t *c, vector *out, i64 width) {
    vector sum[3][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < few; k++) sum[r][k] = out[r * width + c[k]];
    for (int t = 0; t < TILE; t += LANES)
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < few; k++) sum[r][k] += *(vector *)(w[r] + t) * *(vector *)(x[c[k]] + t);
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < few; k++) out[r * width + c[k]] = sum[r][k];
}

static void sums(numbers *w, i64 rows, numbers *x, list some, vector *out, i64 width) {
    for (i64 r = 0; r < rows; r += 3)
        for (i64 i = 0; i < some.count; i += 4) {
            int high = rows - r < 3 ? rows - r : 3, few = some.count - i < 4 ? some.count - i : 4;
            vector *to = out + r * width;
            if (high == 3 && few == 4) dots(3, 4, w + r, x, some.c + i, to, width);
            else if (high == 1 && few == 4) dots(1, 4, w + r, x, some.c + i, to, width);
            else dots(high, few, w + r, x, some.c + i, to, width);
        }
}

/* The lanes of each of `count` sums, which begin anew */
static void add_up(vector *sum, i64 count, float *out) {
    for (i64 i = 0; i < count; i++, *sum++ = (vector){0})
        for (int l = 0; l < LANES; l++) out[i] += (*sum)[l];
}
"""
