// Which instruction sets this machine runs, and the one that is used.
#include <cstdlib>
#include <stdexcept>

#include "gpsa.h"
#include "kernels.h"

namespace convit {
namespace {

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> list;
#if defined(CONVIT_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) list.push_back(&kernels_avx512_bf16);
    if (avx512) list.push_back(&kernels_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&kernels_avx2);
#endif
#if defined(__aarch64__)
    list.push_back(&kernels_neon);
#endif
    list.push_back(&kernels_portable);
    return list;
}

const Kernels& choose() {
    const std::vector<const Kernels*> list = runnable();
    const char* wanted = std::getenv("CONVIT_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return *list.front();
    std::string names;
    for (const Kernels* kernels : list) {
        if (std::string(wanted) == kernels->name) return *kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("CONVIT_CPU_ISA must be one of those that this machine can run (" + names + "), got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();  // a throw leaves it unset: every call reports the error
    return chosen;
}

std::string instruction_set() { return kernels().name; }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* k : runnable()) names.push_back(k->name);
    return names;
}

}  // namespace convit
