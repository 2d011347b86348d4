// The inner loops of quantizing, for some outputs: GPTQ's walk through a block of inputs, coordinate descent, and the
// search for a group's grid. A file isa_*.cpp includes it behind matmul.h. Outputs never meet, so each lane of a vector is
// one, and threads share them. Operations are those of NumPy in float32, one by one, never fused and always in the order
// of the inputs: results are the same, to the bit, with every instruction set, and on a GPU (triton_gptq.py).
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
// Of a register: GCC turns comparisons of wider vectors into 16 scalar ones each, which takes 25 times as long.
using Vec = float __attribute__((vector_size(4 * kVecLanes)));
using Bits = int32_t __attribute__((vector_size(4 * kVecLanes)));

struct Lanes {
  Vec at[kVecs];
};

inline Vec least(Vec a, Vec b) { return a < b ? a : b; }
inline Vec most(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN
inline Vec all(float x) { return Vec{} + x; }

// The nearest whole number, halves to even, for |x| < 2^22: 1.5 * 2^23 leaves no bits for a fraction.
inline Vec whole(Vec x) { return (x + 12582912.0f) - 12582912.0f; }

// The same for any x: larger ones are cut down, still far from any code.
inline Vec rounded(Vec x) { return whole(least(most(x, all(-2097152.0f)), all(2097152.0f))); }

// What float16 holds of x >= 0: the nearest, halves to even; infinity from 65520 on.
inline Vec halved(Vec x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0xFFF + (bits >> 13 & 1);  // a carry rounds up; 13 bits of the mantissa go
  bits &= ~0x1FFF;
  Vec normal;
  std::memcpy(&normal, &bits, sizeof normal);
  const Vec small = (x + 0.5f) - 0.5f;  // float16's smallest step is that of a float in front of 1
  return x < 6.103515625e-05f ? small : normal < 65536.0f ? normal : all(__builtin_inff());
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

// v - sum of factors[i * stride] * past[i], i = begin .. end - 1. Four sums at a time hide how long an addition takes.
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

// Scales and zeros of groups that reach from low <= 0 to high >= 0, as grid.min_max_grid has them.
inline void min_max_grid(const GptqBlockStruct& b, const Lanes& low, const Lanes& high, Lanes& scale, Lanes& zero) {
  const float levels = static_cast<float>(b.levels);
  for (int j = 0; j < kVecs; ++j) {
    const Vec span = b.symmetric ? most(-low.at[j], high.at[j]) * 2.0f : high.at[j] - low.at[j];
    const Vec found = halved(span / levels);
    scale.at[j] = found < 1e-7f ? all(1.0f) : found;  // a group of zeros
    zero.at[j] = b.symmetric ? all((levels + 1.0f) / 2.0f)
                             : least(most(rounded(-low.at[j] / scale.at[j]), Vec{}), all(levels));
  }
}

// The group from input `first` on: what lies before it in the block is made up for, and its grid is that of what is then
// left, which is written back to the weights.
inline void open_group(const GptqBlockStruct& b, int64_t n, int64_t count, int64_t first, const Lanes* errors,
                       Lanes& scale, Lanes& zero) {
  Lanes low{}, high{};
  for (int64_t j = first; j < first + b.group; ++j) {
    float* place = b.weights + j * b.outputs + n;
    Lanes w = load(place, count);
    subtract(w, b.factor + j * b.factor_column_stride, b.factor_row_stride, errors, 0, first);
    store(place, w, count);
    for (int i = 0; i < kVecs; ++i) {
      low.at[i] = least(w.at[i], low.at[i]);
      high.at[i] = most(w.at[i], high.at[i]);
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
  int64_t first = 0;  // what came before is made up for in the weights
  for (int64_t j = 0; j < b.inputs; ++j) {
    if (b.group != 0 && j % b.group == 0) {
      first = j;
      open_group(b, n, count, first, errors, scale, zero);
    } else if (b.group == 0) {
      scale = load(b.scales + j * b.grid_stride + n, count);
      zero = load(b.zeros + j * b.grid_stride + n, count);
    }
    Lanes w = load(b.weights + j * b.outputs + n, count);
    subtract(w, b.factor + j * b.factor_column_stride, b.factor_row_stride, errors, first, j);
    const float pivot = b.factor[j * (b.factor_column_stride + b.factor_row_stride)];
    for (int i = 0; i < kVecs; ++i) {
      code.at[i] = least(most(rounded(w.at[i] / scale.at[i]) + zero.at[i], Vec{}), all(levels));
      errors[j].at[i] = (w.at[i] - (code.at[i] - zero.at[i]) * scale.at[i]) / pivot;
    }
    store_codes(b.codes + j * b.outputs + n, code, count);
    store(b.errors + j * b.outputs + n, errors[j], count);
  }
}

// ---- coordinate descent ----

void descend(const CoordinateDescentStruct& d, int64_t n, int64_t count) {
  Lanes losses[kMaxRun];  // what each weight has become less by
  const Lanes scale = load(d.scale + n, count), zero = load(d.zero + n, count);
  const float levels = static_cast<float>(d.levels);
  for (int64_t j = 0; j < d.inputs; ++j) {
    float* place = d.codes + j * d.outputs + n;
    Lanes code = load(place, count), residual = load(d.residual + j * d.outputs + n, count);
    subtract(residual, d.hessian + j * d.stride, 1, losses, 0, j);
    for (int i = 0; i < kVecs; ++i) {
      const Vec wanted = rounded(code.at[i] - residual.at[i] / (scale.at[i] * d.diagonal[j]));
      const Vec found = least(most(wanted, -zero.at[i]), levels - zero.at[i]);
      losses[j].at[i] = (code.at[i] - found) * scale.at[i];
      code.at[i] = found;
    }
    store(place, code, count);
  }
}

// ---- search ----

constexpr int kTried = 4;  // candidates that share what is read of the weights

// What rounding to kTried candidates costs a register of outputs, whose weights begin at `weights`. They are multiplied
// by the inverse of the scale: a division takes as long as all the rest, and a tie may go either way here.
inline void try_grids(const GridSearchStruct& s, const float* weights, const Vec* scale, const Vec* zero, Vec* loss) {
  Vec inverse[kTried], low[kTried], high[kTried];
  for (int c = 0; c < kTried; ++c) {
    inverse[c] = 1.0f / scale[c];
    low[c] = -zero[c];
    high[c] = static_cast<float>(s.levels) - zero[c];
    loss[c] = Vec{};
  }
  for (int64_t k = 0; k < s.inputs; ++k) {
    Vec w;
    std::memcpy(&w, weights + k * s.outputs, sizeof w);
    for (int c = 0; c < kTried; ++c) {
      const Vec q = whole(least(most(w * inverse[c], low[c]), high[c]));
      const Vec off = q * scale[c] - w;
      loss[c] += s.importance[k] * (off * off);
    }
  }
}

inline void search_register(const GridSearchStruct& s, int64_t n) {
  Vec least_loss = all(__builtin_inff());
  Bits best = Bits{} - 1;
  for (int64_t c = 0; c < s.candidates; c += kTried) {
    const int64_t count = s.candidates - c < kTried ? s.candidates - c : kTried;
    Vec scale[kTried], zero[kTried], loss[kTried];
    for (int64_t t = 0; t < kTried; ++t) {  // the last one stands for those that are not there
      const int64_t at = (c + (t < count ? t : count - 1)) * s.outputs + n;
      std::memcpy(&scale[t], s.scales + at, sizeof(Vec));
      std::memcpy(&zero[t], s.zeros + at, sizeof(Vec));
    }
    try_grids(s, s.weights + n, scale, zero, loss);
    for (int64_t t = 0; t < count; ++t) {
      const Bits better = (loss[t] < least_loss) & (most(scale[t], -scale[t]) >= s.smallest);
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
