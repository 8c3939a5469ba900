// Runs one function on several threads, on the OpenMP runtime that the process already has or on threads of its own.
#pragma once

#include <string>

namespace convit {

// Calls work(context) on at most `threads` threads at once, the calling one among them, and returns when all are done. How many calls
// there are is the runtime's choice, at least one: the work itself hands out its parts. work must not throw.
void run_threads(int threads, void (*work)(void*), void* context);

std::string thread_runtime();

}  // namespace convit
