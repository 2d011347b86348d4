// What the library offers and what its files share. The C ABI below is mirrored by kernels/native_structs.py, which
// checks the sizes of the structs (matmul.cpp) when it loads the library; raise kAbi with any change.
//
// K = inputs, N = outputs, M = rows of activations, G = groups. A "group" here is a run of 32, 64 or 128 inputs with one
// scale and zero an output; longer groups of a checkpoint are several of them. Inputs stand in the order of the groups,
// each group padded to whole runs.
//
// codes   (N / 16, G, run * bits / 32, 16, 4) bytes: 16 outputs by one group are contiguous. In a vector of 64 bytes,
//         lane r of 16 holds output r; with n = 8 / bits, bit field j of its byte i is the code of input 4 (n v + j) + i
//         of vector v. N is padded to 32.
// scales  (N / 16, G, 16) float16 or float32
// zeros   (N / 16, G, 16) int16, or none where all are equal
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#define BELLE_API extern "C" __attribute__((visibility("default")))

extern "C" {

struct BelleWeight {
  const uint8_t* codes;
  const void* scales;
  const int16_t* zeros;   // may be null: `zero` for all
  const int32_t* order;   // (G * run): the input that stands at each place, -1 for padding; null: 0, 1, 2, ...
  const float* bias;      // (N), may be null
  int64_t inputs;         // K
  int64_t outputs;        // N, without padding
  int64_t groups;         // G
  int32_t run;            // inputs a group: 32, 64 or 128
  int32_t bits;           // of a code in its container: 2, 4 or 8
  int32_t half_scales;    // 1: scales are float16, 0: float32
  int32_t zero;
};

struct BelleWords {        // a weight as GPTQ files hold it
  const int32_t* words;    // (K * bits / 32, N): codes of `bits` bits along K, the lowest input in the lowest bits
  const int32_t* order;    // (G * run), as above
  int64_t inputs, outputs, groups;
  int32_t bits;            // 2, 3, 4 or 8
  int32_t run, container;  // of the layout to make
};

struct BelleRows {         // a matrix (N, K) of codes, its rows the outputs, inputs in order, symmetric
  const uint8_t* matrix;   // (N, K)
  int64_t count, groups;   // N, a multiple of 16, and G = K / run
  int32_t run, bits;       // 32, 64 or 128; 4 or 8
};

struct BelleRounding {     // the same from numbers
  const void* matrix;      // (N, K) of `kind`
  uint8_t* codes;          // (N, K), written, the zero point at 2^(bits - 1)
  uint16_t* scales;        // (N, K / run) float16, written
  const float* clips;      // shares of a run's largest magnitude that are tried as the end of the grid beside 1
  int64_t count, inputs;   // N, K
  int64_t clip_count;
  int32_t run, bits;       // 32, 64 or 128; 4 or 8
  int32_t kind;            // 0: float32, 1: float16, 2: bfloat16
};

struct BelleNew {          // of M new tokens: numbers (M, heads, head_dim), the strides in floats; that of the last is 1
  const float* numbers;
  int64_t row, head;
};

struct BelleCache {        // keys and values of one block: S slots, H' heads
  void* keys;              // (S, H', capacity, head_dim) of `kind`
  void* values;            // likewise
  uint16_t* key_scales;    // (S, H', capacity) float16 where `kind` is 2
  uint16_t* value_scales;  // likewise
  int64_t slots, kv_heads, capacity, head_dim;
  int32_t kind;            // 0: float32, 1: float16, 2: int8
};

struct BelleStep {         // one new token in each of some slots: M rows, the same for all blocks
  const int64_t* slots;    // (M), none twice
  const int64_t* lengths;  // (M): tokens that the row's slot holds in front of the new one
  const float* cosines;    // (M, head_dim) of rotary positions; null: none
  const float* sines;      // likewise, the first half negative
  const float* slopes;     // (H) of ALiBi, may be null
  int64_t rows;            // M
};

struct BelleAttention {    // of a step in one block; H heads
  const BelleCache* cache;  // the new keys and values are written
  const BelleStep* step;
  BelleNew query;          // (M, H, head_dim)
  BelleNew key, value;     // (M, H', head_dim)
  float* out;              // (M, H, head_dim)
  int64_t heads;           // H
};

// A call of one of the functions below; see run.cpp.
struct BelleCall {
  int32_t kind;         // of BelleKind
  int32_t parts;        // of a product: 2 exact, 1 fast
  const void* subject;  // a product's BelleWeight, attention's BelleAttention, a norm's weight (H)
  const float* x;       // (M, H), attention excepted
  const float* plus;    // (M, N) to be added to a product, or null; a layer norm's bias (H)
  float* out;           // (M, N) of a product, (M, H) of norms and gelu, (M, H / 2) of a gate; attention has its own
  int64_t rows, width;  // M, H
  float eps;            // of norms
};

enum BelleKind { kProduct, kAttention, kRmsNorm, kLayerNorm, kSiluAndMul, kGelu };

struct BelleGptqBlock {    // GPTQ's walk through a block of B <= 128 inputs; tables (B, N) unless said otherwise
  float* weights;          // used up
  const float* factor;     // (B, B) of the inverse Hessian, upper triangular; strides below, in floats
  uint8_t* codes;          // written
  float* errors;           // written: what each input leaves to those behind the block
  float* scales;           // `group` > 0: (B / group, N), written; else read, `own` values from input to input
  float* zeros;            // likewise
  int64_t inputs, outputs; // B, N
  int64_t factor_step, factor_input;  // from one of the factor's rows (steps) or columns (inputs) to the next
  int64_t own;             // N, or 0: one row for all inputs
  int32_t group;           // 32, 64 or 128 inputs, of B; 0 where the grids are known
  int32_t levels;          // the largest code
  int32_t symmetric;
};

struct BelleDescent {      // one sweep over g <= 128 inputs of a group
  float* codes;            // (g, N), less their zero points; changed
  const float* residual;   // (g, N) of H (Q - W)
  const float* scale;      // (N)
  const float* zero;       // (N)
  const float* hessian;    // (g, g), symmetric, with `stride` floats a row
  const float* diagonal;   // (g), none 0
  int64_t inputs, outputs, stride;
  int32_t levels;
};

struct BelleSearch {       // the grid of a group of g inputs with the least weighted error of rounding
  const float* weights;    // (g, N), N a multiple of 16
  const float* importance; // (g)
  const float* scales;     // (candidates, N)
  const float* zeros;      // (candidates, N)
  int32_t* best;           // (N), written: the first of the best; -1 where none is
  int64_t inputs, outputs, candidates;
  float smallest;          // scale that counts
  int32_t levels;
};

}  // extern "C"

namespace belle {

constexpr int kAbi = 10;
constexpr int kBlock = 16;              // outputs of one vector of codes
constexpr int kPair = 2 * kBlock;       // outputs of one unit of work; N is padded to it
constexpr int kMostRun = 128;
constexpr int kFewRows = 4;             // up to so many are read as a stream, see tile.h
constexpr int kMostRows = 256;          // rows of x that a unit of work takes at most
constexpr int kPacked = 512;            // outputs packed together
constexpr int kSolved = 64;             // outputs of a unit of work of the solver
constexpr int64_t kHugePage = 1 << 21;  // bytes
constexpr int kOverhang = 16;           // rows behind the split activations that tiles may read and ignore
constexpr int64_t kInlineNumbers = 1 << 16;  // of rows, or of keys: below, waking threads takes longer than the work

// One product, as all threads see it. Activations are split per row and group: x = scale * (256 * high + low), or
// scale * high alone, with `high` and `low` of 8 signed bits. Instruction sets that multiply bytes get them apart, the
// others as one number of 16 bits. Rows come in units of `unit_rows`, which one thread multiplies at a time: `data[part]`
// is (units, G, unit_rows, run), `scale` and `sum` (of the integers) are (units, G, unit_rows).
struct Task {
  BelleWeight w;
  const float* x;     // (M, K)
  const float* plus;  // (M, N), added to the product; may be null
  float* y;           // (M, N)
  int64_t rows;    // M
  int64_t unit_rows;
  int parts;       // 2: exact, 1: fast
  uint8_t* data[2];
  float* scale;
  int32_t* sum;
};

// Where row m stands in group 0, counted in rows; group g follows unit_rows * g later.
inline int64_t place_of(const Task& t, int64_t m) {
  return m / t.unit_rows * t.w.groups * t.unit_rows + m % t.unit_rows;
}

// One instruction set. Every result is a function of one row of x alone: integer sums are exact, and each group's sum
// is scaled and added in the order of the groups, whatever the shape of the tile that computed it.
struct Kernel {
  int input_bytes;  // of an activation in `data`: 1 (high and low apart) or 2
  int chunk;        // inputs whose activations a unit of work meets again and again; 0: all
  void (*split)(const Task&, int64_t row_begin, int64_t row_end);
  void (*multiply)(const Task&, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end);
  uint32_t (*read)(const uint8_t* bytes, int64_t size);  // the sum of all words of 4 bytes; size % 4096 == 0
  void (*attend)(const BelleAttention&, int64_t row, int64_t kv_head, float* scratch);  // see attend.h
  // See gates.h.
  void (*silu_and_mul)(const float* gate, const float* up, float* out, int64_t count);
  void (*gelu)(const float* x, float* out, int64_t count);
  void (*pack)(const BelleWords&, int64_t strip, uint8_t* out);  // see packing.h; kPacked outputs
  bool (*round_row)(const BelleRounding&, int64_t row);  // see rounding.h
  // See gptq.h; `count` outputs from n on, at most kSolved, or 16 of them.
  void (*gptq_block)(const BelleGptqBlock&, int64_t n, int64_t count);
  void (*descend)(const BelleDescent&, int64_t n, int64_t count);
  void (*search)(const BelleSearch&, int64_t n);
};

const Kernel* kernel(int isa);  // of the numbers of cpu_features.h; the portable one where an instruction set is missing

extern const Kernel kPortable, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAmx;

// How many pieces of a layout, `bytes` each, one thread lays at a time: a huge page of them. Where two threads meet a page
// for the first time together, both clear one, and one is thrown away.
inline int64_t pieces_of_page(int64_t bytes) { return bytes < kHugePage ? kHugePage / bytes : 1; }

// Call work(context) from up to `threads` threads at once, the caller among them, and return when all have finished. Fewer
// run where no more can be started, so `work` must not depend on how many there are. Does not throw.
void parallel(int threads, void (*work)(void*), void* context);

// Calls work(begin, end, thread) for pieces of 0 .. count, multiples of `unit`, on as many threads as there are units at
// most. A piece is a share of what is left, so that the last ones are small and the threads end together.
template <class Work>
void share(int threads, int64_t count, int64_t unit, const Work& work) {
  struct Job {
    const Work& work;
    int64_t count, unit;
    int threads;
    std::atomic<int64_t> begun{0};
    std::atomic<int> thread{0};
  };
  const int64_t units = (count + unit - 1) / unit;
  Job job{work, count, unit, units < threads ? static_cast<int>(units) : threads, {}, {}};
  if (units == 0) return;
  parallel(job.threads, [](void* context) {
    Job& job = *static_cast<Job*>(context);
    const int thread = job.thread++;
    int64_t begin = job.begun, end;
    while (begin < job.count) {
      do {
        const int64_t pieces = (job.count - begin) / (4 * job.threads * job.unit);
        end = begin + (pieces > 1 ? pieces : 1) * job.unit;
        end = end < job.count ? end : job.count;
      } while (begin < job.count && !job.begun.compare_exchange_weak(begin, end));
      if (begin < job.count) job.work(begin, end, thread);
      begin = job.begun;
    }
  }, &job);
}

// The parts of a step; what each returns and expects stands beside it.
int product(const BelleCall& call, int threads, int isa);
int attend(const BelleAttention& attention, int threads, int isa);
int rowwise(const BelleCall& call, int threads, int isa);

bool amx_usable();  // asks the kernel for the tiles' state

}  // namespace belle
