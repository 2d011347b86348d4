// Threads. torch computes on the threads of an OpenMP runtime; work that waits at the end of a parallel region spins for
// a while, so a second pool beside it would fight for the cores. The binding therefore hands over the entry point of the
// runtime that torch has loaded (GOMP_parallel, which GNU's and LLVM's runtimes both export), and our work runs on the
// very same threads. Without one, threads are started for each call.
#include "native.h"

#include <atomic>
#include <thread>
#include <vector>

namespace {

using Gomp = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
std::atomic<Gomp> gomp{nullptr};

}  // namespace

BELLE_API void belle_use_openmp(void* gomp_parallel) { gomp = reinterpret_cast<Gomp>(gomp_parallel); }

void belle::parallel(int threads, void (*work)(void*), void* context) {
  if (threads == 1) return work(context);
  if (const Gomp run = gomp) return run(work, context, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> started;
  for (int i = 1; i < threads; ++i) started.emplace_back(work, context);
  work(context);
  for (std::thread& thread : started) thread.join();
}
