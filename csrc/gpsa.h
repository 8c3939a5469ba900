// GPSA on CPU: plain C++ on pointers and sizes, no Python headers.
#pragma once

namespace convit {

// Name of the instruction set that the kernels use on this machine.
const char* instruction_set();

}  // namespace convit
