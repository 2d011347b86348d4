// The library's C interface, and what its source files share. kernels/native_structs.py mirrors the structs and checks
// their sizes (abi.cpp) when it loads the library; raise kAbi with every change.
//
// K = inputs, N = outputs, M = rows of activations, G = groups. Here a "group" is a run of 32, 64 or 128 inputs with a
// scale and a zero point per output; a longer group of a checkpoint becomes several. Inputs are sorted by group, and
// each group is padded to whole runs. A "position" is an index into these G * run sorted, padded inputs.
//
// codes   (N / 16, G, run * bits / 32, 16, 4) bytes: 16 outputs (a "block") by one group are contiguous. In a vector of
//         64 bytes, lane r of 16 holds output r; with n = 8 / bits, bit field j of its byte i is the code of input
//         4 (n v + j) + i of the group, v being the index of the vector. N is padded to 32.
// scales  (N / 16, G, 16) float16 or float32
// zeros   (N / 16, G, 16) int16, or null if all are equal
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#define BELLE_API extern "C" __attribute__((visibility("default")))

extern "C" {

struct WeightStruct {
  const uint8_t* codes;
  const void* scales;
  const int16_t* zeros;   // null: `zero` everywhere
  const int32_t* order;   // (G * run): the input at each position, -1 for padding; null: 0, 1, 2, ...
  const float* bias;      // (N), may be null
  int64_t inputs;         // K
  int64_t outputs;        // N, without padding
  int64_t groups;         // G
  int32_t run;            // inputs per group: 32, 64 or 128
  int32_t bits;           // per code in memory: 2, 4 or 8
  int32_t half_scales;    // 1: scales are float16, 0: float32
  int32_t zero;
};

struct PackedWordsStruct {  // a weight in the format of GPTQ files
  const int32_t* words;     // (K * bits / 32, N): codes of `bits` bits along K, the lowest input in the lowest bits
  const int32_t* order;     // (G * run), as above
  int64_t inputs, outputs, groups;
  int32_t bits;             // per code in the file: 2, 3, 4 or 8
  int32_t run, container;   // of the layout to make: inputs per group, bits per code
};

struct CodeRowsStruct {    // a symmetric matrix (N, K) of codes, one row per output, inputs in their original order
  const uint8_t* matrix;   // (N, K)
  int64_t count, groups;   // N, a multiple of 16, and G = K / run
  int32_t run, bits;       // 32, 64 or 128; 4 or 8
};

struct RowQuantizationStruct {  // a matrix of floating-point numbers to round to such codes
  const void* matrix;      // (N, K), its dtype given by `kind`
  uint8_t* codes;          // (N, K), written; the zero point is 2^(bits - 1)
  uint16_t* scales;        // (N, K / run) float16, written
  const float* clips;      // fractions of a run's largest magnitude that are tried as the end of the grid besides 1
  int64_t count, inputs;   // N, K
  int64_t clip_count;
  int32_t run, bits;       // 32, 64 or 128; 4 or 8
  int32_t kind;            // 0: float32, 1: float16, 2: bfloat16
};

struct NewTokensStruct {   // queries, keys or values (M, heads, head_dim) of M new tokens
  const float* values;
  int64_t row_stride, head_stride;  // in floats; head_dim is contiguous
};

struct KvCacheStruct {     // keys and values of one block: S slots, H' heads
  void* keys;              // (S, H', capacity, head_dim), its dtype given by `kind`
  void* values;            // likewise
  uint16_t* key_scales;    // (S, H', capacity) float16 if `kind` is 2
  uint16_t* value_scales;  // likewise
  int64_t slots, kv_heads, capacity, head_dim;
  int32_t kind;            // 0: float32, 1: float16, 2: int8
};

struct DecodeStepStruct {  // one new token in each of M slots; the same for all blocks
  const int64_t* slots;    // (M), without duplicates
  const int64_t* lengths;  // (M): tokens in the row's slot before the new one
  const float* cosines;    // (M, head_dim) of rotary position embeddings; null: none
  const float* sines;      // likewise, the first half negated
  const float* slopes;     // (H) of ALiBi, may be null
  int64_t rows;            // M
};

struct AttentionStruct {   // attention of one decode step in one block; H heads
  const KvCacheStruct* cache;  // the new keys and values are written to it
  const DecodeStepStruct* step;
  NewTokensStruct query;       // (M, H, head_dim)
  NewTokensStruct key, value;  // (M, H', head_dim)
  float* out;              // (M, H, head_dim)
  int64_t heads;           // H
};

// One call of a kernel; see run_calls.cpp.
struct CallStruct {
  int32_t kind;         // a CallKind
  int32_t parts;        // of a product's activations: 2 exact, 1 fast
  const void* operand;  // a product's WeightStruct, attention's AttentionStruct, a norm's weight (H)
  const float* x;       // (M, H); unused by attention
  const float* addend;  // (M, N) to add to a product, or null; a layer norm's bias (H)
  float* out;           // (M, N) of a product, (M, H) of norms and GELU, (M, H / 2) of SiLU-and-multiply
  int64_t rows, width;  // M, H
  float eps;            // of norms
};

enum CallKind { kProduct, kAttention, kRmsNorm, kLayerNorm, kSiluAndMul, kGelu };

struct GptqBlockStruct {   // GPTQ's loop over a block of B <= 128 inputs; tables are (B, N) unless stated otherwise
  float* weights;          // overwritten
  const float* factor;     // (B, B) of the inverse Hessian, upper triangular; strides below, in floats
  uint8_t* codes;          // written
  float* errors;           // written: each input's error, to be compensated by the inputs after the block
  float* scales;           // `group` > 0: (B / group, N), written; else read, input i at i * grid_stride
  float* zeros;            // likewise
  int64_t inputs, outputs; // B, N
  int64_t factor_row_stride, factor_column_stride;
  int64_t grid_stride;     // N, or 0: one row for all inputs
  int32_t group;           // 32, 64 or 128 inputs, a divisor of B; 0 if the grids are given
  int32_t levels;          // the largest code
  int32_t symmetric;
};

struct CoordinateDescentStruct {  // one sweep over g <= 128 inputs of a group
  float* codes;            // (g, N), minus their zero points; changed
  const float* residual;   // (g, N) of H (Q - W)
  const float* scale;      // (N)
  const float* zero;       // (N)
  const float* hessian;    // (g, g), symmetric, with `stride` floats per row
  const float* diagonal;   // (g), without zeros
  int64_t inputs, outputs, stride;
  int32_t levels;
};

struct GridSearchStruct {  // the candidate grid with the smallest weighted rounding error for a group of g inputs
  const float* weights;    // (g, N), N a multiple of 16
  const float* importance; // (g)
  const float* scales;     // (candidates, N)
  const float* zeros;      // (candidates, N)
  int32_t* best;           // (N), written: the first of the best candidates; -1 if none is valid
  int64_t inputs, outputs, candidates;
  float smallest;          // magnitude of a valid scale
  int32_t levels;
};

}  // extern "C"

namespace belle {

constexpr int kAbi = 10;
constexpr int kBlock = 16;              // outputs per vector of codes
constexpr int kPair = 2 * kBlock;       // outputs per unit of work; N is padded to a multiple of it
constexpr int kMaxRun = 128;
constexpr int kMaxRows = 256;           // rows of x per unit of work, at most
constexpr int kPackedOutputs = 512;     // outputs that are packed together
constexpr int kSolverOutputs = 64;      // outputs per unit of work of the solver
constexpr int64_t kHugePage = 1 << 21;  // bytes
constexpr int kOverreadRows = 16;       // rows after the split activations that tiles may read and ignore
constexpr int64_t kSingleThreadValues = 1 << 16;  // values of rows or keys: with fewer, waking threads takes longer

enum InstructionSet { kIsaPortable, kIsaAvx2, kIsaAvxVnni, kIsaAvx512, kIsaAvx512Vnni, kIsaAmx, kIsaCount };

// One product, shared by all threads. Activations are split per row and group: x = scale * (256 * high + low), or
// scale * high alone, where `high` and `low` have 8 signed bits. Instruction sets that multiply bytes get them
// separately, the others as one number of 16 bits. Rows come in units of `unit_rows`, each multiplied by one thread:
// `split[part]` is (units, G, unit_rows, run), `scale` and `sum` (of the integers) are (units, G, unit_rows).
struct MatmulTask {
  WeightStruct w;
  const float* x;       // (M, K)
  const float* addend;  // (M, N), added to the product; may be null
  float* y;             // (M, N)
  int64_t rows;         // M
  int64_t unit_rows;
  int parts;            // 2: exact, 1: fast
  uint8_t* split[2];
  float* scale;
  int32_t* sum;
};

// The index of row m of group 0 in `scale` and `sum`; group g comes unit_rows * g later.
inline int64_t row_position(const MatmulTask& t, int64_t m) {
  return m / t.unit_rows * t.w.groups * t.unit_rows + m % t.unit_rows;
}

// The kernels of one instruction set. Every result depends on one row of x alone: integer sums are exact, and each
// group's sum is scaled and added in the order of the groups, whatever the shape of the tile that computed it.
struct IsaKernels {
  int input_bytes;   // per activation in `split`: 1 (high and low separate) or 2
  int stream_rows;   // up to this many rows, codes are unpacked while they are read; see matmul.h
  int chunk_inputs;  // inputs whose activations a unit of work reads repeatedly; 0: all
  // matmul.h
  void (*split)(const MatmulTask&, int64_t row_begin, int64_t row_end);
  void (*multiply)(const MatmulTask&, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end);
  uint32_t (*read)(const uint8_t* bytes, int64_t size);  // the sum of all words of 4 bytes; size % 4096 == 0
  void (*attend)(const AttentionStruct&, int64_t row, int64_t kv_head, float* scratch);  // attention.h
  // activation_functions.h
  void (*silu_and_mul)(const float* gate, const float* up, float* out, int64_t count);
  void (*gelu)(const float* x, float* out, int64_t count);
  void (*pack)(const PackedWordsStruct&, int64_t strip, uint8_t* out);  // packing.h; kPackedOutputs outputs
  bool (*quantize_row)(const RowQuantizationStruct&, int64_t row);      // row_quantization.h
  // solver.h; `count` outputs from n on, at most kSolverOutputs; `search`: 16 outputs
  void (*gptq_block)(const GptqBlockStruct&, int64_t n, int64_t count);
  void (*descend)(const CoordinateDescentStruct&, int64_t n, int64_t count);
  void (*search)(const GridSearchStruct&, int64_t n);
};

extern const IsaKernels kPortable, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAmx;

const IsaKernels* kernels_for(int isa);  // of an InstructionSet; the portable ones if the build does not contain it
bool amx_usable();                       // requests permission for tile data from the operating system

// The entry points of run_calls.cpp. Each returns 0, 1 if an index is out of bounds, or 2 if memory is exhausted.
int run_product(const CallStruct& call, int threads, int isa);
int run_attention(const AttentionStruct& attention, int threads, int isa);
int run_elementwise(const CallStruct& call, int threads, int isa);

// How many pieces of a layout, `bytes` each, one thread writes at a time: those that fill a huge page. If two threads
// touched a page first at the same time, the system would clear two pages and discard one.
inline int64_t pieces_per_huge_page(int64_t bytes) { return bytes < kHugePage ? kHugePage / bytes : 1; }

// Call work(context) on up to `threads` threads at once, including the caller, and return when all have finished. Fewer
// run if no more can be started, so `work` must not depend on their number. Does not throw.
void run_on_threads(int threads, void (*work)(void*), void* context);

// Call work(begin, end, thread) for ranges that cover 0 .. count, multiples of `unit`, on at most as many threads as
// there are units. A range is a fraction of the remainder, so that the last ones are short and threads finish together.
template <class Work>
void parallel_for(int threads, int64_t count, int64_t unit, const Work& work) {
  struct Loop {
    const Work& work;
    int64_t count, unit;
    int threads;
    std::atomic<int64_t> next{0};
    std::atomic<int> thread{0};
  };
  const int64_t units = (count + unit - 1) / unit;
  Loop loop{work, count, unit, units < threads ? static_cast<int>(units) : threads, {}, {}};
  if (units == 0) return;
  run_on_threads(loop.threads, [](void* context) {
    Loop& loop = *static_cast<Loop*>(context);
    const int thread = loop.thread++;
    int64_t begin = loop.next, end;
    while (begin < loop.count) {
      do {
        const int64_t pieces = (loop.count - begin) / (4 * loop.threads * loop.unit);
        end = begin + (pieces > 1 ? pieces : 1) * loop.unit;
        end = end < loop.count ? end : loop.count;
      } while (begin < loop.count && !loop.next.compare_exchange_weak(begin, end));
      if (begin < loop.count) loop.work(begin, end, thread);
      begin = loop.next;
    }
  }, &loop);
}

}  // namespace belle
