// The inner loops of quantization, for some outputs: GPTQ's loop over a block of inputs, coordinate descent, and the
// search for a group's grid. A file isa_*.cpp includes it after matmul.h. Outputs are independent, so each lane of a
// vector is one output, and threads share the outputs. Every operation is rounded as NumPy rounds it in float32, never
// fused and always in the order of the inputs: results are the same, to the bit, with every instruction set, and on a
// GPU (triton_gptq.py).
#include "native.h"

#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here is called from another file

namespace belle {
namespace {

#if defined(__AVX512F__)
constexpr int kVecLanes = 16;
#elif defined(__AVX2__)
constexpr int kVecLanes = 8;
#else
constexpr int kVecLanes = 4;
#endif
constexpr int kVecs = kSolverOutputs / kVecLanes;
// As wide as a register: GCC turns comparisons of wider vectors into 16 scalar ones each, which takes 25 times as long.
using Vec = float __attribute__((vector_size(4 * kVecLanes)));
using Bits = int32_t __attribute__((vector_size(4 * kVecLanes)));

struct Lanes {
  Vec at[kVecs];
};

inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // b if a is NaN
inline Vec broadcast(float x) { return Vec{} + x; }

// The nearest whole number, halves to even, for |x| < 2^22: a number near 1.5 * 2^23 has no bits for a fraction.
inline Vec round_small(Vec x) { return (x + 12582912.0f) - 12582912.0f; }

// The same for any x: larger ones are clamped, to a value that is still far from any code.
inline Vec round_clamped(Vec x) {
  return round_small(minimum(maximum(x, broadcast(-2097152.0f)), broadcast(2097152.0f)));
}

// The nearest float16 of x >= 0, halves to even; infinity from 65520 on.
inline Vec round_to_float16(Vec x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0xFFF + (bits >> 13 & 1);  // rounds up by a carry; the low 13 bits of the mantissa are dropped
  bits &= ~0x1FFF;
  Vec normal;
  std::memcpy(&normal, &bits, sizeof normal);
  const Vec small = (x + 0.5f) - 0.5f;  // float16's smallest step is that of a float just below 1
  return x < 6.103515625e-05f ? small : normal < 65536.0f ? normal : broadcast(__builtin_inff());
}

inline Lanes load(const float* p, int64_t count) {
  Lanes v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline void store(float* p, const Lanes& v, int64_t count) { std::memcpy(p, &v, count * sizeof(float)); }

inline void store_codes(uint8_t* p, const Lanes& code, int64_t count) {
  float values[kSolverOutputs];
  uint8_t bytes[kSolverOutputs];
  std::memcpy(values, &code, sizeof values);
  for (int i = 0; i < kSolverOutputs; ++i) bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(values[i]));
  std::memcpy(p, bytes, count);
}

// v -= factors[i * stride] * past[i] for i = begin .. end - 1. Four sums at a time hide the latency of an addition.
inline void subtract(Lanes& v, const float* factors, int64_t stride, const Lanes* past, int64_t begin, int64_t end) {
  for (int q = 0; q < kVecs; q += 4) {
    Vec a = v.at[q], b = v.at[q + 1], c = v.at[q + 2], d = v.at[q + 3];
    for (int64_t i = begin; i < end; ++i) {
      const float factor = factors[i * stride];
      const Vec* past_i = past[i].at + q;
      a -= factor * past_i[0];
      b -= factor * past_i[1];
      c -= factor * past_i[2];
      d -= factor * past_i[3];
    }
    v.at[q] = a, v.at[q + 1] = b, v.at[q + 2] = c, v.at[q + 3] = d;
  }
}

// ---- GPTQ ----

// Scales and zero points of groups with values from low <= 0 to high >= 0, as in quantization/grid.py.
inline void min_max_grid(const GptqBlockStruct& b, const Lanes& low, const Lanes& high, Lanes& scale, Lanes& zero) {
  const float levels = static_cast<float>(b.levels);
  for (int j = 0; j < kVecs; ++j) {
    const Vec span = b.symmetric ? maximum(-low.at[j], high.at[j]) * 2.0f : high.at[j] - low.at[j];
    const Vec found = round_to_float16(span / levels);
    scale.at[j] = found < 1e-7f ? broadcast(1.0f) : found;  // a group of zeros
    zero.at[j] = b.symmetric ? broadcast((levels + 1.0f) / 2.0f)
                             : minimum(maximum(round_clamped(-low.at[j] / scale.at[j]), Vec{}), broadcast(levels));
  }
}

// Start the group at input `first`: compensate the errors of the inputs before it in the block, write the resulting
// weights back, and compute the group's grid from them.
inline void start_group(const GptqBlockStruct& b, int64_t n, int64_t count, int64_t first, const Lanes* errors,
                        Lanes& scale, Lanes& zero) {
  Lanes low{}, high{};
  for (int64_t j = first; j < first + b.group; ++j) {
    float* weights = b.weights + j * b.outputs + n;
    Lanes w = load(weights, count);
    subtract(w, b.factor + j * b.factor_column_stride, b.factor_row_stride, errors, 0, first);
    store(weights, w, count);
    for (int i = 0; i < kVecs; ++i) {
      low.at[i] = minimum(w.at[i], low.at[i]);
      high.at[i] = maximum(w.at[i], high.at[i]);
    }
  }
  min_max_grid(b, low, high, scale, zero);
  const int64_t at = first / b.group * b.outputs + n;
  store(b.scales + at, scale, count);
  store(b.zeros + at, zero, count);
}

void gptq_block(const GptqBlockStruct& b, int64_t n, int64_t count) {
  Lanes errors[kMaxRun], scale, zero, code;
  const float levels = static_cast<float>(b.levels);
  int64_t first = 0;  // errors of the inputs before it are compensated in the weights already
  for (int64_t j = 0; j < b.inputs; ++j) {
    if (b.group != 0 && j % b.group == 0) {
      first = j;
      start_group(b, n, count, first, errors, scale, zero);
    } else if (b.group == 0) {
      scale = load(b.scales + j * b.grid_stride + n, count);
      zero = load(b.zeros + j * b.grid_stride + n, count);
    }
    Lanes w = load(b.weights + j * b.outputs + n, count);
    subtract(w, b.factor + j * b.factor_column_stride, b.factor_row_stride, errors, first, j);
    const float pivot = b.factor[j * (b.factor_column_stride + b.factor_row_stride)];
    for (int i = 0; i < kVecs; ++i) {
      code.at[i] = minimum(maximum(round_clamped(w.at[i] / scale.at[i]) + zero.at[i], Vec{}), broadcast(levels));
      errors[j].at[i] = (w.at[i] - (code.at[i] - zero.at[i]) * scale.at[i]) / pivot;
    }
    store_codes(b.codes + j * b.outputs + n, code, count);
    store(b.errors + j * b.outputs + n, errors[j], count);
  }
}

// ---- coordinate descent ----

void descend(const CoordinateDescentStruct& d, int64_t n, int64_t count) {
  Lanes decreases[kMaxRun];  // by how much each weight has decreased
  const Lanes scale = load(d.scale + n, count), zero = load(d.zero + n, count);
  const float levels = static_cast<float>(d.levels);
  for (int64_t j = 0; j < d.inputs; ++j) {
    float* codes = d.codes + j * d.outputs + n;
    Lanes code = load(codes, count), residual = load(d.residual + j * d.outputs + n, count);
    subtract(residual, d.hessian + j * d.stride, 1, decreases, 0, j);
    for (int i = 0; i < kVecs; ++i) {
      const Vec wanted = round_clamped(code.at[i] - residual.at[i] / (scale.at[i] * d.diagonal[j]));
      const Vec found = minimum(maximum(wanted, -zero.at[i]), levels - zero.at[i]);
      decreases[j].at[i] = (code.at[i] - found) * scale.at[i];
      code.at[i] = found;
    }
    store(codes, code, count);
  }
}

// ---- grid search ----

constexpr int kCandidates = 4;  // evaluated together, so that weights are read once for all

// The weighted rounding error of kCandidates grids for a register of outputs with weights at `weights`. Weights are
// multiplied by the inverse of the scale: a division takes as long as all the rest, and ties may be decided either way.
inline void grid_losses(const GridSearchStruct& s, const float* weights, const Vec* scale, const Vec* zero, Vec* loss) {
  Vec inverse[kCandidates], low[kCandidates], high[kCandidates];
  for (int c = 0; c < kCandidates; ++c) {
    inverse[c] = 1.0f / scale[c];
    low[c] = -zero[c];
    high[c] = static_cast<float>(s.levels) - zero[c];
    loss[c] = Vec{};
  }
  for (int64_t k = 0; k < s.inputs; ++k) {
    Vec w;
    std::memcpy(&w, weights + k * s.outputs, sizeof w);
    for (int c = 0; c < kCandidates; ++c) {
      const Vec q = round_small(minimum(maximum(w * inverse[c], low[c]), high[c]));
      const Vec off = q * scale[c] - w;
      loss[c] += s.importance[k] * (off * off);
    }
  }
}

inline void search_register(const GridSearchStruct& s, int64_t n) {
  Vec least_loss = broadcast(__builtin_inff());
  Bits best = Bits{} - 1;
  for (int64_t c = 0; c < s.candidates; c += kCandidates) {
    const int64_t count = s.candidates - c < kCandidates ? s.candidates - c : kCandidates;
    Vec scale[kCandidates], zero[kCandidates], loss[kCandidates];
    for (int64_t t = 0; t < kCandidates; ++t) {  // the last candidate replaces those that do not exist
      const int64_t at = (c + (t < count ? t : count - 1)) * s.outputs + n;
      std::memcpy(&scale[t], s.scales + at, sizeof(Vec));
      std::memcpy(&zero[t], s.zeros + at, sizeof(Vec));
    }
    grid_losses(s, s.weights + n, scale, zero, loss);
    for (int64_t t = 0; t < count; ++t) {
      const Bits better = (loss[t] < least_loss) & (maximum(scale[t], -scale[t]) >= s.smallest);
      least_loss = better ? loss[t] : least_loss;
      best = better ? Bits{} + static_cast<int32_t>(c + t) : best;
    }
  }
  std::memcpy(s.best + n, &best, sizeof best);
}

void search(const GridSearchStruct& s, int64_t n) {
  for (int64_t lane = 0; lane < kBlock; lane += kVecLanes) search_register(s, n + lane);
}

}  // namespace
}  // namespace belle
