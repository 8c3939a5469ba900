// Runs one function on several threads, on the OpenMP runtime that the process already has or on threads of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

namespace convit {

// Calls work(context) on at most `threads` threads at once, the calling one among them, and returns when all are done. How many calls
// there are is the runtime's choice, at least one: the work itself hands out its parts. work must not throw.
void run_threads(int threads, void (*work)(void*), void* context);

std::string thread_runtime();

// Hands `parts` numbers to run(part, worker) on at most `threads` threads. Which thread takes which part does not show in the result.
template <class Run>
void for_parts(std::int64_t parts, int threads, const Run& run) {
    struct Context {
        const Run& run;
        std::int64_t parts;
        std::atomic<std::int64_t> next{0};
        std::atomic<int> workers{0};
    } context{run, parts};
    run_threads(
        int(std::min<std::int64_t>(threads, parts)),
        [](void* p) {
            Context& c = *static_cast<Context*>(p);
            const int worker = c.workers.fetch_add(1);
            for (std::int64_t part; (part = c.next.fetch_add(1)) < c.parts;) c.run(part, worker);
        },
        &context);
}

}  // namespace convit
