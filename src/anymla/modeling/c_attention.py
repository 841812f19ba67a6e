"""The C source of attention over rows of codes; it follows that of c_kernels.py, which reads them.

One of the modelling files that travel with every converted checkpoint. Each tile of tokens is read once: its scores
are weighed right away, and what was summed before shrinks where a larger score comes (online softmax, as in
FlashAttention, arXiv 2205.14135). Every thread has its part of the tokens; the parts are added up at the end.
"""

from __future__ import annotations

ATTENTION = r"""
#include <math.h>
#define LOWEST -3e38f /* finite, for a tile may have no visible token */

typedef struct {             /* what becomes of scores, and what they weigh; all: groups x rows of queries */
    const side *values;      /* 0: the values are what the first keys were read as */
    const float *constant;   /* [B,all], added to all scores of a query; or 0 */
    const float *mask;       /* [B,heads,new,S], added; or 0 */
    const float *sinks;      /* [all]: logits of keys without a value; or 0 */
    i64 mask_batch, mask_head, mask_query, new;
    i64 groups, rows;        /* of values */
    double softcap;          /* or 0 */
} softmax;

typedef struct {             /* what a thread needs to read a side */
    bytes *columns;
    numbers *x, *held, *wave;
    float *query, *of_mean;
} room;

static room room_for(const side *s, const keys *k) {
    i64 numbers_of_keys = k ? k->numbers : 0, waves = k ? 2 * k->frequencies : 0;
    i64 all = k ? k->groups * k->rows : 0, width = k ? k->numbers / k->groups : 0;
    room r;
    r.columns = malloc((s->row_bytes + 1) * sizeof(bytes));
    r.x = malloc((s->width + numbers_of_keys + waves) * sizeof(numbers));
    r.held = k && k->decoder ? r.x + s->width : r.x;
    r.wave = r.x + s->width + numbers_of_keys;
    r.query = malloc(all * (width + waves) * 4 + 4);
    r.of_mean = r.query + all * width;
    for (i64 i = 0; i < waves; i++) memcpy(r.wave[i], k->wave + i * TILE, TILE * 4);
    return r;
}

static void free_room(room r) { free(r.columns), free(r.x), free(r.query); }

/* out[row][t] = the scores of a tile, or `more` of them; what was read of the tile */
static list score(const side *s, const keys *k, i64 row, i64 tile, i64 count, room *in, int more, numbers *out) {
    i64 width = k->numbers / k->groups, all = k->groups * k->rows, waves = 2 * k->frequencies;
    i64 blocks = k->decoder ? s->width / k->block : 0, n = k->numbers / (blocks ? blocks : 1);
    list read = read_tile(s, row, tile * TILE, count, in->columns, in->x), some = read;
    for (i64 b = 0; b < blocks; b++) {
        const float *decoder = k->decoder + b * (n - 1) * k->block; /* c counts from the first block on */
        list own = part(some, b * k->block, (b + 1) * k->block);
        products(decoder, n, k->block, in->x, own, k->constant + b * n, 0, in->held + b * n);
    }
    if (k->decoder) some = (list){k->every, k->numbers};
    turn_keys(k, in->held);
    turn_queries(k, row, tile, in->query, in->of_mean);
    for (i64 g = 0; g < k->groups; g++) {
        i64 first = g * k->rows;
        list own = part(some, g * width, (g + 1) * width);
        products(in->query + first * width - g * width, k->rows, width, in->held, own, 0, more, out + first);
    }
    if (k->of_mean) products(in->of_mean, all, waves, in->wave, (list){k->every, waves}, 0, 1, out);
    return read;
}

typedef int32_t integers __attribute__((vector_size(4 * LANES)));

INLINE vector choose(integers is, vector yes, vector no) {
    return (vector)(((integers)yes & is) | ((integers)no & ~is));
}

/* e^x by the polynomial of Cephes' expf, within 2e-7 of it; 0 below e^-87, and e^88 above that */
INLINE vector exponential(vector x) {
    vector lowest = (vector){0} - 87, highest = (vector){0} + 88, p;
    vector bounded = choose(x < lowest, lowest, choose(x > highest, highest, x));
    vector n = bounded * 1.44269504f + 0x1.8p+23f - 0x1.8p+23f; /* rounded */
    vector rest = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    p = 4.1665795894e-2f + rest * (8.3334519073e-3f + rest * (1.3981999507e-3f + rest * 1.9875691500e-4f));
    p = 1 + rest + rest * rest * (5.0000001201e-1f + rest * (1.6666665459e-1f + rest * p));
    p *= (vector)((__builtin_convertvector(n, integers) + 127) << 23);
    return choose(x < lowest, (vector){0}, p);
}

static float exponential_of(float x) { return exponential((vector){x})[0]; }

static float largest(const float *s) {
    vector high = *(vector *)s;
    float found;
    for (int t = LANES; t < TILE; t += LANES) high = choose(*(vector *)(s + t) > high, *(vector *)(s + t), high);
    found = high[0];
    for (int l = 1; l < LANES; l++) found = high[l] > found ? high[l] : found;
    return found;
}

/* s[t] = the weight of each score, as large as `top` makes it; their sum */
static float weights(float *s, float top) {
    vector sum = {0};
    float found = 0;
    for (int t = 0; t < TILE; t += LANES) sum += *(vector *)(s + t) = exponential(*(vector *)(s + t) - top);
    for (int l = 0; l < LANES; l++) found += sum[l];
    return found;
}

/* Weights in the place of the scores of a tile; what was summed before shrinks where a larger score comes */
static void online_softmax(
    const softmax *w, i64 row, i64 start, i64 count, numbers *out, float *top, float *total, vector *sum, i64 width) {
    for (i64 r = 0, all = w->groups * w->rows; r < all; r++) {
        float *s = out[r], high, less, constant = w->constant ? w->constant[row * all + r] : 0, cap = w->softcap;
        if (w->constant)
            for (int t = 0; t < TILE; t++) s[t] += constant;
        if (cap)
            for (int t = 0; t < TILE; t += LANES) { /* tanh */
                vector *part = (vector *)(s + t);
                *part = cap - 2 * cap / (exponential(2 / cap * *part) + 1);
            }
        if (w->mask) {
            const float *mask = w->mask + row * w->mask_batch + r / w->new * w->mask_head;
            mask += r % w->new * w->mask_query + start;
            for (i64 t = 0; t < count; t++) s[t] += mask[t];
        }
        for (i64 t = count; t < TILE; t++) s[t] = -INFINITY;
        if ((high = largest(s)) > top[r]) {
            less = exponential_of(top[r] - high);
            for (i64 c = 0; c < width; c++) sum[r * width + c] *= less;
            total[r] *= less, top[r] = high;
        }
        total[r] += weights(s, top[r]);
    }
}

/* context [B,all,width], and the share [B,all] that sinks leave, of the parts [threads] of all tokens */
static void add_parts(const softmax *w, i64 width, const float *parts, const float *tops, const float *totals,
                      i64 batch, i64 threads, float *context, float *share) {
    i64 all = w->groups * w->rows, count = batch * all;
    for (i64 i = 0; i < count; i++) {
        float top = w->sinks ? w->sinks[i % all] : -INFINITY, total = 0, of_sink;
        for (i64 p = 0; p < threads; p++) top = tops[p * count + i] > top ? tops[p * count + i] : top;
        memset(context + i * width, 0, width * 4);
        for (i64 p = 0; p < threads; p++) {
            float part = exponential_of(tops[p * count + i] - top);
            total += part * totals[p * count + i];
            for (i64 c = 0; c < width; c++) context[i * width + c] += part * parts[(p * count + i) * width + c];
        }
        of_sink = w->sinks ? exponential_of(w->sinks[i % all] - top) : 0;
        share[i] = total / (total + of_sink);
        for (i64 c = 0; c < width; c++) context[i * width + c] /= total + of_sink;
    }
}

/* Attention to all tokens. Scores are sums over `count` sides: a latent and its rope key are two */
void anymla_attend(const side *const *sides, const keys *const *of_keys, i64 count, const softmax *w,
                   float *context, float *share, i64 batch, i64 length, i64 threads) {
    const side *values = w->values ? w->values : sides[0];
    i64 tiles = (length + TILE - 1) / TILE, width = values->width / w->groups, all = w->groups * w->rows;
    i64 work = batch * tiles, size = batch * all;
    float *parts = calloc(threads * size * (width + 2), 4), *tops = parts + threads * size * width;
    float *totals = tops + threads * size;
    for (i64 i = 0; i < threads * size; i++) tops[i] = LOWEST;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (i64 thread = 0; thread < threads; thread++) {
        room *rooms = malloc((count + 1) * sizeof(room));
        numbers *out = malloc(all * sizeof(numbers));
        vector *sum = calloc(all * width, sizeof(vector));
        for (i64 i = 0; i < count; i++) rooms[i] = room_for(sides[i], of_keys[i]);
        if (w->values) rooms[count] = room_for(values, 0);
        i64 stop = (thread + 1) * work / threads;
        for (i64 at = thread * work / threads; at < stop; at++) {
            i64 row = at / tiles, tile = at % tiles, start = tile * TILE, own = (thread * batch + row) * all;
            i64 tokens = length - start < TILE ? length - start : TILE;
            list some = score(sides[0], of_keys[0], row, tile, tokens, rooms, 0, out);
            for (i64 i = 1; i < count; i++) score(sides[i], of_keys[i], row, tile, tokens, rooms + i, 1, out);
            online_softmax(w, row, start, tokens, out, tops + own, totals + own, sum, width);
            if (w->values) some = read_tile(values, row, start, tokens, rooms[count].columns, rooms[count].x);
            for (i64 g = 0; g < w->groups; g++) {
                i64 first = g * w->rows;
                sums(out + first, w->rows, rooms[w->values ? count : 0].x, part(some, g * width, (g + 1) * width),
                     sum + first * width - g * width, width);
            }
            if (at + 1 == stop || tile == tiles - 1) add_up(sum, all * width, parts + own * width);
        }
        for (i64 i = 0; i < count + (w->values != 0); i++) free_room(rooms[i]);
        free(rooms), free(out), free(sum);
    }
    add_parts(w, width, parts, tops, totals, batch, threads, context, share);
    free(parts);
}
"""
