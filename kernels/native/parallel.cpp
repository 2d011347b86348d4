// Threads. torch computes on the threads of an OpenMP runtime; work that waits at the end of a parallel region spins for
// a while, so a second pool beside it would fight for the cores. The binding therefore hands over the entry point of the
// runtime that torch has loaded (GOMP_parallel, which GNU's and LLVM's runtimes both export), and our work runs on the
// very same threads. Without one, threads are started for each call, as many as the system allows.
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
    // std::system_error (no more threads) or std::bad_alloc. Neither may leave a C function, and neither matters: `parallel_for`
    // gives all the work to whichever threads there are.
  }
  work(context);
  for (std::thread& thread : started) thread.join();
}
