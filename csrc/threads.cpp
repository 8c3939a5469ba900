// A second OpenMP runtime beside the framework's means two pools of threads that spin against each other. So this library is linked
// against none: it looks for the runtime that the process has loaded globally (PyTorch loads its own so) by the entry point that
// GCC's and LLVM's runtimes share, and otherwise starts plain threads for the duration of the call.
#include "threads.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define CONVIT_POSIX 1
#endif

namespace convit {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(CONVIT_POSIX)
// Whether this process was made by fork and has not started another program since, as far as the system tells (Linux).
bool made_by_fork() {
    char text[512] = {};
    std::FILE* file = std::fopen("/proc/self/stat", "r");
    if (file == nullptr) return false;
    const std::size_t size = std::fread(text, 1, sizeof text - 1, file);
    std::fclose(file);
    const char* after_name = size > 0 ? std::strrchr(text, ')') : nullptr;
    unsigned flags = 0;
    const bool found = after_name != nullptr && std::sscanf(after_name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1;
    return found && (flags & 0x40u) != 0;  // PF_FORKNOEXEC
}

// In a child made by fork the runtime's threads do not exist and waiting for them would never end: neither in one made later nor in one
// where this library is used first, whose parent may have used the runtime for other things.
std::atomic<bool> forked{made_by_fork()};

void after_fork() { forked.store(true, std::memory_order_relaxed); }

GompParallel find_runtime() {
    static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
    static std::atomic<GompParallel> found{nullptr};
    if (registered != 0 || forked.load(std::memory_order_relaxed)) return nullptr;
    GompParallel runtime = found.load(std::memory_order_relaxed);
    if (runtime == nullptr) {  // looked for again until it is there: the framework may be loaded later
        runtime = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        found.store(runtime, std::memory_order_relaxed);
    }
    return runtime;
}
#else
GompParallel find_runtime() { return nullptr; }
#endif

}  // namespace

void run_threads(int threads, void (*work)(void*), void* context) {
    if (threads <= 1) return work(context);
    if (GompParallel parallel = find_runtime()) return parallel(work, context, unsigned(threads), 0);
    std::vector<std::thread> helpers;
    helpers.reserve(std::size_t(threads) - 1);
    try {
        for (int t = 1; t < threads; ++t) helpers.emplace_back(work, context);
    } catch (const std::system_error&) {
        // no more threads to be had: those that started, and this one, do all of the work
    }
    work(context);
    for (std::thread& helper : helpers) helper.join();
}

std::string thread_runtime() { return find_runtime() ? "OpenMP" : "std::thread"; }

}  // namespace convit
