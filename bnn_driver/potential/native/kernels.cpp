// The two inner loops of MACE for M members on a CPU: the convolution, which is linear in radial weights w, features x and
// harmonics y, and the symmetric contraction, a polynomial of the messages.  Each comes with its gradient and with the
// derivative of that gradient along a direction, so that training on forces needs nothing else.
//
// Channels are innermost everywhere and go in vectors of 64 bytes; their number must be a multiple of one vector.
// Tables are read, never written; outputs that are added to must come as zeros.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

using I = int64_t;

namespace {

template <class T> struct Vector;
template <> struct Vector<double> { typedef double type __attribute__((vector_size(64), aligned(8), may_alias)); };
template <> struct Vector<float> { typedef float type __attribute__((vector_size(64), aligned(4), may_alias)); };
template <class T> using Vec = typename Vector<T>::type;
template <class T> constexpr I LANES = 64 / sizeof(T);

template <class T> inline Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> inline void store(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }
template <class T> inline void add(T* p, Vec<T> v) { store<T>(p, load<T>(p) + v); }
template <class T> inline T total(Vec<T> v) {
    T sum = 0;
    for (I l = 0; l < LANES<T>; ++l) sum += v[l];
    return sum;
}

// ---- convolution

struct Sizes {
    I members, nodes, slots, bonds, width, rows, components, channels, harmonics, paths;
    I edge_lead;                    // numbers from one member to the next; 0 when all see the same neighbours
    I w_lead, dw_lead, slope_lead;  // the same of w, its direction and dw/dr
    I y_lead, dy_lead;              // of the harmonics and their direction
};

// A row of the table of paths.
struct Path {
    I x, d1, y, d2, w;         // first component of the source, 2 l1 + 1, first harmonic, 2 l2 + 1, first column of w / channels
    I before, d3, slots, slot;  // rows of the blocks before this one, 2 l3 + 1, slots of the block, which slot
    I first, last;              // its coupling coefficients
};

template <class T> struct Tables {
    Sizes s;
    const I* source;
    const I* pair;
    const T* mask;
    const Path* paths;
    const I* terms;    // (n, 2): component of the output, j * d1 + i
    const T* values;   // (n,)
};

// The neighbours of one node that are there.
template <class T> struct Neighbours {
    std::vector<const T*> w, dw, x, dx, y, dy;
    std::vector<I> bond, row, edge;
    I count = 0;
    explicit Neighbours(I slots) : w(slots), dw(slots), x(slots), dx(slots), y(slots), dy(slots), bond(slots), row(slots), edge(slots) {}

    void collect(const Tables<T>& t, I m, I n, const T* aw, const T* adw, const T* ax, const T* adx, const T* ay, const T* ady) {
        const Sizes& s = t.s;
        const I lead = m * s.edge_lead;
        count = 0;
        for (I k = 0; k < s.slots; ++k) {
            const I e = n * s.slots + k;
            if (t.mask[lead + e] == 0) continue;
            const I q = t.pair[lead + e], r = t.source[lead + e];
            w[count] = aw + m * s.w_lead + q * s.width;
            dw[count] = adw ? adw + m * s.dw_lead + q * s.width : nullptr;
            x[count] = ax + (m * s.rows + r) * s.components * s.channels;
            dx[count] = adx ? adx + (m * s.rows + r) * s.components * s.channels : nullptr;
            y[count] = ay + m * s.y_lead + e * s.harmonics;
            dy[count] = ady ? ady + m * s.dy_lead + e * s.harmonics : nullptr;
            bond[count] = q, row[count] = r, edge[count] = e;
            ++count;
        }
    }
};

template <class T> inline T* output(const Sizes& s, const Path& p, T* out, I m, I n) {
    const I rows = s.members * s.nodes * p.before + (m * s.nodes + n) * p.d3 * p.slots + p.slot;
    return out + rows * s.channels;  // component c3 is c3 * slots rows further
}

// Sum over the neighbours of one node, for NV vectors of channels from c on.  Along a direction (dw, dx, dy) when ALONG.
template <class T, int D1, int D2, int NV, bool ALONG>
inline void sum_neighbours(const Tables<T>& t, const Path& p, const Neighbours<T>& near, T* out, I c) {
    constexpr I L = LANES<T>;
    const I C = t.s.channels;
    Vec<T> sum[D1 * D2][NV];
    for (int a = 0; a < D1 * D2; ++a)
        for (int v = 0; v < NV; ++v) sum[a][v] = Vec<T>{};
    for (I k = 0; k < near.count; ++k) {
        const T* y = near.y[k] + p.y;
        const T* dy = ALONG && near.dy[k] ? near.dy[k] + p.y : nullptr;
        for (int v = 0; v < NV; ++v) {
            const I at = p.w * C + c + v * L;
            const Vec<T> w = load<T>(near.w[k] + at);
            Vec<T> dw = ALONG && near.dw[k] ? load<T>(near.dw[k] + at) : Vec<T>{};
            for (int i = 0; i < D1; ++i) {
                const I ax = (p.x + i) * C + c + v * L;
                const Vec<T> x = load<T>(near.x[k] + ax);
                const Vec<T> wx = w * x;
                if (!ALONG) {
                    for (int j = 0; j < D2; ++j) sum[j * D1 + i][v] += wx * y[j];
                } else {
                    Vec<T> change = dw * x;
                    if (near.dx[k]) change += w * load<T>(near.dx[k] + ax);
                    for (int j = 0; j < D2; ++j) sum[j * D1 + i][v] += change * y[j];
                    if (dy)
                        for (int j = 0; j < D2; ++j) sum[j * D1 + i][v] += wx * dy[j];
                }
            }
        }
    }
    for (I n = p.first; n < p.last; ++n)
        for (int v = 0; v < NV; ++v) add<T>(out + t.terms[2 * n] * p.slots * C + c + v * L, sum[t.terms[2 * n + 1]][v] * t.values[n]);
}

// Fetch a row of channels ahead of its use.
template <class T> inline void ask(const T* row, I channels) {
    for (I c = 0; c < channels; c += LANES<T>) __builtin_prefetch(row + c, 0, 2);
}

template <class T, int D1, int D2, bool ALONG> void forward_path(const Tables<T>& t, const Path& p, const Neighbours<T>& near, T* out) {
    constexpr int NV = D1 * D2 <= 3 ? 4 : D1 * D2 <= 10 ? 2 : 1;
    constexpr I L = LANES<T>;
    for (I k = 0; k < near.count; ++k) {  // their rows are far apart: ask for all of them at once
        ask<T>(near.w[k] + p.w * t.s.channels, t.s.channels);
        if (ALONG && near.dw[k]) ask<T>(near.dw[k] + p.w * t.s.channels, t.s.channels);
    }
    I c = 0;
    for (; c + NV * L <= t.s.channels; c += NV * L) sum_neighbours<T, D1, D2, NV, ALONG>(t, p, near, out, c);
    for (; c < t.s.channels; c += L) sum_neighbours<T, D1, D2, 1, ALONG>(t, p, near, out, c);
}

// What the gradient of one path needs beside the neighbours.
template <class T> struct Gradient {
    const T* g;      // (d2 * d1, channels) of this node, couplings applied
    T* w;            // gradients, or null: (bonds, width) of this member
    T* x;            // (rows, components, channels)
    T* y;            // (edges, harmonics)
    const T* slope;  // dw/dr, to take the gradient along r instead of the one of w
    T* r;            // (bonds,)
    I from, to;      // channels
};

constexpr I AHEAD = 3;  // neighbours

template <class T, int D1, int D2, bool ALONG>
void backward_path(const Tables<T>& t, const Path& p, const Neighbours<T>& near, const Gradient<T>& out) {
    constexpr I L = LANES<T>;
    const I C = t.s.channels;
    for (I k = 0; k < near.count; ++k) {
        Vec<T> of_y[D2];
        Vec<T> of_r = Vec<T>{};
        for (int j = 0; j < D2; ++j) of_y[j] = Vec<T>{};
        T y[D2], dy[D2];
        for (int j = 0; j < D2; ++j) y[j] = near.y[k][p.y + j], dy[j] = ALONG && near.dy[k] ? near.dy[k][p.y + j] : T(0);
        T* gx = out.x ? out.x + near.row[k] * t.s.components * C : nullptr;
        T* gw = out.w ? out.w + near.bond[k] * t.s.width : nullptr;
        const T* slope = out.slope ? out.slope + near.bond[k] * t.s.width : nullptr;
        const I next = k + AHEAD;
        if (next < near.count) {
            ask<T>(near.w[next] + p.w * C, C);
            if (out.slope) ask<T>(out.slope + near.bond[next] * t.s.width + p.w * C, C);
            if (out.w) ask<T>(out.w + near.bond[next] * t.s.width + p.w * C, C);
        }
        for (I c = out.from; c < out.to; c += L) {
            const I at = p.w * C + c;
            const Vec<T> w = load<T>(near.w[k] + at);
            const Vec<T> dw = ALONG && near.dw[k] ? load<T>(near.dw[k] + at) : Vec<T>{};
            Vec<T> of_w = Vec<T>{};
            for (int i = 0; i < D1; ++i) {
                const I ax = (p.x + i) * C + c;
                const Vec<T> x = load<T>(near.x[k] + ax);
                const Vec<T> wx = w * x;
                Vec<T> u = Vec<T>{}, du = Vec<T>{};
                for (int j = 0; j < D2; ++j) {
                    const Vec<T> g = load<T>(out.g + (j * D1 + i) * C + c);
                    u += g * y[j];
                    if (ALONG) du += g * dy[j];
                    if (!ALONG) of_y[j] += g * wx;
                }
                if (!ALONG) {
                    of_w += u * x;
                    if (gx) add<T>(gx + ax, u * w);
                } else {
                    of_w += du * x;
                    if (near.dx[k]) of_w += u * load<T>(near.dx[k] + ax);
                    if (gx) add<T>(gx + ax, du * w + u * dw);
                }
            }
            if (gw) add<T>(gw + at, of_w);
            if (slope) of_r += of_w * load<T>(slope + at);
        }
        if (out.y && !ALONG)
            for (int j = 0; j < D2; ++j) out.y[near.edge[k] * t.s.harmonics + p.y + j] += total<T>(of_y[j]);
        if (slope) out.r[near.bond[k]] += total<T>(of_r);
    }
}

template <class T> using Forward = void (*)(const Tables<T>&, const Path&, const Neighbours<T>&, T*);
template <class T> using Backward = void (*)(const Tables<T>&, const Path&, const Neighbours<T>&, const Gradient<T>&);

constexpr int DEGREES = 5;  // l1 and l2 up to 4

template <class T, bool ALONG, int... N> Forward<T> forward_of(I d1, I d2, std::integer_sequence<int, N...>) {
    static constexpr Forward<T> table[] = {forward_path<T, 2 * (N / DEGREES) + 1, 2 * (N % DEGREES) + 1, ALONG>...};
    return table[(d1 / 2) * DEGREES + d2 / 2];
}
template <class T, bool ALONG, int... N> Backward<T> backward_of(I d1, I d2, std::integer_sequence<int, N...>) {
    static constexpr Backward<T> table[] = {backward_path<T, 2 * (N / DEGREES) + 1, 2 * (N % DEGREES) + 1, ALONG>...};
    return table[(d1 / 2) * DEGREES + d2 / 2];
}
using All = std::make_integer_sequence<int, DEGREES * DEGREES>;

template <class T>
void forward(const Tables<T>& t, const T* w, const T* dw, const T* x, const T* dx, const T* y, const T* dy, T* out, int threads) {
    const Sizes& s = t.s;
    const bool along = dw || dx || dy;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Neighbours<T> near(s.slots);
#pragma omp for schedule(static)
        for (I mn = 0; mn < s.members * s.nodes; ++mn) {
            const I m = mn / s.nodes, n = mn % s.nodes;
            near.collect(t, m, n, w, dw, x, dx, y, dy);
            for (I i = 0; i < s.paths; ++i) {
                const Path& p = t.paths[i];
                auto f = along ? forward_of<T, true>(p.d1, p.d2, All{}) : forward_of<T, false>(p.d1, p.d2, All{});
                f(t, p, near, output<T>(s, p, out, m, n));
            }
        }
    }
}

// Work is shared out by members and, for gradients that several nodes add to, by channels: part i of `parts` has its own gy and gr.
template <class T>
void backward(const Tables<T>& t, const T* g, const T* w, const T* dw, const T* x, const T* dx, const T* y, const T* dy, const T* slope,
              T* gw, T* gx, T* gy, T* gr, I parts, int threads) {
    const Sizes& s = t.s;
    const I C = s.channels, L = LANES<T>, edges = s.nodes * s.slots;
    const bool along = dw || dx || dy;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (I task = 0; task < s.members * parts; ++task) {
        const I m = task / parts, part = task % parts;
        Neighbours<T> near(s.slots);
        I widest = 1;
        for (I i = 0; i < s.paths; ++i) widest = std::max(widest, t.paths[i].d1 * t.paths[i].d2);
        std::vector<T> coupled(widest * C);
        Gradient<T> out{};
        out.g = coupled.data();
        out.w = gw ? gw + m * s.bonds * s.width : nullptr;
        out.x = gx ? gx + m * s.rows * s.components * C : nullptr;
        out.y = gy ? gy + (part * s.members + m) * edges * s.harmonics : nullptr;
        out.slope = slope ? slope + m * s.slope_lead : nullptr;
        out.r = gr ? gr + (part * s.members + m) * s.bonds : nullptr;
        out.from = C / L * part / parts * L;
        out.to = C / L * (part + 1) / parts * L;
        for (I n = 0; n < s.nodes; ++n) {
            near.collect(t, m, n, w, dw, x, dx, y, dy);
            for (I i = 0; i < s.paths; ++i) {
                const Path& p = t.paths[i];
                const T* from = output<const T>(s, p, g, m, n);
                std::fill(coupled.begin(), coupled.begin() + p.d1 * p.d2 * C, T(0));
                for (I a = p.first; a < p.last; ++a)
                    for (I c = out.from; c < out.to; c += L)
                        add<T>(coupled.data() + t.terms[2 * a + 1] * C + c, load<T>(from + t.terms[2 * a] * p.slots * C + c) * t.values[a]);
                auto f = along ? backward_of<T, true>(p.d1, p.d2, All{}) : backward_of<T, false>(p.d1, p.d2, All{});
                f(t, p, near, out);
            }
        }
    }
}

// ---- symmetric contraction: out_r = sum over pairs (a, b) of r of x_a x_b * sum over singles i of c x_i, where x_n = 1

struct Polynomial {
    I members, nodes, elements, terms, pairs, components, outputs, channels;
    const I* single;  // (terms,), sorted by pair
    const I* pair;    // (pairs, 3): a, b, output
    const I* start;   // (pairs + 1,): first term of each pair
    const I* slice;   // (elements, 2): first and last node of each element
};

enum class Want { value, gradient, along };

template <class T> struct Contracted {
    const T *x, *v, *c, *g;  // messages, direction, coefficients, gradient of the outputs
    T *out, *gx, *gc;
};

// Coefficients lie vector of channels by vector of channels, (members, elements, channels / lanes, terms, lanes): one task reads them
// from one end to the other.
template <class T, Want W> inline void contract_channels(const Polynomial& p, const Contracted<T>& a, I m, I e, I block, Vec<T>* memory) {
    const I C = p.channels, n = p.components, at = block * LANES<T>;
    const I place = ((m * p.elements + e) * (C / LANES<T>) + block) * p.terms * LANES<T>;
    Vec<T>*x = memory, *v = x + n + 1, *dx = v + n + 1, *r = dx + n + 1, *g = r + p.outputs;
    const Vec<T>* c = reinterpret_cast<const Vec<T>*>(a.c + place);
    const bool weights = W != Want::value && a.gc;
    Vec<T>* dc = weights ? reinterpret_cast<Vec<T>*>(a.gc + place) : nullptr;
    for (I node = p.slice[2 * e]; node < p.slice[2 * e + 1]; ++node) {
        const I mn = m * p.nodes + node;
        for (I i = 0; i < n; ++i) x[i] = load<T>(a.x + (mn * n + i) * C + at);
        x[n] = Vec<T>{} + T(1);
        if (W == Want::along) {
            for (I i = 0; i < n; ++i) v[i] = load<T>(a.v + (mn * n + i) * C + at);
            v[n] = Vec<T>{};
        }
        if (W != Want::value) {
            for (I i = 0; i < p.outputs; ++i) g[i] = load<T>(a.g + (mn * p.outputs + i) * C + at);
            std::fill(dx, dx + n + 1, Vec<T>{});
        }
        if (W != Want::gradient) std::fill(r, r + p.outputs, Vec<T>{});
        for (I i = 0; i < p.pairs; ++i) {
            const I first = p.pair[3 * i], second = p.pair[3 * i + 1], output = p.pair[3 * i + 2];
            const I begin = p.start[i], end = p.start[i + 1];
            const Vec<T> ab = x[first] * x[second];
            Vec<T> sum = Vec<T>{};
            if (W == Want::value) {
                for (I q = begin; q < end; ++q) sum += c[q] * x[p.single[q]];
                r[output] += sum * ab;
            } else if (W == Want::gradient) {
                const Vec<T> h = g[output] * ab;
                for (I q = begin; q < end; ++q) {
                    const I single = p.single[q];
                    sum += c[q] * x[single];
                    dx[single] += c[q] * h;
                    if (weights) dc[q] += h * x[single];
                }
                const Vec<T> gs = g[output] * sum;
                dx[first] += gs * x[second];
                dx[second] += gs * x[first];
            } else {
                const Vec<T> dab = v[first] * x[second] + x[first] * v[second];
                const Vec<T> h = g[output] * ab, dh = g[output] * dab;
                Vec<T> dsum = Vec<T>{};
                for (I q = begin; q < end; ++q) {
                    const I single = p.single[q];
                    sum += c[q] * x[single];
                    dsum += c[q] * v[single];
                    dx[single] += c[q] * dh;
                    if (weights) dc[q] += dh * x[single] + h * v[single];
                }
                r[output] += dsum * ab + sum * dab;
                const Vec<T> gs = g[output] * sum, dgs = g[output] * dsum;
                dx[first] += dgs * x[second] + gs * v[second];
                dx[second] += dgs * x[first] + gs * v[first];
            }
        }
        if (W != Want::gradient)
            for (I i = 0; i < p.outputs; ++i) store<T>(a.out + (mn * p.outputs + i) * C + at, r[i]);
        if (W != Want::value)
            for (I i = 0; i < n; ++i) store<T>(a.gx + (mn * n + i) * C + at, dx[i]);
    }
}

template <class T, Want W> void contract(const Polynomial& p, const Contracted<T>& a, int threads) {
    const I vectors = p.channels / LANES<T>, tasks = p.members * p.elements * vectors;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<T> memory((3 * (p.components + 1) + 2 * p.outputs + 1) * LANES<T>);
        const uintptr_t place = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(T) % LANES<T>;
        Vec<T>* aligned = reinterpret_cast<Vec<T>*>(memory.data() + (place ? LANES<T> - place : 0));
#pragma omp for schedule(static)
        for (I task = 0; task < tasks; ++task) {
            const I m = task / (p.elements * vectors), e = task / vectors % p.elements;
            contract_channels<T, W>(p, a, m, e, task % vectors, aligned);
        }
    }
}

template <class T> Tables<T> tables(const I* sizes, const I* source, const I* pair, const T* mask, const I* paths, const I* terms, const T* values) {
    Sizes s{};
    std::copy(sizes, sizes + sizeof(Sizes) / sizeof(I), reinterpret_cast<I*>(&s));
    return {s, source, pair, mask, reinterpret_cast<const Path*>(paths), terms, values};
}

Polynomial polynomial(const I* sizes, const I* single, const I* pair, const I* start, const I* slice) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], single, pair, start, slice};
}

}  // namespace

#define ENTRIES(T, NAME)                                                                                                              \
    void convolve_##NAME(const I* sizes, const I* source, const I* pair, const T* mask, const I* paths, const I* terms,               \
                         const T* values, const T* w, const T* dw, const T* x, const T* dx, const T* y, const T* dy, T* out,          \
                         int threads) {                                                                                               \
        forward<T>(tables<T>(sizes, source, pair, mask, paths, terms, values), w, dw, x, dx, y, dy, out, threads);                    \
    }                                                                                                                                 \
    void convolve_gradient_##NAME(const I* sizes, const I* source, const I* pair, const T* mask, const I* paths, const I* terms,      \
                                  const T* values, const T* g, const T* w, const T* dw, const T* x, const T* dx, const T* y,          \
                                  const T* dy, const T* slope, T* gw, T* gx, T* gy, T* gr, I parts, int threads) {                    \
        backward<T>(tables<T>(sizes, source, pair, mask, paths, terms, values), g, w, dw, x, dx, y, dy, slope, gw, gx, gy, gr, parts, \
                    threads);                                                                                                         \
    }                                                                                                                                 \
    void contract_##NAME(const I* sizes, const I* single, const I* pair, const I* start, const I* slice, const T* x, const T* c,      \
                         T* out, int threads) {                                                                                       \
        contract<T, Want::value>(polynomial(sizes, single, pair, start, slice), {x, nullptr, c, nullptr, out, nullptr, nullptr},      \
                                 threads);                                                                                            \
    }                                                                                                                                 \
    void contract_gradient_##NAME(const I* sizes, const I* single, const I* pair, const I* start, const I* slice, const T* x,         \
                                  const T* c, const T* g, T* gx, T* gc, int threads) {                                                \
        contract<T, Want::gradient>(polynomial(sizes, single, pair, start, slice), {x, nullptr, c, g, nullptr, gx, gc}, threads);     \
    }                                                                                                                                 \
    void contract_along_##NAME(const I* sizes, const I* single, const I* pair, const I* start, const I* slice, const T* x,            \
                               const T* v, const T* c, const T* g, T* out, T* gx, T* gc, int threads) {                               \
        contract<T, Want::along>(polynomial(sizes, single, pair, start, slice), {x, v, c, g, out, gx, gc}, threads);                  \
    }

extern "C" {
ENTRIES(double, float64)
ENTRIES(float, float32)
}
