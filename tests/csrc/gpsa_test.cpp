// Stand-alone test of csrc/ (no Python): every awkward shape against the definition in float64, on one and on several threads, in
// buffers of the exact size so that a sanitizer sees the first element read or written beside them. Exit status 0 if all agree.
#include "gpsa.h"
#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace convit;
using i64 = std::int64_t;

namespace {

int failures = 0;

struct Size {
    i64 b, h, gh, gw, d;
};

// A [B, H, N, D] tensor in an exact allocation, `packed` of them interleaved as in a joint projection; this one is number `slot`.
struct Tensor {
    Size s;
    DType dtype;
    i64 packed, slot;
    std::unique_ptr<unsigned char[]> memory;
    std::vector<double> value;  // [B][H][N][D], as stored

    i64 tokens() const { return s.gh * s.gw; }
    i64 width() const { return dtype == DType::float32 ? 4 : 2; }
    i64 stride_n() const { return packed * s.h * s.d; }

    Tensor(Size s, DType dtype, i64 packed, i64 slot, std::mt19937* random) : s(s), dtype(dtype), packed(packed), slot(slot) {
        const i64 count = s.b * tokens() * stride_n();
        memory.reset(new unsigned char[std::size_t(count * width())]);
        std::memset(memory.get(), 0xff, std::size_t(count * width()));  // NaN in both types
        value.assign(std::size_t(s.b * s.h * tokens() * s.d), 0.0);
        if (random == nullptr) return;
        std::normal_distribution<float> normal;
        for (i64 i = 0; i < i64(value.size()); ++i) {
            const float x = normal(*random);
            std::uint32_t bits;
            std::memcpy(&bits, &x, 4);
            if (dtype == DType::bfloat16) bits &= 0xffff0000u;
            float kept;
            std::memcpy(&kept, &bits, 4);
            value[std::size_t(i)] = kept;
            unsigned char* at = memory.get() + offset(i) * width();
            if (dtype == DType::float32) {
                std::memcpy(at, &kept, 4);
            } else {
                const std::uint16_t high = std::uint16_t(bits >> 16);
                std::memcpy(at, &high, 2);
            }
        }
    }

    i64 offset(i64 i) const {
        const i64 d = i % s.d, n = i / s.d % tokens(), h = i / s.d / tokens() % s.h, b = i / s.d / tokens() / s.h;
        return (b * tokens() + n) * stride_n() + slot * s.h * s.d + h * s.d + d;
    }
    double stored(i64 i) const {
        const unsigned char* at = memory.get() + offset(i) * width();
        std::uint32_t bits = 0;
        if (dtype == DType::float32) {
            std::memcpy(&bits, at, 4);
        } else {
            std::uint16_t high;
            std::memcpy(&high, at, 2);
            bits = std::uint32_t(high) << 16;
        }
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    Heads in() const { return {memory.get() + slot * s.h * s.d * width(), tokens() * stride_n(), s.d, stride_n()}; }
    MutableHeads out() { return {memory.get() + slot * s.h * s.d * width(), tokens() * stride_n(), s.d, stride_n()}; }
};

void expect(const char* what, const Size& s, DType dtype, const std::vector<double>& ours, const std::vector<double>& truth) {
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < truth.size(); ++i) {
        error += (ours[i] - truth[i]) * (ours[i] - truth[i]);
        norm += truth[i] * truth[i];
    }
    const double allowed = dtype == DType::float32 ? 2e-6 : 8e-3;
    if (std::sqrt(error) <= allowed * std::sqrt(norm) + 1e-5 * std::sqrt(double(truth.size()))) return;
    std::printf("FAIL %s B%ld H%ld %ldx%ld D%ld: error %g, norm %g\n", what, long(s.b), long(s.h), long(s.gh), long(s.gw), long(s.d),
                std::sqrt(error), std::sqrt(norm));
    ++failures;
}

std::vector<double> all(const Tensor& x) {
    std::vector<double> y(x.value.size());
    for (i64 i = 0; i < i64(y.size()); ++i) y[std::size_t(i)] = x.stored(i);
    return y;
}

void softmax(std::vector<double>& x) {
    const double top = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (double& v : x) sum += v = std::exp(v - top);
    for (double& v : x) v /= sum;
}

void test(Size s, DType dtype, int threads) {
    std::mt19937 random(unsigned(s.b * 131 + s.h * 31 + s.gh * 7 + s.gw * 3 + s.d));
    std::normal_distribution<float> normal;
    const i64 n = s.gh * s.gw, d = s.d;
    const Tensor q(s, dtype, 3, 0, &random), k(s, dtype, 3, 1, &random), v(s, dtype, 3, 2, &random), grad(s, dtype, 1, 0, &random);
    Tensor out(s, dtype, 1, 0, nullptr), dq(s, dtype, 1, 0, nullptr), dk(s, dtype, 1, 0, nullptr), dv(s, dtype, 1, 0, nullptr);
    const auto floats = [](i64 count) { return std::unique_ptr<float[]>(new float[std::size_t(count)]); };
    auto w = floats(3 * s.h), gating = floats(s.h), lse = floats(s.b * s.h * n), dw = floats(3 * s.h), dgating = floats(s.h);
    for (i64 h = 0; h < s.h; ++h) {
        for (int c = 0; c < 3; ++c) w[std::size_t(3 * h + c)] = 0.3f * normal(random);
        w[std::size_t(3 * h + 2)] = -std::fabs(w[std::size_t(3 * h + 2)]);
        gating[std::size_t(h)] = h % 3 == 2 || s.gw > 50 ? -200.f : normal(random);  // shut: that head has no position
    }
    const Shape shape{s.b, s.h, s.gh, s.gw, s.d, 0.3f, dtype};
    gpsa_forward(shape, q.in(), k.in(), v.in(), w.get(), gating.get(), out.out(), lse.get(), threads);
    gpsa_backward(shape, grad.in(), q.in(), k.in(), v.in(), w.get(), gating.get(), lse.get(), dq.out(), dk.out(), dv.out(), dw.get(),
                  dgating.get(), threads);

    const std::size_t size = q.value.size();
    std::vector<double> to(size), tdq(size), tdk(size), tdv(size), tdw(std::size_t(3 * s.h)), tdg(std::size_t(s.h));
    for (i64 b = 0; b < s.b; ++b)
        for (i64 h = 0; h < s.h; ++h) {
            const double g = 1 / (1 + std::exp(-double(gating[std::size_t(h)])));
            const float* wh = &w[std::size_t(3 * h)];
            const i64 base = (b * s.h + h) * n;
            for (i64 i = 0; i < n; ++i) {
                std::vector<double> content(static_cast<std::size_t>(n)), position(content), da(content);
                const auto at = [&](const Tensor& x, i64 row, i64 c) { return x.value[std::size_t((base + row) * d + c)]; };
                for (i64 j = 0; j < n; ++j) {
                    double dot = 0;
                    for (i64 c = 0; c < d; ++c) {
                        dot += at(q, i, c) * at(k, j, c);
                        da[std::size_t(j)] += at(grad, i, c) * at(v, j, c);
                    }
                    const double dx = double(j % s.gw - i % s.gw), dy = double(j / s.gw - i / s.gw);
                    content[std::size_t(j)] = double(shape.scale) * dot;
                    position[std::size_t(j)] = wh[0] * dx + wh[1] * dy + wh[2] * (dx * dx + dy * dy);
                }
                softmax(content);
                softmax(position);
                double mean_c = 0, mean_p = 0;
                for (std::size_t j = 0; j < std::size_t(n); ++j) {
                    mean_c += content[j] * da[j];
                    mean_p += position[j] * da[j];
                }
                tdg[std::size_t(h)] += g * (1 - g) * (mean_p - mean_c);
                for (i64 j = 0; j < n; ++j) {
                    const double pc = content[std::size_t(j)], p = position[std::size_t(j)], a = (1 - g) * pc + g * p;
                    const double ds = (1 - g) * pc * (da[std::size_t(j)] - mean_c), dp = g * p * (da[std::size_t(j)] - mean_p);
                    const double dx = double(j % s.gw - i % s.gw), dy = double(j / s.gw - i / s.gw);
                    tdw[std::size_t(3 * h)] += dp * dx;
                    tdw[std::size_t(3 * h + 1)] += dp * dy;
                    tdw[std::size_t(3 * h + 2)] += dp * (dx * dx + dy * dy);
                    for (i64 c = 0; c < d; ++c) {
                        to[std::size_t((base + i) * d + c)] += a * at(v, j, c);
                        tdv[std::size_t((base + j) * d + c)] += a * at(grad, i, c);
                        tdq[std::size_t((base + i) * d + c)] += ds * double(shape.scale) * at(k, j, c);
                        tdk[std::size_t((base + j) * d + c)] += ds * double(shape.scale) * at(q, i, c);
                    }
                }
            }
        }
    expect("out", s, dtype, all(out), to);
    expect("dq", s, dtype, all(dq), tdq);
    expect("dk", s, dtype, all(dk), tdk);
    expect("dv", s, dtype, all(dv), tdv);
    // the sums over all patches are of float32 products in either storage
    expect("dpos_weight", s, DType::bfloat16, {dw.get(), dw.get() + 3 * s.h}, tdw);
    expect("dgating", s, DType::bfloat16, {dgating.get(), dgating.get() + s.h}, tdg);
}

// Plain attention, asked for by null pointers: the bits of gpsa with every gate closed.
void test_plain(Size s, DType dtype) {
    std::mt19937 random(5);
    const i64 n = s.gh * s.gw;
    const Tensor q(s, dtype, 3, 0, &random), k(s, dtype, 3, 1, &random), v(s, dtype, 3, 2, &random), grad(s, dtype, 1, 0, &random);
    const Shape shape{s.b, s.h, s.gh, s.gw, s.d, 0.3f, dtype};
    const std::vector<float> w(std::size_t(3 * s.h), 0.5f), gating(std::size_t(s.h), -INFINITY);
    std::vector<double> results[2][4];
    for (int closed : {0, 1}) {
        Tensor out(s, dtype, 1, 0, nullptr), dq(s, dtype, 1, 0, nullptr), dk(s, dtype, 1, 0, nullptr), dv(s, dtype, 1, 0, nullptr);
        std::vector<float> lse(std::size_t(s.b * s.h * n)), dw(w.size()), dgating(gating.size());
        const float *pos_weight = closed ? w.data() : nullptr, *gates = closed ? gating.data() : nullptr;
        gpsa_forward(shape, q.in(), k.in(), v.in(), pos_weight, gates, out.out(), lse.data(), 2);
        gpsa_backward(shape, grad.in(), q.in(), k.in(), v.in(), pos_weight, gates, lse.data(), dq.out(), dk.out(), dv.out(),
                      closed ? dw.data() : nullptr, closed ? dgating.data() : nullptr, 2);
        const Tensor* outputs[] = {&out, &dq, &dk, &dv};
        for (int i = 0; i < 4; ++i) results[closed][i] = all(*outputs[i]);
    }
    for (int i = 0; i < 4; ++i)
        if (results[0][i] != results[1][i]) {
            std::printf("FAIL plain attention, output %d\n", i);
            ++failures;
        }
}

void test_layers(i64 rows, i64 width, int threads) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const std::size_t size = std::size_t(rows * width), w = std::size_t(width), r = std::size_t(rows);
    std::vector<float> x(size), grad(size), gamma(w), beta(w), y(size), mean(r), rstd(r), dx(size), dgamma(w), dbeta(w);
    for (std::vector<float>* values : {&x, &grad, &gamma, &beta})
        for (float& value : *values) value = 2 * normal(random);
    layer_norm_forward(x.data(), gamma.data(), beta.data(), rows, width, 1e-5f, y.data(), mean.data(), rstd.data(), threads);
    layer_norm_backward(grad.data(), x.data(), gamma.data(), mean.data(), rstd.data(), rows, width, dx.data(), dgamma.data(), dbeta.data(), threads);
    std::vector<double> ty(size), tdx(size), tdgamma(w), tdbeta(w);
    for (std::size_t i = 0; i < r; ++i) {
        double sum = 0, squares = 0, sum_g = 0, sum_gx = 0;
        for (std::size_t c = 0; c < w; ++c) sum += x[i * w + c];
        for (std::size_t c = 0; c < w; ++c) squares += std::pow(x[i * w + c] - sum / double(w), 2);
        const double m = sum / double(w), s = 1 / std::sqrt(squares / double(w) + double(1e-5f));
        for (std::size_t c = 0; c < w; ++c) {
            sum_g += double(grad[i * w + c]) * gamma[c];
            sum_gx += double(grad[i * w + c]) * gamma[c] * (x[i * w + c] - m) * s;
        }
        for (std::size_t c = 0; c < w; ++c) {
            const double hat = (x[i * w + c] - m) * s, g = grad[i * w + c];
            ty[i * w + c] = hat * gamma[c] + beta[c];
            tdx[i * w + c] = (g * gamma[c] - sum_g / double(w) - hat * sum_gx / double(w)) * s;
            tdgamma[c] += g * hat;
            tdbeta[c] += g;
        }
    }
    const Size shape{1, 1, 1, rows, width};
    expect("layer norm", shape, DType::float32, {y.begin(), y.end()}, ty);
    expect("layer norm, dx", shape, DType::float32, {dx.begin(), dx.end()}, tdx);
    expect("layer norm, dgamma", shape, DType::float32, {dgamma.begin(), dgamma.end()}, tdgamma);
    expect("layer norm, dbeta", shape, DType::float32, {dbeta.begin(), dbeta.end()}, tdbeta);
    for (bool tanh_form : {false, true}) {
        gelu_forward(x.data(), i64(size), tanh_form, y.data(), threads);
        gelu_backward(grad.data(), x.data(), i64(size), tanh_form, dx.data(), threads);
        const auto gelu = [&](double t) {
            return 0.5 * t * (1 + (tanh_form ? std::tanh(std::sqrt(2 / M_PI) * (t + 0.044715 * t * t * t)) : std::erf(t / std::sqrt(2.0))));
        };
        for (std::size_t i = 0; i < size; ++i) {
            ty[i] = gelu(x[i]);
            tdx[i] = grad[i] * (gelu(x[i] + 1e-5) - gelu(x[i] - 1e-5)) / 2e-5;
        }
        expect("gelu", shape, DType::float32, {y.begin(), y.end()}, ty);
        expect("gelu, dx", shape, DType::float32, {dx.begin(), dx.end()}, tdx);
    }
}

}  // namespace

int main() try {
    instruction_set();
    const Size sizes[] = {{1, 1, 1, 1, 1},  {1, 1, 1, 1, 16}, {2, 3, 3, 5, 7},   {1, 2, 1, 13, 33}, {2, 1, 13, 1, 48},
                          {1, 3, 7, 7, 20}, {2, 2, 14, 14, 48}, {1, 1, 5, 53, 64}, {1, 1, 17, 19, 9}, {0, 2, 3, 3, 8},
                          {2, 0, 3, 3, 8},  {1, 1, 0, 0, 8},  {1, 2, 2, 3, 130}};
    for (const Size& size : sizes)
        for (DType dtype : {DType::float32, DType::bfloat16})
            for (int threads : {1, 3}) test(size, dtype, threads);
    for (DType dtype : {DType::float32, DType::bfloat16}) test_plain({2, 3, 5, 7, 24}, dtype);
    for (int threads : {1, 3}) {
        test_layers(1, 5, threads);
        test_layers(3, 37, threads);
        test_layers(700, 192, threads);
    }
    // several callers at once, each with threads of its own
    std::vector<std::thread> callers;
    for (int c = 0; c < 2; ++c) callers.emplace_back([] {
        for (int repeat = 0; repeat < 2; ++repeat) {
            const i64 n = 35, d = 12;
            std::vector<float> x(std::size_t(n * 2 * d), 0.5f), y(x), lse(std::size_t(2 * n));
            const float w[6] = {}, gating[2] = {};
            const Shape shape{1, 2, 5, 7, d, 0.3f, DType::float32};
            gpsa_forward(shape, {x.data(), 0, d, 2 * d}, {x.data(), 0, d, 2 * d}, {x.data(), 0, d, 2 * d}, w, gating, {y.data(), 0, d, 2 * d},
                         lse.data(), 3);
            for (float value : y)
                if (std::fabs(value - 0.5f) > 1e-6f) std::abort();
        }
    });
    for (std::thread& caller : callers) caller.join();
    std::printf("%s, %s: %s\n", instruction_set().c_str(), thread_runtime().c_str(), failures ? "FAILED" : "all agree");
    return failures != 0;
} catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
}
