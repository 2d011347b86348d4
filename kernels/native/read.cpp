// A plain read: the bound of every product with few rows, measured with the same threads.
#include "native.h"

#include <atomic>
#include <cstring>

namespace belle {
namespace {

constexpr int64_t kChunk = 1 << 20;

struct ReadTask {
  const uint8_t* bytes;
  int64_t size;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> sum{0};
};

void read_chunks(void* context) {
  ReadTask& task = *static_cast<ReadTask*>(context);
  constexpr int kWords = 32;  // of 8 bytes a step: enough sums side by side that only memory is waited for
  uint64_t sums[kWords] = {};
  for (int64_t begin; (begin = kChunk * task.next++) < task.size;) {
    const int64_t end = begin + kChunk < task.size ? begin + kChunk : task.size;
    for (int64_t at = begin; at + 8 * kWords <= end; at += 8 * kWords) {
      uint64_t words[kWords];
      std::memcpy(words, task.bytes + at, sizeof words);
      for (int i = 0; i < kWords; ++i) sums[i] += words[i];
    }
  }
  uint64_t sum = 0;
  for (int i = 0; i < kWords; ++i) sum += sums[i];
  task.sum += sum;
}

}  // namespace
}  // namespace belle

// The sum of all words of 8 bytes (of every whole 256 bytes of each MiB), so that nothing is left out as unused.
BELLE_API uint64_t belle_read(const uint8_t* bytes, int64_t size, int threads) {
  belle::ReadTask task{bytes, size, {}, {}};
  belle::parallel(threads, belle::read_chunks, &task);
  return task.sum;
}
