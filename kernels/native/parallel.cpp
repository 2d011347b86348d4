// Threads. torch computes on the threads of an OpenMP runtime, which spin for a while after a parallel region: a second
// pool would compete with them for the cores. native_library.py therefore passes in the entry point of the runtime that
// torch has loaded (GOMP_parallel, which GNU's and LLVM's runtimes both export), and our work runs on the same threads.
// Without a runtime, threads are started for each call.
#include "native.h"

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace {

using Gomp = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<Gomp> gomp{nullptr};

}  // namespace

BELLE_API void belle_use_openmp(void* gomp_parallel) { gomp = reinterpret_cast<Gomp>(gomp_parallel); }

void belle::run_on_threads(int threads, void (*work)(void*), void* context) {
  if (threads == 1) return work(context);
  if (const Gomp run = gomp) return run(work, context, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> started;
  try {
    started.reserve(static_cast<size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) started.emplace_back(work, context);
  } catch (const std::exception&) {
    // std::system_error (no more threads) or std::bad_alloc. A C function must not throw, and `parallel_for` gives all
    // work to whichever threads there are.
  }
  work(context);
  for (std::thread& thread : started) thread.join();
}
