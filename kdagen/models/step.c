/* What a token's way through a model consists of: operations on rows of floats, a row a sequence.

   A program is a list of steps, each the address of a function below and its words; kdagen.models.step writes it. Sums
   are of LANES lanes in a fixed order, and threads share outputs, never sums: bits depend neither on how many there
   are nor on the other rows. After a buffer comes its step: floats from one row to the next. Buffers are float32;
   weights and what caches keep beside states may be bfloat16, and then their addresses are one too high. */

typedef union { int64_t n; double f; float *x; int64_t *cell; void *p; } Word;
typedef struct { int64_t rows, threads; } Run;
typedef int64_t (*Function)(const Word *w, const Run *run); /* 0 if all is well */
enum { WORDS = 18, FEW = 4, BLOCK = 64 };
#define MUCH (1 << 21) /* multiplications, 100 us of them: from which on another thread is worth waking */
#define PRAGMA(text) _Pragma(#text)
#define SHARED(work) PRAGMA(omp parallel for num_threads(run->threads) if (run->threads > 1 && (work) >= MUCH))

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* n weights from one on, as floats, if need be in `room` */
static const float *floats(const float *weights, int64_t from, int64_t n, float *room) {
    if (!((uintptr_t)weights & 1)) return weights + from;
    const bf16 *at = (const bf16 *)((uintptr_t)weights - 1) + from;
    EACH(i, n) room[i] = get_bf16(at[i]);
    return room;
}

/* The inverse, to what a cache keeps. */
static void keep(float *kept, int64_t from, int64_t n, const float *x) {
    bf16 *at = (bf16 *)((uintptr_t)kept - 1) + from;
    if (!((uintptr_t)kept & 1)) memcpy(kept + from, x, n * sizeof(float));
    else EACH(i, n) at[i] = put_bf16(x[i]);
}

/* -- products */

/* y[j] = w[j] . x, of FEW at a time, as fast as memory brings them */
APART void dots(const float *const *w, const float *restrict x, int64_t n, float *restrict y) {
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    float a[LANES] = {0}, b[LANES] = {0}, c[LANES] = {0}, d[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        EACH(l, LANES) {
            a[l] = FMA(w0[i + l], x[i + l], a[l]), b[l] = FMA(w1[i + l], x[i + l], b[l]);
            c[l] = FMA(w2[i + l], x[i + l], c[l]), d[l] = FMA(w3[i + l], x[i + l], d[l]);
        }
    for (int l = 0; i < n; i++, l++) {
        a[l] = FMA(w0[i], x[i], a[l]), b[l] = FMA(w1[i], x[i], b[l]);
        c[l] = FMA(w2[i], x[i], c[l]), d[l] = FMA(w3[i], x[i], d[l]);
    }
    EACH(l, 8) a[l] += a[l + 8], b[l] += b[l + 8], c[l] += c[l + 8], d[l] += d[l + 8];
    EACH(l, 4) a[l] += a[l + 4], b[l] += b[l + 4], c[l] += c[l + 4], d[l] += d[l + 4];
    y[0] = (a[0] + a[2]) + (a[1] + a[3]), y[1] = (b[0] + b[2]) + (b[1] + b[3]);
    y[2] = (c[0] + c[2]) + (c[1] + c[3]), y[3] = (d[0] + d[2]) + (d[1] + d[3]);
}

/* y += x[0] m[0] + x[1] m[1] + .., a row of m being n floats of those from one row to the next */
APART void sum_of_rows(const float *x, const float *m, int64_t count, int64_t step, int64_t n, float *restrict y) {
    int64_t i = 0;
    for (; i + FEW <= count; i += FEW) {
        const float *m0 = m + i * step, *m1 = m0 + step, *m2 = m1 + step, *m3 = m2 + step;
        const float x0 = x[i], x1 = x[i + 1], x2 = x[i + 2], x3 = x[i + 3];
        EACH(j, n) y[j] = FMA(x3, m3[j], FMA(x2, m2[j], FMA(x1, m1[j], FMA(x0, m0[j], y[j]))));
    }
    for (; i < count; i++)
        EACH(j, n) y[j] = FMA(x[i], m[i * step + j], y[j]);
}

/* FEW rows of W [out, in] from a row on; beyond the last, the last */
static void some(const float *W, int64_t row, int64_t out, int64_t in, const float **w, float *room) {
    for (int j = 0; j < FEW; j++) w[j] = floats(W, least(row + j, out - 1) * in, in, room + j * in);
}

/* y = W x, or y += W x */
static void product(const Run *run, int64_t rows, const float *x, int64_t xs, const float *W, int64_t out, int64_t in,
                    float *y, int64_t ys, int add) {
    SHARED(rows * out * in)
    for (int64_t o = 0; o < out; o += FEW) {
        const float *w[FEW];
        float room[FEW * in];
        some(W, o, out, in, w, room);
        for (int64_t n = 0; n < rows; n++) {
            float found[FEW];
            dots(w, x + n * xs, in, found);
            for (int64_t j = 0; j < least(FEW, out - o); j++)
                y[n * ys + o + j] = add ? y[n * ys + o + j] + found[j] : found[j];
        }
    }
}

/* Words: x, step, W, out, in, y, step, whether to add */
int64_t step_product(const Word *w, const Run *run) {
    product(run, run->rows, w[0].x, w[1].n, w[2].x, w[3].n, w[4].n, w[5].x, w[6].n, w[7].n);
    return 0;
}

/* y = W^T x of each head, and behind it what is behind x; a head's W [out, in] is Ws weights behind the last one's */
/* Words: x, step, step of heads, W, Ws, heads, out, in, y, step, step of heads, how much is behind x */
int64_t step_transposed(const Word *w, const Run *run) {
    const float *x = w[0].x, *W = w[3].x;
    const int64_t xs = w[1].n, xh = w[2].n, Ws = w[4].n, heads = w[5].n, out = w[6].n, in = w[7].n;
    float *y = w[8].x;
    const int64_t ys = w[9].n, yh = w[10].n, rest = w[11].n;
    SHARED(run->rows * heads * out * in)
    for (int64_t h = 0; h < heads; h++)
        for (int64_t n = 0; n < run->rows; n++) {
            const float *from = x + n * xs + h * xh;
            float *to = y + n * ys + h * yh, room[FEW * in];
            memset(to, 0, in * sizeof(float));
            for (int64_t o = 0; o < out; o += FEW) {
                const int64_t count = least(FEW, out - o);
                sum_of_rows(from + o, floats(W, h * Ws + o * in, count * in, room), count, in, in, to);
            }
            memcpy(to + in, from + out, rest * sizeof(float));
        }
    return 0;
}

/* -- elementwise, and norms */

static float scalar(const float *a, const float *b, int64_t n) {
    const float *w[FEW] = {a, a, a, a};
    float found[FEW];
    dots(w, b, n, found);
    return found[0];
}

/* y = x / rms(x) * weight, of each of so many parts of a row */
/* Words: x, step, weight, eps, parts, size, y, step */
int64_t step_norm(const Word *w, const Run *run) {
    const int64_t parts = w[4].n, size = w[5].n;
    float room[size];
    const float *weight = floats(w[2].x, 0, size, room);
    for (int64_t n = 0; n < run->rows; n++)
        for (int64_t p = 0; p < parts; p++) {
            const float *x = w[0].x + n * w[1].n + p * size;
            float *y = w[6].x + n * w[7].n + p * size;
            const float inverse = 1.0f / sqrtf(scalar(x, x, size) / size + (float)w[3].f);
            EACH(i, size) y[i] = x[i] * inverse * weight[i];
        }
    return 0;
}

/* y *= sigmoid(x) */
/* Words: x, step, y, step, size */
int64_t step_gate(const Word *w, const Run *run) {
    for (int64_t n = 0; n < run->rows; n++) {
        const float *x = w[0].x + n * w[1].n;
        float *y = w[2].x + n * w[3].n;
        EACH(i, w[4].n) y[i] *= sigmoid(x[i]);
    }
    return 0;
}

/* g = silu(g) u; of a beta, g = beta tanh(g / beta) sigmoid(g) u, u bounded alike where it has one */
static void activate(float *g, const float *u, int64_t size, float beta, float linear) {
    if (!beta) {
        EACH(i, size) g[i] = g[i] * sigmoid(g[i]) * u[i];
        return;
    }
    for (int64_t i = 0; i < size; i++)
        g[i] = beta * tanhf(g[i] / beta) * sigmoid(g[i]) * (linear ? linear * tanhf(u[i] / linear) : u[i]);
}

/* Words: g, step, u, step, size, beta, beta of u */
int64_t step_activate(const Word *w, const Run *run) {
    for (int64_t n = 0; n < run->rows; n++)
        activate(w[0].x + n * w[1].n, w[2].x + n * w[3].n, w[4].n, w[5].f, w[6].f);
    return 0;
}

/* h = sum_i p_i v_i, p = softmax_i <proj, v_i / rms(v_i) * weight>; `sources` are the addresses of all v */
/* Words: sources, how many, size, weight, eps, proj, h, room */
int64_t step_mix(const Word *w, const Run *run) {
    const int64_t *sources = w[0].cell, count = w[1].n, size = w[2].n;
    float *p = w[7].x, *product = p + count, room[2 * size];
    const float *norm = floats(w[3].x, 0, size, room), *proj = floats(w[5].x, 0, size, room + size);
    EACH(i, size) product[i] = norm[i] * proj[i];
    for (int64_t n = 0; n < run->rows; n++) {
        float *y = w[6].x + n * size, top = -INFINITY, sum = 0.0f;
        memset(y, 0, size * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            const float *v = (const float *)sources[i] + n * size;
            p[i] = scalar(v, product, size) / sqrtf(scalar(v, v, size) / size + (float)w[4].f);
            top = max_(p[i], top);
        }
        for (int64_t i = 0; i < count; i++) sum += p[i] = exp_(p[i] - top);
        for (int64_t i = 0; i < count; i++) {
            const float *v = (const float *)sources[i] + n * size, part = p[i] / sum;
            EACH(j, size) y[j] = FMA(part, v[j], y[j]);
        }
    }
    return 0;
}

/* -- layers of a recurrence */

/* y = silu(sum over a token and those before it), whose inputs, [width - 1, total] of a sequence, move on */
/* Words: x, step, weight, channels, width, cell, offset among channels, total, y, step */
int64_t step_convolve(const Word *w, const Run *run) {
    const int64_t channels = w[3].n, past = w[4].n - 1, offset = w[6].n, total = w[7].n;
    float room[channels * (past + 1)], seen[channels], *kept = (float *)*w[5].cell;
    const float *weight = floats(w[2].x, 0, channels * (past + 1), room);
    for (int64_t n = 0; n < run->rows; n++) {
        float *restrict y = w[8].x + n * w[9].n;
        memset(y, 0, channels * sizeof(float));
        for (int64_t t = 0; t <= past; t++) {
            const int64_t at = (n * past + t) * total + offset;
            const float *x = t < past ? floats(kept, at, channels, seen) : w[0].x + n * w[1].n;
            EACH(i, channels) y[i] = FMA(x[i], weight[i * (past + 1) + t], y[i]);
            if (t) keep(kept, at - total, channels, x);
        }
        EACH(i, channels) y[i] *= sigmoid(y[i]);
    }
    return 0;
}

/* The native loop of an op, on the pool that a cell has now; 1, with nothing written, where a number is not finite. */
/* Words: loop, its call, the word of the call that is the pool, cell, how */
int64_t step_recurrence(const Word *w, const Run *run) {
    int64_t (*decode)(const void *, int64_t) = (int64_t(*)(const void *, int64_t))w[0].p;
    (void)run;
    *w[2].cell = *w[3].cell;
    return decode(w[1].p, w[4].n);
}

/* -- full attention */

/* mix[h] = sum_t p[h, t] latents[t], p = softmax_t(scale <query[h], latents[t]>), for a few heads, BLOCK tokens at a
   time: what was summed so far is scaled down as greater scores are found. */
static void attend(const float *latents, int64_t first, int64_t count, int64_t width, int64_t rank, float scale,
                   int64_t heads, const float *query, float *mix) {
    float top[FEW], sum[FEW] = {0}, p[BLOCK + FEW], room[BLOCK * width];
    for (int h = 0; h < FEW; h++) top[h] = -INFINITY;
    memset(mix, 0, heads * rank * sizeof(float));
    for (int64_t t = 0; t < count; t += BLOCK) {
        const int64_t here = least(BLOCK, count - t);
        const float *block = floats(latents, first + t * width, here * width, room);
        for (int64_t h = 0; h < heads; h++) {
            float *to = mix + h * rank, most = top[h];
            for (int64_t i = 0; i < here; i += FEW) {
                const float *rows[FEW];
                some(block, i, here, width, rows, NULL);
                dots(rows, query + h * width, width, p + i);
            }
            for (int64_t i = 0; i < here; i++) p[i] *= scale, most = max_(p[i], most);
            const float kept = exp_(top[h] - most);
            EACH(i, here) p[i] = exp_(p[i] - most);
            EACH(i, rank) to[i] *= kept;
            sum_of_rows(p, block, here, width, rank, to);
            sum[h] = sum[h] * kept + total(p, here);
            top[h] = most;
        }
    }
    for (int64_t h = 0; h < heads; h++)
        EACH(i, rank) mix[h * rank + i] /= sum[h];
}

/* Of all heads, on a sequence's latents and a new one behind its `past`; a cell has where latents are, the next how
   many floats a sequence has room for. */
/* Words: query, new, step, cell, past, heads, rank, width, scale, mix */
int64_t step_attend(const Word *w, const Run *run) {
    const float *query = w[0].x;
    const int64_t *past = w[4].cell, heads = w[5].n, rank = w[6].n, width = w[7].n, groups = (heads + FEW - 1) / FEW;
    float *latents = (float *)w[3].cell[0];
    const int64_t apart = w[3].cell[1];
    int64_t all = 0;
    for (int64_t n = 0; n < run->rows; n++) {
        keep(latents, n * apart + past[n] * width, width, w[1].x + n * w[2].n);
        all += past[n] + 1;
    }
    SHARED(2 * all * heads * width)
    for (int64_t i = 0; i < run->rows * groups; i++) {
        const int64_t n = i / groups, h = i % groups * FEW, at = n * heads + h;
        attend(latents, n * apart, past[n] + 1, width, rank, w[8].f, least(FEW, heads - h), query + at * width,
               w[9].x + at * rank);
    }
    return 0;
}

/* -- experts */

/* The greatest of n, or what is not a number, by its place; it is taken. */
static int64_t take_best(float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (!(x[i] <= x[best])) best = i;
    x[best] = -INFINITY;
    return best;
}

/* Sigmoid scores; of the best groups, each as good as its best two, the best k by score + bias; weights by score. */
/* Words: scores, bias, experts, k, groups, groups kept, whether to renormalise, factor, room, chosen, weights */
int64_t step_choose(const Word *w, const Run *run) {
    const float *bias = w[1].x;
    const int64_t experts = w[2].n, k = w[3].n, groups = w[4].n, kept = w[5].n, size = experts / groups;
    float *biased = w[8].x, *group = biased + experts, *copy = group + groups;
    for (int64_t n = 0; n < run->rows; n++) {
        float *scores = w[0].x + n * experts, *weights = w[10].x + n * k, sum = 0.0f;
        int64_t *chosen = w[9].cell + n * k;
        EACH(i, experts) scores[i] = sigmoid(scores[i]), biased[i] = scores[i] + bias[i];
        if (kept < groups) {
            memcpy(copy, biased, experts * sizeof(float));
            for (int64_t g = 0; g < groups; g++) {
                group[g] = 0.0f;
                for (int64_t i = 0; i < least(2, size); i++)
                    group[g] += biased[g * size + take_best(copy + g * size, size)];
            }
            for (int64_t i = 0; i < kept; i++) take_best(group, groups);
            for (int64_t i = 0; i < experts; i++)
                if (group[i / size] != -INFINITY) biased[i] = -INFINITY;
        }
        for (int64_t i = 0; i < k; i++) {
            chosen[i] = take_best(biased, experts);
            weights[i] = scores[chosen[i]];
            sum += weights[i];
        }
        for (int64_t i = 0; i < k; i++) weights[i] = weights[i] / (w[6].n ? sum + 1e-20f : 1.0f) * (float)w[7].f;
    }
    return 0;
}

/* y += each row's experts, weighted: each expert once, w2(activation(w1 x, w3 x)) of the rows that chose it */
/* Words: x, step, weights of all, experts, chosen, weights, k, size, inner, beta, beta of u, y, step, room, owners */
int64_t step_experts(const Word *w, const Run *run) {
    const int64_t *table = w[2].cell, *chosen = w[4].cell, experts = w[3].n, k = w[6].n, size = w[7].n, inner = w[8].n;
    const int64_t most = run->rows * k;
    float *rows = w[13].x, *g = rows + most * size, *u = g + most * inner, *out = u + most * inner;
    int64_t *owner = w[14].cell;
    for (int64_t e = 0; e < experts; e++) {
        int64_t count = 0;
        for (int64_t i = 0; i < most; i++)
            if (chosen[i] == e) {
                memcpy(rows + count * size, w[0].x + i / k * w[1].n, size * sizeof(float));
                owner[count++] = i;
            }
        if (!count) continue;
        const float *const *weights = (const float *const *)(table + 3 * e);
        product(run, count, rows, size, weights[0], inner, size, g, inner, 0);
        product(run, count, rows, size, weights[1], inner, size, u, inner, 0);
        activate(g, u, count * inner, w[9].f, w[10].f);
        product(run, count, g, inner, weights[2], size, inner, out, size, 0);
        for (int64_t c = 0; c < count; c++) {
            float *y = w[11].x + owner[c] / k * w[12].n;
            EACH(i, size) y[i] = FMA(w[5].x[owner[c]], out[c * size + i], y[i]);
        }
    }
    return 0;
}

/* -- a program */

/* Steps of a program; the number of the first that failed, or `last`. */
int64_t kdagen_step(const Word *program, int64_t first, int64_t last, const Run *run) {
    for (; first < last; first++) {
        const Word *w = program + first * WORDS;
        if (((Function)w[0].p)(w + 1, run)) break;
    }
    return first;
}
