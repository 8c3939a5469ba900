// pybind11 module convit._C.
#include <pybind11/pybind11.h>

#include "gpsa.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "Fused GPSA kernels for CPU.";
    m.def("instruction_set", &convit::instruction_set, "The instruction set in use on this machine.");
}
