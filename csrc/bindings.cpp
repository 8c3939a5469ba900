// pybind11 module convit._C: addresses in, plain calls out, the GIL released meanwhile. It knows no framework's headers, so one build
// serves every version of them; kernels/gpsa/cpu_cpp.py takes the addresses and strides from the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "gpsa.h"

namespace py = pybind11;

void bind_infer(py::module_&);

namespace {

using i64 = std::int64_t;
using Address = std::uintptr_t;
using Sizes = std::array<i64, 5>;                      // B, H, gh, gw, D
using Strided = std::tuple<Address, i64, i64, i64>;    // address, strides of B, H and N in elements

convit::Shape shape_of(const Sizes& sizes, float scale, int dtype, int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
    if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(dtype));
    for (i64 size : sizes)
        if (size < 0) throw std::invalid_argument("sizes must not be negative, got " + std::to_string(size));
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale, convit::DType(dtype)};
}

convit::Heads in(const Strided& x) {
    return {reinterpret_cast<const void*>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

convit::MutableHeads out(const Strided& x) {
    return {reinterpret_cast<void*>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

float* floats(Address x) { return reinterpret_cast<float*>(x); }

void forward(const Sizes& sizes, float scale, int dtype, const Strided& q, const Strided& k, const Strided& v, Address pos_weight,
             Address gating, const Strided& result, Address lse, int threads) {
    const convit::Shape shape = shape_of(sizes, scale, dtype, threads);
    py::gil_scoped_release released;
    convit::gpsa_forward(shape, in(q), in(k), in(v), floats(pos_weight), floats(gating), out(result), floats(lse), threads);
}

void backward(const Sizes& sizes, float scale, int dtype, const Strided& grad_out, const Strided& q, const Strided& k,
              const Strided& v, Address pos_weight, Address gating, Address lse, const Strided& dq, const Strided& dk, const Strided& dv,
              Address dpos_weight, Address dgating, int threads) {
    const convit::Shape shape = shape_of(sizes, scale, dtype, threads);
    py::gil_scoped_release released;
    convit::gpsa_backward(shape, in(grad_out), in(q), in(k), in(v), floats(pos_weight), floats(gating), floats(lse), out(dq), out(dk),
                          out(dv), floats(dpos_weight), floats(dgating), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Fused GPSA kernels for CPU; see kernels/gpsa/cpu_cpp.py.";
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("instruction_set", &convit::instruction_set, "The instruction set in use.");
    m.def("instruction_sets", &convit::instruction_sets, "Those that this machine can run, widest first.");
    bind_infer(m);
    m.def("thread_runtime", &convit::thread_runtime, "Who runs the threads.");
}
