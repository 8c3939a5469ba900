// The position softmax: its two tables, their product with the values, and the way back through a table.

// softmax over z of linear * (z - x) + square * (z - x)^2, for each x < size. Logits in float64: with a locality strength of 1e4 the
// differences that matter are far below the logits' own size. `row` holds size floats, rounded up to whole vectors.
static void table(float linear, float square, i64 size, float* to, float* row) {
    for (i64 x = 0; x < size; ++x) {
        double top = -1.7976931348623157e+308;
        for (i64 z = 0; z < size; ++z) {
            const double d = double(z - x), logit = double(linear) * d + double(square) * d * d;
            top = logit > top ? logit : top;
        }
        for (i64 z = 0; z < size; ++z) {
            const double d = double(z - x), logit = double(linear) * d + double(square) * d * d;
            row[z] = float((logit - top) * 1.4426950408889634);
        }
        for (i64 z = size; z < round_up(size, W); ++z) row[z] = lowest;
        vec sum{};
        for (i64 z = 0; z < size; z += W) {
            const vec p = exp2(load(row + z));
            store(row + z, p);
            sum += p;
        }
        const float inverse = float(1.0 / sum_lanes(sum));
        for (i64 z = 0; z < size; ++z) to[x * size + z] = row[z] * inverse;
    }
}

static void tables(const float* w, i64 gh, i64 gw, float* px, float* py, float* row) {
    table(w[0], w[2], gw, px, row);
    table(w[1], w[2], gh, py, row);
}

// (Py (x) Px) v for the grid rows [y0, y1): to[(y - y0) * gw + x][padded]
static void position_product(const Shape& s, const float* px, const float* py, i64 y0, i64 y1, const float* v, i64 padded, float* along_x,
                             float* to) {
    const i64 gh = s.grid_h, gw = s.grid_w, line = gw * padded;
    for (i64 y = 0; y < gh; ++y) multiply<Floats, true>(gw, padded, gw, px, gw, v + y * line, padded, Store{along_x + y * line, padded});
    multiply<Floats, true>(y1 - y0, line, gh, py + y0 * gh, gh, along_x, line, Store{to, line});
}

// Through one table's softmax to its two weights: adds to the linear and the square weight's gradient, returns sum(table * grad).
static double table_gradient(const float* table, const float* grad, i64 size, double& linear, double& square) {
    double total = 0;
    for (i64 x = 0; x < size; ++x) {
        const float *p = table + x * size, *g = grad + x * size;
        double mean = 0;
        for (i64 z = 0; z < size; ++z) mean += double(p[z]) * g[z];
        for (i64 z = 0; z < size; ++z) {
            const double d = double(z - x), ds = p[z] * (g[z] - mean);
            linear += ds * d;
            square += ds * d * d;
        }
        total += mean;
    }
    return total;
}
