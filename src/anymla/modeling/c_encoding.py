"""The C source that makes rows of codes; it follows that of c_kernels.py, which reads them.

One of the modelling files that travel with every converted checkpoint. The rows are those of codec_tables.py; of equal
numbers the first is the outlier, where torch takes any.
"""

from __future__ import annotations

ENCODING = r"""
static int to_half(float x) { /* to the nearest, of two the even one, within its range */
    float size = x < 0 ? -x : x;
    uint32_t bits, least = 126u << 23;
    int sign = __builtin_signbit(x) ? 0x8000 : 0;
    if (size != size) return 0x7e00;
    if (size > 65504) size = 65504;
    if (size < 0x1p-14f) size += 0.5f; /* numbers there are multiples of 2**-24 */
    else least = 112u << 23;
    memcpy(&bits, &size, 4);
    bits -= least;
    return sign | (least == 126u << 23 ? bits : (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

static void put_number(uint8_t *bytes, int number) {
    bytes[0] = (uint8_t)number;
    bytes[1] = (uint8_t)(number >> 8);
}

/* The place of the largest, or of one that is no number; it counts no more */
static i64 take_largest(float *x, i64 count) {
    i64 found = 0;
    for (i64 i = 1; i < count; i++)
        if (x[i] > x[found] || x[i] != x[i]) found = i;
    x[found] = -__builtin_inff();
    return found;
}

/* Outliers at both ends of a token; the rest lies between -1 and 1, as it is scaled */
static void scale_token(const side *s, const float *x, float *rest, uint8_t *row, float *zero, float *scale) {
    i64 low = s->outliers / 2, high = s->outliers - low;
    float most, least;
    memcpy(rest, x, s->width * 4);
    for (i64 o = 0; o < high; o++) put_number(row + 2 * o, (int)take_largest(rest, s->width));
    most = x[take_largest(rest, s->width)];
    for (i64 c = 0; c < s->width; c++) rest[c] = x[c] == x[c] ? -x[c] : -__builtin_inff();
    for (i64 o = high; o < s->outliers; o++) put_number(row + 2 * o, (int)take_largest(rest, s->width));
    least = x[take_largest(rest, s->width)];
    *scale = (most - least) / 2;
    put_number(row + 2 * s->outliers, to_half((most + least) / 2));
    put_number(row + 2 * s->outliers + 2, to_half(*scale < 0x1p-24f ? 0x1p-24f : *scale));
    *zero = half(row[2 * s->outliers] | row[2 * s->outliers + 1] << 8);
    *scale = half(row[2 * s->outliers + 2] | row[2 * s->outliers + 3] << 8);
}

/* The code of a number among the sorted levels, put into its places of a row */
static float put_code(const side *s, i64 c, float x, uint8_t *row) {
    const float *levels = s->levels + s->places[2 * s->width + c];
    int code = 0;
    for (int step = 1 << s->bits[c] >> 1; step; step /= 2) {
        const float *near = levels + code + step;
        if (x > (near[0] + near[-1]) / 2) code += step;
    }
    for (int i = 0; i < 2; i++) {
        int32_t place = s->places[i * s->width + c];
        int part = code >> (place >> 19 & 15) & place >> 23 & 255;
        row[place & 0xffff] |= (uint8_t)(part << (place >> 16 & 7));
    }
    return levels[code];
}

/* The codes of x [count,width] in rows of bytes, which are zeros before; steps [width]: by which errors count */
void anymla_encode(const side *s, const float *x, const float *steps, uint8_t *rows, i64 count, i64 threads) {
#pragma omp parallel num_threads(threads)
    {
        float *error = malloc(s->width * 4);
#pragma omp for schedule(static)
        for (i64 t = 0; t < count; t++) {
            const float *token = x + t * s->width;
            uint8_t *row = rows + t * s->row_bytes;
            float zero = 0, scale = 1;
            if (s->scale == 2) scale_token(s, token, error, row, &zero, &scale);
            for (i64 c = 0; c < s->width; c++) {
                float read = 0;
                if (s->bits[c] == 16) put_number(row + (s->places[c] & 0xffff), to_half(token[c]));
                else if (s->bits[c]) read = put_code(s, c, (token[c] - zero) / scale, row);
                if (s->scale != 2) error[c] = s->bits[c] == 16 ? 0 : __builtin_fabsf(token[c] - read) / steps[c];
            }
            for (i64 o = 0; o < s->outliers; o++) {
                uint8_t *place = row + 2 * o, *value = row + 2 * (s->outliers + o) + (s->scale == 2 ? 4 : 0);
                if (s->scale != 2) put_number(place, (int)take_largest(error, s->width));
                put_number(value, to_half(token[place[0] | place[1] << 8]));
            }
        }
        free(error);
    }
}
"""
